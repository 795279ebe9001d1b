"""What a training run works with, put together and checked before the first step: data, model, features, places."""

import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image, ImageEnhance, ImageOps

from catlib.breeds import PRIORITY_BREEDS
from catlib.data.conversations import questions_of, spelled_answers
from catlib.data.images import inside
from catlib.data.records import Sample, image_root_of, read_samples
from catlib.errors import InputError
from catlib.files import digest_of
from catlib.parsing import check_names
from catlib.paths import resolve
from catlib.progress import track
from catlib.runs import WEIGHTS, read_training
from catlib.settings import TrainSettings, split_list
from catlib.training.kernels import fuse
from catlib.training.lora import add_lora, recompute
from catlib.training.memory_check import check_fits
from catlib.training.sharding import Sharding, cut_layers
from catlib.vlm.adapters import base_of
from catlib.vlm.batches import Collator
from catlib.vlm.checkpoint import find_checkpoint, open_vlm
from catlib.vlm.features import FrozenFeatures, worth_caching
from catlib.vlm.models import VLM, pick_device, pick_dtype

log = logging.getLogger(__name__)
FEATURE_CACHE = "outputs/cache/features"


class TrainingData:
    """Both JSONL files, read and validated: samples with their photos' digests, and what they say about breeds.

    Raises InputError; a breed that only validation has is one.
    """

    def __init__(self, settings: TrainSettings) -> None:
        paths = [resolve(settings.train_data), resolve(settings.val_data)]
        roots = [image_root_of(path) for path in paths]
        self.train, self.val = (
            tuple(_with_digests(read_samples(path, root), root)) for path, root in zip(paths, roots, strict=True)
        )
        self.parts = ((roots[1], self.val), (roots[0], self.train))
        self.lineage: dict[
            str, Any
        ] = {}  # the adapter that training goes on from: folder, digest, breeds, its own lineage
        if settings.init_adapter:
            adapter = resolve(settings.init_adapter)
            base_of(adapter)  # raises where no adapter is
            earlier, weights = read_training(adapter), digest_of(adapter / WEIGHTS)
            if (pool := earlier.get("settings", {}).get("image_pool", 1)) != settings.image_pool:
                raise InputError(
                    f"init_adapter {settings.init_adapter!r} was trained with image_pool {pool}; set the same"
                )
            self.lineage = {"folder": settings.init_adapter, "sha256": weights}
            self.lineage |= {key: earlier[key] for key in ("breeds", "lineage") if key in earlier}
        self.breeds = tuple(sorted({s.breed for s in self.train} | set(self.lineage.get("breeds", []))))
        check_names(self.breeds)
        if unknown := sorted({s.breed for s in self.val} - set(self.breeds)):
            raise InputError(f"{paths[1]}: validation has breeds without a training photo: {', '.join(unknown)}")
        if both := {s.metadata["sha256"] for s in self.train} & {s.metadata["sha256"] for s in self.val}:
            stand = f"{len(both)} photos stand in {paths[0].name} as well"
            raise InputError(f"{paths[1]}: {stand}; the validation loss would lie")
        named = split_list(settings.priority_breeds)
        if absent := [breed for breed in named if breed not in self.breeds]:
            has = f"the data has {', '.join(self.breeds)}"
            raise InputError(f"priority_breeds: no training photo of {', '.join(absent)}; {has}")
        self.priority = tuple(named or [breed for breed in PRIORITY_BREEDS if breed in self.breeds])
        self.digests = {path.name: digest_of(path) for path in paths}
        # the checkpoint's question, how many validation samples ask another one, and how answers begin that are more than a name
        self.question, self.others = questions_of(self.val)
        self.spelled = spelled_answers(self.val)
        if self.others:
            asked = f"{self.others} of {len(self.val)} validation samples ask something else than {self.question!r}"
            log.warning("%s, which is the checkpoint's question", asked)


class Augment:
    """A different, reproducible change each time a sample is seen: drawn from seed, sample and how often it was seen."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.start_epoch(0)

    def start_epoch(self, epoch: int, seen: Iterable[Sample] = ()) -> None:
        """Draws depend on the epoch and on the turn within it; `seen`: the samples before, where training is resumed."""
        self.epoch, self._seen = epoch, Counter(sample.id for sample in seen)

    def __call__(self, image: Image.Image, sample_id: str) -> Image.Image:
        """Crop 80-100 % of each side, flip half of the time, brightness, contrast and colour by up to 15 %."""
        draw = random.Random(f"{self.seed}/{self.epoch}/{sample_id}/{self._seen[sample_id]}")
        self._seen[sample_id] += 1
        width, height = (max(1, round(side * draw.uniform(0.8, 1.0))) for side in image.size)
        left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height))
        if draw.random() < 0.5:
            image = ImageOps.mirror(image)
        for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhancer(image).enhance(draw.uniform(0.85, 1.15))
        return image


class Run:
    """What the loop needs: the model with what is trained, its features cached, each process with a share of the photos."""

    def __init__(self, settings: TrainSettings, data: TrainingData, sharding: Sharding = "") -> None:
        checkpoint = find_checkpoint(settings.base_model)
        if checkpoint.adapter is not None:
            raise InputError(f"base_model {settings.base_model!r} is an adapter; name the model that is to be trained")
        checkpoint = replace(checkpoint, max_pixels=settings.max_pixels, image_pool=settings.image_pool)
        photos = [(sample, inside(root, sample.image)) for root, part in data.parts for sample in part]
        need = check_fits(settings, checkpoint.base, photos)
        self.micro_batch = settings.batch_size if need is None else need.batch_size  # photos in a forward pass
        recomputes = settings.recomputes if need is None else need.gradient_checkpointing
        settings = replace(settings, gradient_checkpointing=str(recomputes).lower())
        dtype = str(pick_dtype(settings.dtype, pick_device(settings.device))).removeprefix("torch.")
        precision = "4-bit" if settings.mode == "qlora" else dtype
        vlm = open_vlm(checkpoint, device=settings.device, precision=precision, attention=settings.attn_implementation)
        add_lora(vlm, settings)
        log.info("%d layers use gradients written by hand", fuse(vlm.model))
        if recomputes:
            recompute(vlm.base)
        features = _features(settings, vlm, data)
        if sharding:
            cut_layers(vlm, sharding, PartialState().num_processes)
        self.settings, self.data, self.vlm = settings, data, vlm
        self.augment = Augment(settings.training_seed) if settings.augment else None
        if self.augment is not None:
            log.info("augmentation is on: every photo goes through the tower each time, the feature cache is not used")
        (val_root, _), (root, _) = data.parts
        self.collate = Collator(vlm, root, features, self.augment, settings.num_workers)
        self.val_collate = Collator(vlm, val_root, features)


def _features(settings: TrainSettings, vlm: VLM, data: TrainingData) -> FrozenFeatures | None:
    if not worth_caching(settings, vlm.base, vlm.family):
        log.info("every photo goes through the vision tower each time: its features are not cached")
        return None
    processes = PartialState()
    cache = FrozenFeatures(vlm, resolve(FEATURE_CACHE), settings.cache_limit_gb / processes.num_processes)
    parts = data.parts[:1] if settings.augment else data.parts
    photos = [(inside(root, s.image), s.metadata["sha256"]) for root, samples in parts for s in samples]
    cache.fill(photos[processes.process_index :: processes.num_processes], settings.num_workers)
    processes.wait_for_everyone()
    return cache


def _with_digests(samples: Sequence[Sample], root: Path) -> list[Sample]:
    """Samples with the SHA-256 of their photos' bytes. Raises InputError where the metadata claims another one."""

    def digested(sample: Sample) -> Sample:
        path = inside(root, sample.image)
        digest, claimed = digest_of(path), str(sample.metadata.get("sha256") or "").lower()
        if claimed != digest and re.fullmatch("[0-9a-f]{64}", claimed):  # some write another name of the photo there
            raise InputError(
                f"{path}: its bytes are not those of sample {sample.id!r} (SHA-256 {digest[:12]}, metadata.sha256 {claimed[:12]}): "
                "was the photo changed after the split? `catlib data check` lists all, `catlib data` makes the split anew"
            )
        return replace(sample, metadata={**sample.metadata, "sha256": digest})

    with ThreadPoolExecutor(4) as pool:
        return list(track(pool.map(digested, samples), "digests of the photos", total=len(samples)))
