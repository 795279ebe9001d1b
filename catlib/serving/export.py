"""A plain checkpoint out of a tuned one: adapter and projector merged, the hub's key names, verified before it is done."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from catlib.errors import CatlibError, InputError
from catlib.files import read_json, whole_folder, write_json, write_text
from catlib.serving.export_verify import LIMITS, Verification, ask, choose_photos, compare
from catlib.vlm.adapters import TRAINING, load_adapter, save_processor
from catlib.vlm.checkpoint import VLM, Checkpoint, find_checkpoint, open_vlm
from catlib.vlm.families import HUB_TOWERS, family_of
from catlib.vlm.models import DTYPES, load_base, load_config, pick_device
from catlib.vlm.processors import load_processor

log = logging.getLogger(__name__)
EXPORT = "export.json"  # what an export was made from, and how it was verified


@dataclass(frozen=True)
class Merged:
    """A finished export. `as_trained`: a QLoRA adapter on the 4-bit base that it was trained on, for information."""

    folder: Path
    dtype: str
    gigabytes: float
    verification: Verification
    as_trained: Verification | None


def find_mergeable(name: str | Path, base_model: str = "") -> Checkpoint:
    """The checkpoint of that name, its base in plain weights. Raises InputError for a 4-bit base, and as `find_checkpoint`."""
    checkpoint = find_checkpoint(name, base_model=base_model)
    if getattr(load_config(checkpoint.base), "quantization_config", None):
        raise InputError(
            f"{checkpoint.base} holds quantized weights; an adapter is never merged into those, because rounding would lose most "
            "of what was learned: name the plain base by --base-model"
        )
    return checkpoint


def merge(
    checkpoint: Checkpoint,
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
    shown = choose_photos(photos, checkpoint, count)
    where = pick_device(device)
    if dtype == "auto":
        trained = checkpoint.training.get("settings", {}).get("dtype", "auto")
        stored = str(load_config(checkpoint.base).dtype).removeprefix("torch.")
        dtype = next((name for name in (trained, stored) if name in DTYPES), "bfloat16")
    limit = LIMITS[dtype] if limit is None else limit
    if checkpoint.mode == "qlora":
        log.warning(
            "%s was trained on a 4-bit base; it is merged into the plain base, whose weights differ from the 4-bit ones by their "
            "rounding. Expect small differences from the model as it was trained; both are compared below",
            checkpoint.name,
        )
    keep = [path for path in (checkpoint.folder, Path(checkpoint.base)) if path]
    with whole_folder(out, force, keep, is_export) as folder:
        log.info("loading %s", checkpoint.base)
        vlm = load_plain(checkpoint, where, dtype)
        if checkpoint.adapter is not None:
            load_adapter(vlm, checkpoint.adapter, trainable=True)  # stays in float32, so that merging rounds once
            vlm.model.requires_grad_(False).eval()
        original = ask(vlm, shown)
        if checkpoint.adapter is not None:
            vlm.model = vlm.model.merge_and_unload()
        save_plain(vlm, folder, DTYPES[dtype])
        del vlm
        log.info("verifying on %d photos %s", len(shown.names), shown.origin)
        export = ask(load_plain(replace(checkpoint, base=str(folder)), where, dtype), shown)
        verification = compare(original, export, checkpoint.breeds, shown, limit)
        if not verification.passed:
            raise CatlibError(f"the verification failed, nothing was exported to {out}: {verification}")
        as_trained = None
        if checkpoint.mode == "qlora":  # beside the model as it was trained: the same adapter on the 4-bit base
            quantized = ask(open_vlm(checkpoint, device=device, precision="4-bit"), shown)
            as_trained = compare(quantized, export, checkpoint.breeds, shown, float("inf"))
        facts = {"dtype": dtype, "verification": asdict(verification)}
        if as_trained:
            facts["against_4bit"] = {key: value for key, value in asdict(as_trained).items() if key != "limit"}
        write_record(checkpoint, folder, "merged", facts)
        made = f"with the adapter `{checkpoint.adapter.name}` merged into it" if checkpoint.adapter else "written anew"
        said = f"`{checkpoint.base}` {made}; plain weights in {dtype}.\n\nVerified on {verification}."
        write_text(folder / "README.md", f"# A merged model\n\n{said}\n")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e9
    return Merged(out, dtype, size, verification, as_trained)


def load_plain(checkpoint: Checkpoint, device: torch.device, dtype: str) -> VLM:
    """The checkpoint's base without its adapter, in any of DTYPES: asked its question, answering with its breeds."""
    model = load_base(checkpoint.base, device, DTYPES[dtype])
    processor = load_processor(checkpoint.base, checkpoint.max_pixels)
    return VLM(model, processor, replace(checkpoint, adapter=None), family_of(model))


def save_plain(vlm: VLM, folder: Path, dtype: torch.dtype, shard: str = "4GB") -> None:
    """Weights in `dtype` under the hub's names, both processor files, tokenizer, chat template, generation config."""
    model = vlm.model.to(dtype)
    for config in (model.config, *(getattr(model.config, part, None) for part in ("text_config", "vision_config"))):
        if config is not None:
            config.dtype = dtype
    tower = model.config.vision_config.model_type
    weights = {hub_name(name, tower): tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=weights, max_shard_size=shard)
    save_processor(vlm.processor, folder)


def is_export(folder: Path) -> bool:
    """Whether a folder was written by `write_record`'s callers: by it, and nothing else, an export is told."""
    path = folder / EXPORT
    return path.is_file() and {"kind", "base_model", "adapter"} <= read_json(path).keys()


def write_record(checkpoint: Checkpoint, folder: Path, kind: str, facts: Mapping[str, object]) -> None:
    """export.json, and the training's record, from which an export's breeds and question are read."""
    adapter = str(checkpoint.adapter) if checkpoint.adapter else None
    write_json(folder / EXPORT, {"kind": kind, "base_model": checkpoint.base, "adapter": adapter, **facts})
    if checkpoint.training:
        write_json(folder / TRAINING, dict(checkpoint.training))


def weight_names(folder: Path) -> set[str]:
    """The names of all tensors of a checkpoint folder, without loading them."""
    return {name for path in folder.glob("*.safetensors") for name in safe_open(path, framework="pt").keys()}


def tower_type(folder: Path) -> str:
    """`model_type` of the vision configuration in a folder's config.json, empty where there is none."""
    return str((read_json(folder / "config.json").get("vision_config") or {}).get("model_type", ""))


def hub_name(name: str, tower: str) -> str:
    """The hub's name of a LLaVA tensor; `tower` is the `model_type` of the vision configuration.

    >>> hub_name("vision_tower.encoder.layers.0.layer_norm1.bias", "clip_vision_model")
    'vision_tower.vision_model.encoder.layers.0.layer_norm1.bias'
    """
    deeper = HUB_TOWERS.get(tower, "")
    return re.sub(rf"^((?:model\.)?vision_tower\.)(?!{re.escape(deeper)})", rf"\g<1>{deeper}", name) if deeper else name


def lacks_hub_names(folder: Path) -> bool:
    """Whether some tensor has another name on the hub."""
    tower = tower_type(folder)
    return any(hub_name(name, tower) != name for name in weight_names(folder))
