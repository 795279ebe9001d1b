"""A plain checkpoint out of a tuned one: adapter and projector merged, the hub's key names, verified before it is done."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from catlib.data.records import write_atomically
from catlib.errors import CatlibError, InputError
from catlib.files import whole_folder
from catlib.serving.export_layout import to_hub_layout
from catlib.serving.export_verify import LIMITS, Answers, Photos, Verification, ask, choose_photos, compare
from catlib.vlm.adapters import TRAINING, load_adapter, save_processor
from catlib.vlm.checkpoint import Checkpoint, find_checkpoint, open_vlm
from catlib.vlm.families import family_of
from catlib.vlm.models import VLM, load_base, load_config, load_processor, pick_device

log = logging.getLogger(__name__)
EXPORT = "export.json"  # what an export was made from, and how it was verified
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHARD = "4GB"


@dataclass(frozen=True)
class Merged:
    """A finished export. `as_trained`: a QLoRA adapter on the 4-bit base that it was trained on, for information."""

    folder: Path
    dtype: str
    gigabytes: float
    verification: Verification
    as_trained: Verification | None


def find_source(checkpoint: Path, base_model: str = "") -> Checkpoint:
    """The model that a checkpoint folder names. Raises InputError for a folder that holds no model, or a 4-bit base."""
    source = find_checkpoint(checkpoint, base_model=base_model)
    if getattr(load_config(source.base), "quantization_config", None):
        raise InputError(
            f"{source.base} holds quantized weights; an adapter is never merged into those, because rounding would lose most of "
            f"what it learned: name the plain model that they were made from with --base-model"
        )
    return source


def merge(
    source: Checkpoint,
    out: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    photos: Sequence[Path] = (),
    count: int = 8,
    limit: float | None = None,
    force: bool = False,
) -> Merged:
    """Write the plain checkpoint and return what was verified.

    `dtype` auto: the one it was trained in, where the training names one, else the base's own. `limit`: largest score
    difference in nats, by default what rounding to `dtype` explains. Raises CatlibError, leaving nothing behind, when the
    export answers otherwise than the original.
    """
    shown = choose_photos(photos, source.training, count)
    name = export_dtype(source, dtype)
    where, kind = pick_device(device), DTYPES[name]
    limit = LIMITS[name] if limit is None else limit
    if source.mode == "qlora":
        log.warning(
            "%s was trained on a 4-bit base; it is merged into the plain base, whose weights differ from the 4-bit ones by their "
            "rounding. Expect small differences from the model as it was trained; both are compared below",
            source.folder,
        )
    with whole_folder(out, force, [folder for folder in (source.folder, Path(source.base)) if folder]) as folder:
        log.info("loading %s", source.base)
        vlm = load_plain(source.base, where, kind)
        if source.adapter is not None:
            load_adapter(vlm, source.adapter, trainable=True)  # adapters stay in float32, so that merging rounds once
            vlm.model.requires_grad_(False).eval()
        original = ask(vlm, shown, source.breeds, source.question)
        if source.adapter is not None:
            vlm.model = vlm.model.merge_and_unload()
        save_plain(vlm, folder, kind)
        del vlm
        log.info("verifying on %d photos %s", len(shown.names), shown.origin)
        export = ask(load_plain(str(folder), where, kind), shown, source.breeds, source.question)
        verification = compare(original, export, source.breeds, shown, limit)
        if not verification.passed:
            raise CatlibError(f"the verification failed, nothing was exported to {out}: {verification}")
        as_trained = _against_4bit(source, export, shown, device) if source.mode == "qlora" else None
        _write_record(source, folder, name, verification, as_trained)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e9
    return Merged(out, name, size, verification, as_trained)


def export_dtype(source: Checkpoint, dtype: str) -> str:
    """The name of the dtype that the weights are written in."""
    if dtype != "auto":
        return dtype
    trained = source.training.get("settings", {}).get("dtype", "auto")
    stored = str(load_config(source.base).dtype).removeprefix("torch.")
    return next((name for name in (trained, stored) if name in DTYPES), "bfloat16")


def load_plain(ref: str, device: torch.device, dtype: torch.dtype) -> VLM:
    """A model without adapter, in any of DTYPES."""
    model = load_base(ref, device, dtype)
    return VLM(model, load_processor(ref), Checkpoint(ref, ref), family_of(model))


def save_plain(vlm: VLM, folder: Path, dtype: torch.dtype) -> None:
    """Weights in `dtype` under the hub's names, both processor files, tokenizer, chat template, generation config."""
    model = vlm.model.to(dtype)
    for config in (model.config, *(getattr(model.config, part, None) for part in ("text_config", "vision_config"))):
        if config is not None:
            config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=SHARD)
    renamed = to_hub_layout(folder)
    if renamed:
        log.info("%d tensors of the vision tower got the hub's names", renamed)
    save_processor(vlm.processor, folder)


def _against_4bit(source: Checkpoint, export: Answers, shown: Photos, device: str) -> Verification:
    """The export beside the model as it was trained: the same adapter on the 4-bit base."""
    vlm = open_vlm(source, device=device, precision="4-bit")
    return compare(ask(vlm, shown, source.breeds, source.question), export, source.breeds, shown, float("inf"))


def _write_record(
    source: Checkpoint, folder: Path, dtype: str, verified: Verification, as_trained: Verification | None
) -> None:
    """export.json, a model card, and the training's record: `catlib predict` reads breeds and question from it."""
    facts = {
        "kind": "merged",
        "base_model": source.base,
        "adapter": str(source.adapter) if source.adapter else None,
        "dtype": dtype,
        "verification": asdict(verified),
        "against_4bit": asdict(as_trained) if as_trained else None,
    }
    if facts["against_4bit"]:
        facts["against_4bit"].pop("limit")
    write_atomically(folder / EXPORT, json.dumps(facts, indent=1, ensure_ascii=False))
    if source.training:
        write_atomically(folder / TRAINING, json.dumps(source.training, indent=1, ensure_ascii=False))
    card = [
        "# A merged model",
        "",
        f"`{source.base}` with the adapter `{source.adapter.name}` merged into it; plain weights in {dtype}."
        if source.adapter
        else f"`{source.base}` written anew, weights in {dtype}.",
        "",
        f"Verified on {verified}.",
        "",
    ]
    write_atomically(folder / "README.md", "\n".join(card))
