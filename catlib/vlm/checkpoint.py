"""The one door to a model: a folder or hub name becomes a Checkpoint (nothing loaded), and a Checkpoint a VLM.

Which base, which question, which breeds and how their answers are spelled is decided here and nowhere else.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from catlib.errors import InputError
from catlib.paths import resolve
from catlib.runs import CONFIG, TRAINING, read_training
from catlib.vlm.adapters import base_of, check_config, load_adapter
from catlib.vlm.families import family_of
from catlib.vlm.features import pool_tokens
from catlib.vlm.models import VLM, Checkpoint, empty_model, load_base, load_config, pick_device, pick_dtype
from catlib.vlm.processors import load_processor

log = logging.getLogger(__name__)
PRECISIONS = ("auto", "bfloat16", "float32", "4-bit")
OF_OLD_CARDS = "float16"  # what auto becomes there
BLOCK = 64  # weights of NF4 that share a scale
KINDS = {"breeds": list, "spelled": dict, "settings": dict}  # of entries of training.json
ROOM = 1.2  # what answering needs on top of the weights: cache, activations, the tower's pixels


def find_checkpoint(
    name: str | Path, *, base_model: str = "", question: str = "", breeds: Sequence[str] = (), tuned: bool = True
) -> Checkpoint:
    """What a model is, asked and able to answer, by its name: a folder with an adapter, a folder with a whole model, a hub name.

    `base_model` goes before the base that an adapter names, `question` before the one of the training (empty: as trained),
    `breeds` before those of the training. `tuned=False`: the base without the adapter, asked the checkpoint's question.
    Raises InputError when there is no such folder, it holds no model, or a record in it is ill-formed.
    """
    folder = model_folder(name)
    found = Checkpoint(str(name), str(name)) if folder is None else _in_folder(str(name), folder, base_model, tuned)
    remarks = []
    if question and question != found.trained_question and (found.trained_question or question != found.question):
        trained = f"it was trained with {found.trained_question!r}" * bool(found.trained_question)
        remarks.append(f"{found.name} is asked {question!r}; {trained or 'not the standard one'}")
    if found.adapter is not None and not found.training:
        remarks.append(f"{found.name} has no {TRAINING}: its breeds and the question of its training are not known")
    if found.training.get("breeds") and (unknown := [breed for breed in breeds if breed not in found.breeds]):
        remarks.append(f"{found.name} was not trained on {', '.join(unknown)}")
    return replace(
        found, question=question or found.question, breeds=tuple(breeds) or found.breeds, remarks=tuple(remarks)
    )


def open_vlm(
    checkpoint: Checkpoint | str | Path, *, device: str = "auto", precision: str = "auto", attention: str = "auto"
) -> VLM:
    """The model in memory, ready to answer; remarks of the checkpoint are logged.

    `precision`: bfloat16, float32, 4-bit (the language model in NF4), or auto: bfloat16 where the device computes in it, else
    float32 (on older GPUs float16); 4-bit on a GPU without the room. `attention`: see `load_base`. Raises InputError when the
    precision is none of these, the base or its processor is not there, or the adapter does not fit (see `load_adapter`).
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = find_checkpoint(checkpoint)
    if precision not in (*PRECISIONS, OF_OLD_CARDS):
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}; found {precision!r}")
    whole = checkpoint.folder is not None and checkpoint.base == str(checkpoint.folder)
    if whole and not (Path(checkpoint.base) / "config.json").is_file():
        raise InputError(f"{checkpoint.folder}: no weights that can be loaded here, only a record of training")
    if checkpoint.adapter is not None:
        check_config(checkpoint.adapter)
    where, config = pick_device(device), load_config(checkpoint.base)
    processor = load_processor(checkpoint.base, checkpoint.max_pixels, checkpoint.image_pool)
    if precision == "auto":
        free = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else None
        count = sum(p.numel() for p in empty_model(config).parameters()) if free is not None else 0
        precision = choose_precision(pick_dtype("auto", where), count, free)
    quantize = precision == "4-bit"
    if quantize and where.type == "cpu":  # bitsandbytes could load it and not compute with it
        text = config.get_text_config()
        widths = {name: getattr(text, name, 0) or 0 for name in ("hidden_size", "intermediate_size")}
        if odd := [f"{name} {width}" for name, width in widths.items() if width % BLOCK]:
            of = f"{Path(checkpoint.base).name} has {', '.join(odd)}"
            raise InputError(f"4-bit on a CPU needs layers whose width is a multiple of {BLOCK}; {of}")
    with_adapter = f" with {checkpoint.adapter}" if checkpoint.adapter else ""
    log.info("loading %s%s in %s on %s", checkpoint.base, with_adapter, precision, where)
    for remark in checkpoint.remarks:
        log.warning("%s", remark)
    model = load_base(checkpoint.base, where, pick_dtype("auto" if quantize else precision, where), quantize, attention)
    vlm = VLM(model, processor, checkpoint, family_of(model))
    if checkpoint.image_pool > 1:
        pool_tokens(vlm)
    if checkpoint.adapter is not None:
        # Merged where the base is not quantized: half as fast again on a GPU. In float32 up to there, so that it rounds once.
        load_adapter(vlm, checkpoint.adapter, trainable=not quantize)
        if not quantize:
            vlm.model = vlm.model.merge_and_unload().requires_grad_(False).eval()
            vlm.projector.to(vlm.dtype)  # one that was trained in full
    return vlm


def choose_precision(best: torch.dtype, parameters: int, free: int | None) -> str:
    """The precision for `parameters` weights when `best` is the device's own and `free` bytes of GPU memory are left;
    None: the memory is not asked about (a CPU swaps rather than fails).
    """
    if free is not None and ROOM * parameters * best.itemsize > free:
        return "4-bit"
    return str(best).removeprefix("torch.")


def model_folder(name: str | Path) -> Path | None:
    """The folder that a model's name means, below the project's root where it is relative; None for a hub name. Raises
    InputError for a path that is not there.
    """
    text = str(name).strip()
    if not text or text == ".":
        raise InputError("no model is named: give a folder or a hub name such as owner/model")
    folder = resolve(name)
    if folder.is_dir():
        return folder
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        which = "run 02_training first where that makes it, or give a folder or a hub name such as owner/model"
        raise InputError(f"model {text!r}: no such folder ({folder}); {which}")
    return None


def _in_folder(name: str, folder: Path, base_model: str, tuned: bool) -> Checkpoint:
    """What a folder says. Raises InputError where an entry of its record is of another kind than is used here."""
    training = read_training(folder)
    names, spelled, settings = (training.get(key) or kind() for key, kind in KINDS.items())
    texts = [training.get(key) or "" for key in ("question", "base_model")]
    fits = all(isinstance(value, kind) for value, kind in zip((names, spelled, settings), KINDS.values(), strict=True))
    if not (
        fits
        and isinstance(settings.get("max_pixels", 0), int)
        and settings.get("image_pool", 1) in (1, 2)
        and all(isinstance(text, str) for text in (*names, *texts, *spelled, *spelled.values()))
    ):
        path = folder / TRAINING
        raise InputError(f"{path}: question, base_model, breeds, spelled or settings is of the wrong kind")
    base, adapter = name, None
    if (folder / CONFIG).is_file():
        named = base_of(folder)  # refuses a folder without weights before anything is loaded
        base, adapter = base_model or training.get("base_model") or named, folder if tuned else None
    elif not (folder / "config.json").is_file() and not training:
        raise InputError(f"{folder}: neither an adapter ({CONFIG}) nor a model (config.json) is in this folder")
    elif (
        not tuned
    ):  # of a folder with no more than the record (a GGUF export) too; `open_vlm` refuses the export itself
        base = base_model or training.get("base_model") or base
    return Checkpoint(
        name,
        str(model_folder(base) or base),
        adapter,
        folder,
        base_name=base,
        breeds=tuple(names or Checkpoint.breeds),
        question=training.get("question") or Checkpoint.question,
        trained_question=training.get("question", ""),
        spelled=training.get("spelled", {}),
        max_pixels=settings.get("max_pixels", 0),
        image_pool=settings.get("image_pool", 1) if tuned else 1,  # the base knows all tokens
        training=training,
    )
