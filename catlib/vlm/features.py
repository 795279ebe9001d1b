"""What the frozen vision tower sees, computed once: the projector's input for each photo, kept on disk within a size limit."""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from catlib.data.images import open_image
from catlib.errors import CatlibError
from catlib.files import remove_leftovers, replacing
from catlib.progress import track
from catlib.settings import TrainSettings
from catlib.vlm.families import Family, image_token_of
from catlib.vlm.models import VLM, out_of_memory

log = logging.getLogger(__name__)
READ = ("vision_feature_layer", "vision_feature_select_strategy")  # of the configuration: what the projector is given
WORTH = 0.05  # a tower whose work is less of a training step is run each time


@dataclass(frozen=True)
class PhotoFeatures:
    """`vectors`: (image tokens, width) of the tower, before the projector. `block`: the token ids that stand for the
    photo in a prompt (they may hold row breaks as well, so there may be more ids than vectors).
    """

    vectors: torch.Tensor
    block: torch.Tensor  # int64 (length,)

    def digest(self, sha: str) -> torch.Tensor:
        """SHA-256 over the photo's and the tensors, by which damage on disk is told."""
        tensors = [tensor.cpu().contiguous() for tensor in (self.vectors, self.block)]
        digest = hashlib.sha256(f"{sha} {[(t.dtype, t.shape) for t in tensors]}".encode())
        for tensor in tensors:
            digest.update(tensor.view(torch.uint8).numpy().data)
        return torch.tensor(list(digest.digest()), dtype=torch.uint8)


class _Caught(Exception):
    """Ends the tower's forward pass at the projector's door."""


_waiting = threading.local()  # `here`: this thread wants what comes to the projector's door


class FrozenFeatures:
    """Features by photo, from disk where they were computed before.

    The key covers the tower's weights, the layer and tokens that are read, the preprocessing and the photo's bytes. Files are
    safetensors, written by renaming; each holds a digest of its own, and one that does not fit it is computed again.
    """

    def __init__(self, vlm: VLM, folder: Path, limit_gb: float) -> None:
        if not vlm.family.caches_features:
            raise CatlibError(f"features of a {type(vlm.base).__name__} cannot be cached")
        self.vlm, self.folder, self.limit = vlm, folder / model_key(vlm), limit_gb * 1e9
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, older_s=24 * 3600)  # other trainings may be writing
        self.size = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))

    def fill(self, photos: Sequence[tuple[Path, str]], workers: int = 4) -> int:
        """Compute what is missing of (path, sha256) pairs; returns how many photos had to be left out for lack of room:
        they are not even decoded, apart from those that were read ahead.
        """
        wanted = {sha: path for path, sha in photos}
        with ThreadPoolExecutor(max(1, workers)) as pool:
            whole = pool.map(lambda sha: self.get(sha) is not None, wanted)
            missing = [path for path, there in zip(wanted.values(), whole, strict=True) if not there]
        size, done = self.vlm.family.photos_at_once(self.vlm.base.config), 0
        chunks = [missing[i : i + size] for i in range(0, len(missing), size)] if self.size < self.limit else []
        for images in track(_decoded(chunks, workers), "vision features", total=len(chunks), unit="batches"):
            shas, decoded = zip(*images, strict=True)
            try:
                for sha, features in zip(shas, compute_features(self.vlm, decoded), strict=True):
                    self._write(sha, features)
                    done += 1
            except CatlibError as error:
                log.warning("%s; training goes on, the photos that are left go through the tower each time", error)
                self.limit = 0.0
            if self.size >= self.limit:
                break
        if left_out := len(missing) - done:
            full = f"the feature cache is full at {self.limit / 1e9:.1f} GB"
            log.warning("%s: %d photos go through the tower each time", full, left_out)
        return left_out

    def get(self, sha: str) -> PhotoFeatures | None:
        """Features of a photo by the SHA-256 of its bytes, or None when they are not on disk or the file is damaged."""
        try:
            # read whole: a mapped file that somebody cuts would end this process
            tensors = load((self.folder / f"{sha}.safetensors").read_bytes())
            found = PhotoFeatures(tensors["vectors"], tensors["block"])
            return found if torch.equal(tensors["sha256"], found.digest(sha)) else None
        except (OSError, SafetensorError, KeyError):
            return None

    def _write(self, sha: str, features: PhotoFeatures) -> None:
        with replacing(self.folder / f"{sha}.safetensors") as path:
            tensors = {"vectors": features.vectors.cpu().contiguous(), "block": features.block}
            save_file({**tensors, "sha256": features.digest(sha)}, path)
            self.size += path.stat().st_size


def worth_caching(settings: TrainSettings, model: torch.nn.Module, family: Family) -> bool:
    """Whether features are kept: where they can be and it is asked for, or with `auto` where the tower is some part of
    a step: its forward pass against the language model's and the backward pass through it, by their parameters.
    """

    def size(path: str) -> int:
        return sum(p.numel() * (1 + (p.dtype is torch.uint8)) for p in model.get_submodule(path).parameters())

    asked = str(settings.cache_features).lower()
    worth = asked == "auto" and size(family.tower) >= WORTH * 2 * size(family.language_model)
    return family.caches_features and (worth or asked == "true")


def compute_features(vlm: VLM, images: Sequence[Image]) -> list[PhotoFeatures]:
    """Run the frozen tower over photos, fewer at a time where the device's memory is full."""
    processor, photos = vlm.processor, [[image] for image in images]
    texts = [processor.image_token] * len(images)
    inputs = processor(images=photos, text=texts, padding=True, return_tensors="pt")
    try:
        vectors = tower_vectors(vlm, inputs)
    except (MemoryError, RuntimeError) as error:
        if len(images) == 1 or not out_of_memory(error):
            raise
        half = len(images) // 2
        return compute_features(vlm, images[:half]) + compute_features(vlm, images[half:])
    pooled = vlm.checkpoint.image_pool**2  # kept are the tower's own vectors and as many ids, whatever is made of them
    special = set(processor.tokenizer("").input_ids)  # begin-of-sequence, where the tokenizer writes one
    blocks, counts = [], []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        row = ids[mask.bool()]
        here, end = row == vlm.base.config.image_token_id, len(row)
        while int(row[end - 1]) in special:
            end -= 1
        blocks.append(row[int(here.nonzero()[0, 0]) : end].repeat(pooled))
        counts.append(int(here.sum()) * pooled)
    return [PhotoFeatures(v.clone(), b.clone()) for v, b in zip(vectors.split(counts), blocks, strict=True)]


@torch.no_grad()
def tower_vectors(vlm: VLM, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the frozen tower makes of a processor's tensors: (image tokens of all photos, width)."""
    base = vlm.base
    more: dict[str, Any] = {name: getattr(base.config, name) for name in READ}
    more |= {"image_sizes": inputs["image_sizes"].to(base.device)} if "image_sizes" in inputs else {}
    pixels = inputs["pixel_values"].to(base.device, next(vlm.tower.parameters()).dtype)
    return projector_input(vlm, partial(base.model.get_image_features, pixel_values=pixels, **more))


def projector_input(vlm: VLM, run: Callable[[], Any]) -> torch.Tensor:
    """What comes to the projector (tokens, width) when `run` calls the model, which ends there; threads may do so side by side."""
    if _door not in vlm.projector._forward_pre_hooks.values():
        vlm.projector.register_forward_pre_hook(_door, prepend=True, with_kwargs=True)
    _waiting.here = True
    try:
        run()
    except _Caught as caught:
        return caught.args[0].flatten(0, -2)
    finally:
        _waiting.here = False
    raise CatlibError(f"{type(vlm.base).__name__}: nothing came to the projector's door")


def _door(_: torch.nn.Module, args: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
    if getattr(_waiting, "here", False):
        raise _Caught((*args, *named.values())[0])


def pool_tokens(vlm: VLM) -> None:
    """Let the projector read means of `image_pool` x `image_pool` neighbours of a photo's square of vectors, whoever calls it."""
    vision, pool = vlm.base.config.vision_config, vlm.checkpoint.image_pool
    side = vision.image_size // vision.patch_size // pool

    def means(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        vectors = args[0]  # (photos, tokens, width), or those of all photos (tokens, width)
        squares = vectors.reshape(-1, side, pool, side, pool, vectors.shape[-1])
        return squares.mean((2, 4)).reshape(*vectors.shape[:-2], -1, vectors.shape[-1])

    vlm.projector.register_forward_pre_hook(means)


def embedded(vlm: VLM, ids: torch.Tensor, vectors: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
    """The embeddings of `ids` (rows, length) with the projected `vectors` in place of their image tokens; `at`:
    positions of these in the flattened `ids`: where they are known, a GPU is not waited for.
    """
    texts = vlm.base.get_input_embeddings()(ids)
    if at is None:
        at = (ids == image_token_of(vlm.base.config)).flatten().nonzero()[:, 0]
    projected = vlm.projector(vectors.to(texts.device, next(vlm.projector.parameters()).dtype)).to(texts.dtype)
    return texts.flatten(0, 1).index_copy(0, at, projected).view_as(texts)


def model_key(vlm: VLM) -> str:
    """A digest of the tower's weights, what is read of it, and the preprocessing."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vlm.tower.state_dict().items()):
        if "lora_" not in name:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    layer, select = (getattr(vlm.base.config, name) for name in READ)
    facts = {"layer": layer, "select": select, "preprocessing": vlm.processor.image_processor.to_dict()}
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:24]


def _decoded(chunks: list[list[Path]], workers: int) -> Iterator[list[tuple[str, Image]]]:
    """Digests and pixels of each chunk's photos; the next chunk is decoded while the tower works on this one."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        coming = (pool.map(_hashed, chunk) for chunk in chunks)
        ahead = next(coming, iter(()))
        for _ in chunks:
            now, ahead = ahead, next(coming, iter(()))
            yield list(now)


def _hashed(path: Path) -> tuple[str, Image]:
    """The SHA-256 of the bytes that are decoded, and the photo: whatever the metadata claims and whenever the file was changed."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        return digest, open_image(file)
