"""A plain checkpoint out of a tuned one: adapter and projector merged, the hub's key names, verified before it is done."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from catlib.breeds import BREEDS
from catlib.data.records import write_atomically
from catlib.errors import CatlibError, InputError
from catlib.serving.export_layout import to_hub_layout
from catlib.serving.export_verify import LIMITS, Answers, Photos, Verification, ask, choose_photos, compare
from catlib.settings import EvaluationSettings
from catlib.vlm.checkpoint import CONFIG, TRAINING, base_of, load_adapter, read_training, save_processor
from catlib.vlm.models import VLM, Anatomy, load_base, load_config, load_processor, load_vlm, pick_device

log = logging.getLogger(__name__)
EXPORT = "export.json"  # what an export was made from, and how it was verified
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHARD = "4GB"


@dataclass(frozen=True)
class Source:
    """A tuned model on disk: `base` for `from_pretrained`, `adapter` None when the checkpoint is a plain model itself."""

    checkpoint: Path
    base: str
    adapter: Path | None
    training: dict[str, Any]

    @property
    def question(self) -> str:
        return self.training.get("question") or EvaluationSettings().prompt

    @property
    def breeds(self) -> tuple[str, ...]:
        return tuple(self.training.get("breeds") or (breed.name for breed in BREEDS))

    @property
    def mode(self) -> str:
        """How it was trained; empty when no record says so."""
        return self.training.get("settings", {}).get("mode", "")


@dataclass(frozen=True)
class Merged:
    """A finished export. `as_trained`: a QLoRA adapter on the 4-bit base that it was trained on, for information."""

    folder: Path
    dtype: str
    gigabytes: float
    verification: Verification
    as_trained: Verification | None


def find_source(checkpoint: Path, base_model: str = "") -> Source:
    """The model that a checkpoint folder names. Raises InputError for a folder that holds no model, or a 4-bit base."""
    from demo.tiny_models import resolve_model

    if not checkpoint.is_dir():
        raise InputError(f"checkpoint {checkpoint}: no such folder")
    training = read_training(checkpoint)
    if (checkpoint / CONFIG).is_file():
        base = resolve_model(base_model or training.get("base_model") or base_of(checkpoint), "llava")
        source = Source(checkpoint, base, checkpoint, training)
    elif (checkpoint / "config.json").is_file():
        source = Source(checkpoint, str(checkpoint), None, training)
    else:
        raise InputError(
            f"checkpoint {checkpoint}: neither an adapter ({CONFIG}) nor a plain model (config.json) is in it"
        )
    if getattr(load_config(source.base), "quantization_config", None):
        raise InputError(
            f"{source.base} holds quantized weights; an adapter is never merged into those, because rounding would lose most of "
            f"what it learned: name the plain model that they were made from with --base-model"
        )
    return source


@contextmanager
def whole_folder(out: Path, force: bool, keep: Sequence[Path] = ()) -> Iterator[Path]:
    """A temporary folder beside `out` that gets its name at the end; an error or interruption leaves nothing behind.

    Raises InputError when `out` holds something already (unless `force`), or one of the `keep` folders is in it.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise InputError(f"{out} exists and is not empty: name another folder, or replace it with --force")
    for folder in keep:
        if folder.exists() and folder.resolve().is_relative_to(out):
            raise InputError(f"{out} holds what is to be exported; name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary
        _let_others_read(temporary)
        if out.exists():
            former = Path(tempfile.mkdtemp(prefix=f".{out.name}.former.", dir=out.parent))
            out.rename(former / out.name)
            temporary.rename(out)
            shutil.rmtree(former)
        else:
            temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def merge(
    source: Source,
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
            source.checkpoint,
        )
    with whole_folder(out, force, [source.checkpoint, Path(source.base)]) as folder:
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


def _let_others_read(folder: Path) -> None:
    """The usual permissions: temporary folders and safetensors files are made for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def export_dtype(source: Source, dtype: str) -> str:
    """The name of the dtype that the weights are written in."""
    if dtype != "auto":
        return dtype
    trained = source.training.get("settings", {}).get("dtype", "auto")
    stored = str(load_config(source.base).dtype).removeprefix("torch.")
    return next((name for name in (trained, stored) if name in DTYPES), "bfloat16")


def load_plain(ref: str, device: torch.device, dtype: torch.dtype) -> VLM:
    """A model without adapter, in any of DTYPES."""
    model = load_base(ref, device, dtype)
    return VLM(model, load_processor(ref), ref, Anatomy.of(model))


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


def _against_4bit(source: Source, export: Answers, shown: Photos, device: str) -> Verification:
    """The export beside the model as it was trained: the same adapter on the 4-bit base."""
    vlm = load_vlm(source.base, adapter=source.adapter, device=device, quantize=True)
    return compare(ask(vlm, shown, source.breeds, source.question), export, source.breeds, shown, float("inf"))


def _write_record(
    source: Source, folder: Path, dtype: str, verified: Verification, as_trained: Verification | None
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
