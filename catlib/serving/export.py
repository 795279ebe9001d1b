"""A plain checkpoint out of a tuned one: adapter and projector merged, the hub's key names, verified before it is done."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from catlib.data.images import inside, open_image
from catlib.data.records import image_root_of, read_samples
from catlib.errors import CatlibError, InputError
from catlib.files import read_json, write_json, write_text
from catlib.folders import whole_folder
from catlib.paths import resolve
from catlib.runs import TRAINING
from catlib.vlm.adapters import load_adapter, save_processor
from catlib.vlm.checkpoint import VLM, Checkpoint, find_checkpoint, open_vlm
from catlib.vlm.decoding import generate_free
from catlib.vlm.families import HUB_TOWERS, family_of
from catlib.vlm.models import DTYPES, load_base, load_config, pick_device
from catlib.vlm.processors import load_processor
from catlib.vlm.scoring import LabelScorer

log = logging.getLogger(__name__)
EXPORT = "export.json"  # what an export was made from, and how it was verified
BATCH = 4
LIMITS = {"float32": 0.01, "float16": 0.1, "bfloat16": 1.0}  # nats of a whole label that rounding the weights may cost


@dataclass(frozen=True)
class Photos:
    """What an export is verified on: names, images, and in words where they come from."""

    names: tuple[str, ...]
    images: tuple[Image.Image, ...]
    origin: str


@dataclass(frozen=True)
class Answers:
    """What a model says about n photos: greedy `texts`, and label log-likelihoods `scores` (n, breeds) in nats."""

    texts: tuple[str, ...]
    scores: np.ndarray


@dataclass(frozen=True)
class Verification:
    """Two models on the same photos. `largest_difference`: of any label's log-likelihood, nats."""

    photos: int
    origin: str
    same_breed: int
    same_answer: int
    largest_difference: float
    limit: float
    differing: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """The scores decide: within the limit a breed or a text can only differ where two were nearly equal."""
        return self.largest_difference <= self.limit

    def __str__(self) -> str:
        same = f"same breed for {self.same_breed}, same answer for {self.same_answer}"
        limit = f" (limit {self.limit:g})" if self.limit < float("inf") else ""
        largest = f"largest score difference {self.largest_difference:.2g} nats{limit}"
        return "\n  ".join([f"{self.photos} photos ({self.origin}): {same}, {largest}", *self.differing])


@dataclass(frozen=True)
class Merged:
    """A finished export. `as_trained`: a QLoRA adapter on the 4-bit base that it was trained on, for information."""

    folder: Path
    dtype: str
    gigabytes: float
    verification: Verification
    as_trained: Verification | None


def find_mergeable(name: str | Path, base_model: str = "") -> Checkpoint:
    """The checkpoint of that name, its base in plain weights. Raises InputError for a 4-bit base, and as `check_engines`."""
    checkpoint = find_checkpoint(name, base_model=base_model)
    checkpoint.check_engines()
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
    checkpoint.check_engines()
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
    """The hub's name of a base model's tensor; `tower` is the `model_type` of the vision configuration.

    >>> hub_name("vision_tower.encoder.layers.0.layer_norm1.bias", "clip_vision_model")
    'vision_tower.vision_model.encoder.layers.0.layer_norm1.bias'
    """
    deeper = HUB_TOWERS.get(tower, "")
    return re.sub(rf"^((?:model\.)?vision_tower\.)(?!{re.escape(deeper)})", rf"\g<1>{deeper}", name) if deeper else name


def lacks_hub_names(folder: Path) -> bool:
    """Whether some tensor has another name on the hub."""
    tower = tower_type(folder)
    return any(hub_name(name, tower) != name for name in weight_names(folder))


def choose_photos(given: Sequence[Path], checkpoint: Checkpoint, count: int) -> Photos:
    """The given photos; else `count` validation photos of the training, as far as they are still there; else plain patterns."""
    if count < 1:
        raise InputError(f"at least one photo is needed to verify an export, found {count}")
    if given:
        return Photos(tuple(p.name for p in given), tuple(open_image(p) for p in given), "given")
    if named := checkpoint.training.get("settings", {}).get("val_data", ""):
        try:
            root = image_root_of(resolve(named))
            samples = read_samples(resolve(named), root)
            n = min(count, len(samples))
            chosen = [samples[i * len(samples) // n] for i in range(n)]
            images = tuple(open_image(inside(root, sample.image)) for sample in chosen)
            return Photos(tuple(sample.id for sample in chosen), images, "of the validation data")
        except (InputError, OSError) as error:
            log.info("the training's validation photos cannot be read, random patterns take their place: %s", error)
    colors = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    patterns = tuple(Image.fromarray(squares).resize((336, 336), Image.Resampling.BICUBIC) for squares in colors)
    return Photos(tuple(f"pattern {i}" for i in range(count)), patterns, "random patterns, no photos")


def ask(vlm: VLM, photos: Photos) -> Answers:
    """Greedy answers to the checkpoint's question, and every breed's label log-likelihood."""
    scorer = LabelScorer(vlm, vlm.breeds, vlm.question, spelled=vlm.spelled)
    texts, scores = [], []
    for first in range(0, len(photos.images), BATCH):
        images = photos.images[first : first + BATCH]
        texts += generate_free(vlm, images, vlm.question)
        scores.append(scorer.score(images))
    return Answers(tuple(texts), np.concatenate(scores))


def compare(original: Answers, export: Answers, breeds: Sequence[str], photos: Photos, limit: float) -> Verification:
    """Agreement of two models; photos with another breed or text are listed with the original's lead over the next breed."""
    difference = np.abs(original.scores - export.scores).max(1)
    a, b = original.scores.argmax(1), export.scores.argmax(1)
    leads = np.diff(np.sort(original.scores)[:, -2:])[:, 0]
    same_text = np.array([x == y for x, y in zip(original.texts, export.texts, strict=True)])
    differing = tuple(
        f"{photos.names[i]}: {breeds[a[i]]} ({original.texts[i]!r}), exported {breeds[b[i]]} ({export.texts[i]!r}); lead "
        f"{leads[i]:.2g} nats, largest difference {difference[i]:.2g}"
        for i in np.flatnonzero((a != b) | ~same_text)
    )
    largest = float(difference.max()) if np.isfinite(difference).all() else float("inf")
    same = int((a == b).sum()), int(same_text.sum())
    return Verification(len(photos.names), photos.origin, *same, largest, limit, differing)
