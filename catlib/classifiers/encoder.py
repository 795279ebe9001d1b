"""Dual encoders and the VLM's own vision tower as feature extractors for zero-shot classification and linear probes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from transformers import AutoImageProcessor, AutoModel, AutoProcessor

from catlib.classifiers.base import about_model
from catlib.classifiers.predict import read_batches
from catlib.data.records import Sample
from catlib.errors import InputError
from catlib.progress import track
from catlib.vlm.checkpoint import model_folder
from catlib.vlm.families import PADDED_TEXT
from catlib.vlm.features import compute_features, projector_input
from catlib.vlm.models import VLM, pick_device, pick_dtype
from catlib.vlm.processors import first_line, from_files
from catlib.vlm.prompting import inference_inputs
from catlib.vlm.threads import fit_threads


class FeatureExtractor(ABC):
    """Photos to vectors by a frozen network; vectors of photos with an id are kept in memory for the next reader."""

    name: str
    kind: str = ""  # "clip" or "tower": how a saved probe finds its features again
    poolings: tuple[str, ...]  # the vectors it offers for a photo

    def __init__(self, image_processor: Any = None, device: torch.device | None = None) -> None:
        self._kept: dict[str, dict[str, np.ndarray]] = {}
        self.image_processor = image_processor  # without it every photo goes to `compute` as it is
        self.ahead = image_processor is not None and device is not None and device.type != "cpu"

    def prepare(self, image: Image) -> Any:
        """As `Classifier.prepare`: the image processor's tensors; on a CPU, which then has no time to spare, the photo itself."""
        return self.pixels([image]) if self.ahead else image

    def pixels(self, images: Sequence[Any]) -> dict[str, torch.Tensor]:
        """The image processor's tensors of photos, or of what `prepare` has made of each."""
        if isinstance(images[0], Mapping):
            return {name: torch.cat([one[name] for one in images]) for name in images[0]}
        return dict(self.image_processor(images=list(images), return_tensors="pt"))

    def features(self, images: Sequence[Image], ids: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """A float32 matrix (n, width) for each pooling. Photos whose id was seen before are not computed again."""
        if ids is None:
            return self.compute(images)
        if new := {key: image for key, image in zip(ids, images, strict=True) if key not in self._kept}:
            computed = self.compute(list(new.values()))
            for i, key in enumerate(new):
                self._kept[key] = {pooling: computed[pooling][i] for pooling in self.poolings}
        return {pooling: np.stack([self._kept[key][pooling] for key in ids]) for pooling in self.poolings}

    def of_samples(
        self, samples: Sequence[Sample], image_root: Path, name: str, batch_size: int = 16
    ) -> dict[str, np.ndarray]:
        """`features` of the samples' photos; `name` says in the progress bar what for."""
        parts: dict[str, list[np.ndarray]] = {pooling: [] for pooling in self.poolings}
        batches = read_batches(samples, image_root, batch_size, prepare=self.prepare)
        total = -(-len(samples) // batch_size)
        for chunk, images, _ in track(batches, f"{name} features", total=total, unit="batches"):
            for pooling, matrix in self.features(images, [sample.id for sample in chunk]).items():
                parts[pooling].append(matrix.astype(np.float32))
        return {pooling: np.concatenate(part) for pooling, part in parts.items()}

    @abstractmethod
    def compute(self, images: Sequence[Image]) -> dict[str, np.ndarray]:
        """The vectors of photos, without looking at what was kept."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """base_model, device and dtype for the sidecar."""


class ClipEncoder(FeatureExtractor):
    """A dual encoder of the CLIP family: photos and sentences to unit vectors of one space."""

    kind = "clip"

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        super().__init__(processor.image_processor, model.device)
        self.model, self.processor, self.name = model.eval(), processor, name
        fit_threads(getattr(model, "vision_model", model))
        self.poolings = ("image_embedding", "before_projection")[: 1 if self.projection is None else 2]

    @property
    def projection(self) -> np.ndarray | None:
        """The matrix (width, inner) that makes the embedding of what comes before it; None for a model without one (SigLIP)."""
        layer = getattr(self.model, "visual_projection", None)
        return None if layer is None else layer.weight.detach().float().cpu().numpy()

    @classmethod
    def load(cls, ref: str, device: str = "auto", dtype: str = "auto") -> "ClipEncoder":
        """A hub name or folder. Raises InputError when it is no model of this family or lacks its processor."""
        model, processor = _loaded(AutoProcessor, ref, f"CLIP model {ref!r}", device, dtype)
        if not all(hasattr(model, part) for part in ("get_image_features", "get_text_features", "logit_scale")):
            raise InputError(f"{ref!r} is a {type(model).__name__}, not a model of the CLIP family")
        if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
            raise InputError(f"{ref!r} lacks its processor (preprocessor_config.json and tokenizer files)")
        return cls(model, processor, ref)

    @property
    def logit_scale(self) -> float:
        """The factor between cosine and logit that the model was trained with."""
        return float(self.model.logit_scale.detach().float().exp())

    @torch.inference_mode()
    def compute(self, images: Sequence[Image]) -> dict[str, np.ndarray]:
        inputs = self.pixels(images)
        device, dtype = self.model.device, self.model.dtype
        inputs = {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in inputs.items()}
        if len(self.poolings) == 1:
            return {self.poolings[0]: _unit(self.model.get_image_features(**inputs).pooler_output)}
        before = self.model.vision_model(**inputs).pooler_output
        found = (_unit(self.model.visual_projection(before)), before.float().cpu().numpy())
        return dict(zip(self.poolings, found, strict=True))

    @torch.inference_mode()
    def text_features(self, sentences: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """Unit vectors (n, width) of sentences. Some encoders learned from lower-case texts padded to full length, and attend to that."""
        limit = self.model.config.get_text_config().max_position_embeddings
        padded = self.model.config.model_type in PADDED_TEXT
        parts = []
        for first in range(0, len(sentences), batch_size):
            part = [text.lower() if padded else text for text in sentences[first : first + batch_size]]
            tokens = self.processor.tokenizer(
                part, padding="max_length" if padded else True, truncation=True, max_length=limit, return_tensors="pt"
            )
            names = ("input_ids",) if padded else ("input_ids", "attention_mask")
            accepted = {name: tokens[name].to(self.model.device) for name in names if name in tokens}
            parts.append(_unit(self.model.get_text_features(**accepted).pooler_output))
        return np.concatenate(parts)

    def describe(self) -> dict[str, Any]:
        return about_model(self.model, self.name)


class DinoEncoder(FeatureExtractor):
    """A DINOv2 (or another vision transformer with a class token in front): its last layer's class token and mean of the patches, as
    in its own linear evaluation (Oquab et al. 2023, arXiv 2304.07193)."""

    kind = "dino"
    poolings = ("cls", "cls+mean")

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        super().__init__(processor, model.device)
        self.model, self.processor, self.name = model.eval(), processor, name
        self.first = 1 + getattr(model.config, "num_register_tokens", 0)  # patches come after class token and registers

    @classmethod
    def load(cls, ref: str, device: str = "auto", dtype: str = "auto") -> "DinoEncoder":
        """A hub name or folder. Raises InputError when it is no vision model or lacks its preprocessor_config.json."""
        model, processor = _loaded(AutoImageProcessor, ref, f"dino_model {ref!r}", device, dtype)
        if "dino" not in model.config.model_type:
            raise InputError(f"dino_model {ref!r} is a {type(model).__name__}, not a DINOv2")
        return cls(model, processor, ref)

    @torch.inference_mode()
    def compute(self, images: Sequence[Image]) -> dict[str, np.ndarray]:
        pixels = self.pixels(images)["pixel_values"]
        hidden = self.model(pixels.to(self.model.device, self.model.dtype)).last_hidden_state.float()
        cls, mean = hidden[:, 0].cpu().numpy(), hidden[:, self.first :].mean(1).cpu().numpy()
        return {"cls": cls, "cls+mean": np.concatenate([cls, mean], axis=1)}

    def describe(self) -> dict[str, Any]:
        return about_model(self.model, self.name)


class TowerEncoder(FeatureExtractor):
    """The VLM's frozen vision tower: what the language model is given to look at, before the projector.

    `mean`: the mean of the vectors that the projector reads; `cls`: the class token of the same layer, where LLaVA's
    tower has one (the projector never sees it, but it is the tower's own summary of a photo); `cls+mean`: both, as in
    DINOv2's linear evaluation (Oquab et al. 2023, arXiv 2304.07193).
    """

    kind = "tower"

    def __init__(self, vlm: VLM) -> None:
        chosen = getattr(vlm.base.config, "vision_feature_select_strategy", None)
        self.has_cls = vlm.family.caches_features and chosen == "default"
        super().__init__(vlm.processor.image_processor if self.has_cls else None, vlm.device)
        self.vlm, self.name = vlm, f"tower of {vlm.name}"
        self.tower = vlm.tower
        self.poolings = ("cls", "mean", "cls+mean") if self.has_cls else ("mean",)

    @torch.inference_mode()
    def compute(self, images: Sequence[Image]) -> dict[str, np.ndarray]:
        if not self.has_cls:
            means = [vectors.float().mean(0) for vectors in self._projector_inputs(images)]
            return {"mean": torch.stack(means).cpu().numpy()}
        pixels = self.pixels(images)["pixel_values"]
        parameter = next(self.tower.parameters())
        output = self.tower(pixels.to(parameter.device, parameter.dtype), output_hidden_states=True, return_dict=True)
        layers = self.vlm.base.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        hidden = torch.cat([output.hidden_states[layer] for layer in layers], dim=-1).float()
        cls, mean = hidden[:, 0].cpu().numpy(), hidden[:, 1:].mean(1).cpu().numpy()
        return {"cls": cls, "mean": mean, "cls+mean": np.concatenate([cls, mean], axis=1)}

    def _projector_inputs(self, images: Sequence[Image]) -> list[torch.Tensor]:
        """(tokens, width) for each photo, all its tiles together."""
        if self.vlm.family.caches_features:
            return [features.vectors for features in compute_features(self.vlm, images)]
        each = (inference_inputs(self.vlm, [image], ["?"]) for image in images)  # tiled, photos differ in their tiles
        return [projector_input(self.vlm, partial(self.vlm.base, **inputs)) for inputs in each]

    def describe(self) -> dict[str, Any]:
        return about_model(self.tower, self.vlm.name)


def _loaded(processors: Any, ref: str, what: str, device: str, dtype: str) -> tuple[Any, Any]:
    """Model and processor of a hub name or folder on the device. Raises InputError that calls it `what`."""
    where, found = pick_device(device), model_folder(ref) or ref
    try:
        model = from_files(AutoModel, found, dtype=encoder_dtype(dtype, where))
        return model.to(where), from_files(processors, found)
    except (ImportError, OSError, ValueError) as error:
        raise InputError(f"{what} cannot be loaded: {first_line(error)}") from None


def encoder_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is the GPU's own 16 bits on CUDA, else float32: half precision is slow on most CPUs, and these models are small."""
    return torch.float32 if dtype == "auto" and device.type != "cuda" else pick_dtype(dtype, device)


def _unit(vectors: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()
