"""How much memory a training run will need, computed before it: weights, adapters, optimizer, activations, logits, features.

Nothing is looked up in a table. The model is built without weights from its configuration, and what a step allocates is counted
on tensors without data (`catlib.training.memory_trace`).
"""

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig

from catlib.errors import CatlibError, InputError
from catlib.files import read_json
from catlib.paths import PACKAGE, resolve
from catlib.settings import TrainSettings
from catlib.training.lora import count_parameters, lora_config, peft_model
from catlib.training.memory_trace import Shape, quantizable, trace_step
from catlib.vlm.families import check_pool, family_of, find_family, image_token_of
from catlib.vlm.features import worth_caching
from catlib.vlm.models import empty_model, load_config
from catlib.vlm.processors import load_processor
from catlib.vlm.prompting import model_inputs, prompt_text
from catlib.vlm.scoring import LOGITS_LIMIT

CONFIGS = PACKAGE / "assets" / "configs"  # of a few hub models, so that no hub is asked
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits, 8-bit scales of 64 weights, floats of 256 scales (arXiv 2305.14314)
TEXT_TOKENS, ANSWER_TOKENS = 40, 8  # question with answer, and the answer; the breeds' names have 2 to 13 tokens
USUAL_PHOTOS = ((1024, 1024), (1600, 800), (800, 1600))  # width and height
BREEDS, NODES = 67, 5  # names that validation scores, and tokens of each that no other name shares
RESERVE = 0.05  # of the free memory that `auto` leaves
SLACK = 1.05  # the allocator's rounding and fragments
CPU_HEAP = 250_000_000  # bytes that the C library's heap keeps beside what tensors use (docs/memory-and-gpus.md)
GB = 1e9
# Dense bf16 products with float32 sums, FLOP/s, by the makers' data sheets.
CARDS = {"RTX 3090": 71e12, "RTX 4090": 165e12, "A100": 312e12, "H100": 989e12}
ASSUMED = 0.5  # of that rate
MEASURED = {"H100": 0.42}  # the plan's 7B model, LoRA r 32, 8 photos in a pass, 2026-11-26: 25.3 photos/s
FILLING = 4096  # tokens of a pass from which an H100 does no more with a larger one: 4, 8, 16 photos: 19.1, 25.3, 25.1 a second


class Estimate:
    """Bytes by cause for a batch of so many photos. `peak` is the largest of the run's phases, with 5 % for the allocator."""

    def __init__(self, of: "Footprint", batch: int) -> None:
        s, values, kept = of.settings, batch * of.size, of.step.kept(batch)
        drops = bool(s.lora_dropout) and s.mode != "projector"
        self.batch_size, self.gradient_checkpointing = batch, s.recomputes
        self.image_tokens = of.shape.image_tokens
        self.trainable_parameters, self.parameters, self.weights = of.trainable, of.parameters, of.weights
        # what is trained, in float32, and its copy in the dtype that is computed in
        self.adapters = (4 + (of.size if of.size < 4 else 0)) * of.trainable
        # without accumulation only what exceeds the activations: one comes as the other goes
        self.gradients = max(0, 4 * of.trainable - (kept if s.gradient_accumulation == 1 else 0))
        self.optimizer = 8 * of.trainable  # AdamW's two moments
        self.activations = kept  # what the forward pass keeps for the backward pass
        self.logits = of.step.logits(batch)
        self.features = values * of.tower_tokens * of.vision.hidden_size  # of the batch, by the tower
        # alive for a moment: one layer's recomputation, its gradients, its expanded 4-bit weight
        self.transient = of.step.transient(batch) + drops * values * of.tokens * of.text.intermediate_size
        # the tower at work: once before training, or in each step where its features are not cached
        self.tower = of.tower * (of.tower_photos or batch)
        # validation: the prompts' key-value cache and the logits of all breeds' names
        self.watching = of.watching(batch) if s.watch_photos else 0
        self.heap = of.heap  # on a CPU: freed memory that is not given back

    @property
    def phases(self) -> dict[str, int]:
        """Bytes at the peak of each phase: a training step, the vision tower, validation."""
        step = self.gradients + self.optimizer + self.activations + self.logits + self.features + self.transient
        watching = self.optimizer + self.watching
        phases = {"training step": step, "vision tower": self.tower, "validation": watching}
        held = self.weights + self.adapters
        return {phase: int(SLACK * (held + need)) + self.heap for phase, need in phases.items()}

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "phases": self.phases, "peak": self.peak}


class Footprint:
    """What settings need whatever the batch; `at` puts a batch in. Made once, since it runs the model's layers.

    `dtype` of the base: bfloat16 by default, unless the settings say float32. `photos`: of training and validation
    together, where there are few. Raises InputError when the model is not known or not supported.
    """

    def __init__(
        self,
        settings: TrainSettings,
        config: Any = None,
        shape: Shape | None = None,
        dtype: torch.dtype | None = None,
        breeds: int = BREEDS,
        photos: int | None = None,
        cpu: bool = False,
    ) -> None:
        config, quantized = config or model_config(settings.base_model), settings.mode == "qlora"
        if quantized or dtype is None:
            dtype = torch.float32 if settings.dtype == "float32" and not quantized else torch.bfloat16
        self.settings, self.breeds, self.size, self.heap = settings, breeds, dtype.itemsize, CPU_HEAP if cpu else 0
        self.shape = shape or usual_shape(config, settings)
        self.text, self.vision = config.get_text_config(), config.vision_config
        model = empty_model(config)
        family = family_of(model)
        linears = quantizable(model, family.language_model)
        four_bit = {f"{name}.weight" for name in linears} if quantized else set()
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self.parameters = sum(sizes.values())
        self.weights = int(sum((NF4_BYTES if name in four_bit else self.size) * n for name, n in sizes.items()))
        self.linear = sum(module.weight.numel() for module in linears.values())  # the language model's matrices
        model.requires_grad_(False)
        self.trainable, _ = count_parameters(peft_model(model, lora_config(model, settings, family), empty=True))
        # the usual ratio where none is stated
        inner = getattr(self.vision, "intermediate_size", None) or 4 * self.vision.hidden_size
        self.tower_tokens = self.shape.image_tokens * settings.image_pool**2
        self.tower = self.tower_tokens * (8 * self.vision.hidden_size + 2 * inner) * self.size  # for a photo
        cached = not settings.augment and worth_caching(settings, model, family)
        self.tower_photos = min(family.photos_at_once(config), photos or 16) if cached else 0  # 0: the batch's
        self.step = trace_step(config, settings, dtype, self.shape)

    @property
    def tokens(self) -> int:
        """Of a photo with question and answer."""
        return self.shape.image_tokens + self.shape.text_tokens

    def at(self, batch: int) -> Estimate:
        """The estimate for a batch of so many photos."""
        return Estimate(self, batch)

    def flops(self) -> float:
        """Operations that training one photo once needs: 4 a frozen weight and token, 6 a trained one, causal attention.

        With gradient checkpointing the forward pass comes on top; it is no need of the mathematics and not counted.
        """
        attention = 3.5 * 2.0 * self.tokens**2 * self.text.hidden_size * self.text.num_hidden_layers
        return 4.0 * self.linear * self.tokens + 6.0 * self.trainable * self.tokens + attention

    def watching(self, batch: int) -> int:
        """Closed-set validation: the cache of the batch's prompts, one layer at work, three copies of the names' logits."""
        text = self.text
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        logits = min(LOGITS_LIMIT, batch * self.breeds * NODES * text.vocab_size)
        cache = 2 * width * text.num_hidden_layers + 2 * text.intermediate_size
        return batch * self.tokens * self.size * cache + 3 * 4 * logits


def usual_shape(config: Any, settings: TrainSettings, image_tokens: int = 0) -> Shape:
    """A photo of this model with question and answer of the usual length; its processor is asked where the configuration
    does not tell. Raises InputError where neither does, or `image_pool` is not possible."""
    family, ref, pool = find_family(config), settings.base_model, settings.image_pool
    check_pool(config, pool)
    if not image_tokens and family is not None and family.image_tokens is not None:
        image_tokens = family.image_tokens(config, settings.max_pixels) // pool**2
    if not image_tokens:
        try:
            where = str(folder) if (folder := resolve(ref or config.name_or_path)).is_dir() else ref
            image_tokens = photo_tokens(load_processor(where, settings.max_pixels, pool), config, USUAL_PHOTOS)
        except CatlibError as error:
            raise InputError(
                f"how many tokens a photo of a {config.model_type} has cannot be told; say it with --image_tokens ({error})"
            ) from None
    return Shape(image_tokens, TEXT_TOKENS, ANSWER_TOKENS)


def photo_tokens(processor: Any, config: Any, sizes: Collection[tuple[int, int]]) -> int:
    """The most image tokens that the processor makes of photos of these (width, height): it is asked about the extreme ones."""
    areas, shapes = sorted(sizes, key=math.prod), sorted(sizes, key=lambda size: size[0] / size[1])
    square = min(sizes, key=lambda size: max(size) / min(size))
    token, text = image_token_of(config), prompt_text(processor, "?")
    return max(
        int((model_inputs(processor, [Image.new("RGB", size)], [text])["input_ids"] == token).sum())
        for size in {areas[0], areas[-1], shapes[0], shapes[-1], square}
    )


def largest_batch(footprint: Footprint, vram: float) -> int:
    """The largest batch (a power of two, 64 at most) whose estimate stays below `vram` bytes; 0 when not even 1 does."""
    return max((batch for batch in (1, 2, 4, 8, 16, 32, 64) if footprint.at(batch).peak <= vram), default=0)


def choose(
    settings: TrainSettings, of: Callable[[TrainSettings], Footprint], free: float, any_batch: bool = True
) -> Estimate:
    """The estimate of the way to train in `free` bytes: the settings', or what `gradient_checkpointing: auto` comes to.

    Without recomputation where batch_size fits so; then, with `any_batch`, as many photos in a pass as fill the device,
    or the most that fit; they divide the photos of an optimizer step. A part of the memory stays in reserve where it
    can. If nothing fits, the smallest need.
    """
    ways, sizes = [settings], [settings.batch_size]
    if settings.gradient_checkpointing == "auto":
        ways = [replace(settings, gradient_checkpointing=way) for way in ("false", "true")]
        step, enough = settings.batch_size * settings.gradient_accumulation, FILLING / of(ways[0]).tokens
        divisors = [n for n in range(1, step + 1) if step % n == 0]
        sizes = sorted(divisors, key=lambda n: n if n >= enough else 2 * step - n) if any_batch else sizes
    for share in (1 - RESERVE, 1.0):
        for way in ways:
            for n in sizes:
                if (way.recomputes or n >= settings.batch_size) and of(way).at(n).peak <= share * free:
                    return of(way).at(n)
    return of(ways[-1]).at(min(sizes))


def model_config(ref: str) -> Any:
    """A model's configuration: of a folder, of the few hub models whose shape is shipped with catlib, or from the hub."""
    folder, shipped = resolve(ref), CONFIGS / f"{ref.replace('/', '--')}.json"
    if folder.is_dir() or not shipped.is_file():
        return load_config(str(folder) if folder.is_dir() else ref)
    facts = read_json(shipped)
    return AutoConfig.for_model(facts.pop("model_type"), **facts)
