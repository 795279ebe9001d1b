"""What a training step allocates, found by running the real layers on tensors that have a shape and no data.

A slice of the model with one and with two layers goes forward and backward under torch's FakeTensorMode while every storage
is counted from its first sight to its end. Photos and layers enter as straight lines, so a slice says what the whole needs.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from bitsandbytes.functional import QuantState
from peft.tuners.lora import LoraLayer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig

from catlib.settings import TrainSettings, split_list
from catlib.training.kernels import constant_factors, fuse
from catlib.training.lora import lora_config, peft_model, recompute
from catlib.vlm.families import Family, family_of
from catlib.vlm.features import embedded
from catlib.vlm.models import empty_model


@dataclass(frozen=True)
class Shape:
    """Tokens of a photo, of question and answer, and of the answer alone.

    Texts are padded to the longest of a batch: `text_tokens` is the most. The output layer sees answers: `answer_tokens` is the mean.
    """

    image_tokens: int
    text_tokens: int
    answer_tokens: int


class StepTrace(NamedTuple):
    """Bytes of one forward and backward pass by batch, without weights, adapters, gradients and optimizer.

    What the layers keep for the backward pass, what output layer and loss keep, and how much more is alive at worst.
    """

    kept: Callable[[int], int]
    logits: Callable[[int], int]
    transient: Callable[[int], int]


def trace_step(config: Any, settings: TrainSettings, dtype: torch.dtype, shape: Shape) -> StepTrace:
    """The need of a step of the whole model, from slices of one and two layers and batches of one and two."""
    layers, at_batch = config.get_text_config().num_hidden_layers, []
    for batch in (1, 2):
        one, (kept, logits, transient) = (_trace(config, settings, dtype, shape, count, batch) for count in (1, 2))
        at_batch.append((one[0] + (layers - 1) * (kept - one[0]), logits, transient))

    def line(one: int, two: int) -> Callable[[int], int]:
        return lambda batch: max(0, 2 * one - two + (two - one) * batch)

    return StepTrace(*map(line, *at_batch))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, from their first sight until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, result)
        return result

    def ignore(self, tensors: Any) -> None:
        """Leave these tensors' storages out: they were there before."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()] = True

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = True
        self._add(storage.nbytes())
        weakref.finalize(storage, self._add, -storage.nbytes()).atexit = False

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def quantizable(model: torch.nn.Module, prefix: str) -> dict[str, torch.nn.Linear]:
    """The language model's linear layers by full path: what 4-bit loading quantizes."""
    return {n: m for n, m in model.named_modules() if n.startswith(f"{prefix}.") and isinstance(m, torch.nn.Linear)}


def _trace(
    config: Any, settings: TrainSettings, dtype: torch.dtype, shape: Shape, layers: int, batch: int
) -> tuple[int, int, int]:
    """(kept by the layers, by the output layer, transient) of a slice of the model."""
    model = empty_model(_config_with(config, layers)).to(dtype)
    family = family_of(model)
    quantized = settings.mode == "qlora" and not settings.use_dora
    linear = quantizable(model, family.language_model)
    # A slice need not have all kinds of layers. Dropout draws numbers, which data-free tensors cannot; what it keeps for a moment
    # is added by the caller.
    kinds = {name.rsplit(".", 1)[-1] for name in linear}
    targets = ",".join(name for name in split_list(settings.lora_targets) if name in kinds) or settings.lora_targets
    sliced = replace(settings, lora_dropout=0.0, lora_targets=targets)
    wrapped = peft_model(model, lora_config(model, sliced, family), empty=True)
    lora = [
        m.get_base_layer() for m in wrapped.modules() if isinstance(m, LoraLayer)
    ]  # these expand their weights here
    four_bit = {id(m.weight) for m in linear.values() if quantized and m in lora}
    fuse(wrapped)
    if settings.recomputes:
        recompute(model)
    wrapped.train()
    with FakeTensorMode():
        _make_fake(wrapped, four_bit)
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        for parameter in trained:  # as in the second of several accumulated passes
            parameter.grad = torch.zeros_like(parameter)
        tracker = LiveBytes()
        tracker.ignore([*wrapped.parameters(), *wrapped.buffers(), *(p.grad for p in trained)])
        low = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16)
        with constant_factors(wrapped) as held, tracker:
            tracker.ignore(held)
            with low:
                texts = _embeddings(model, family, dtype, shape, batch)
                hidden = model.get_submodule(family.language_model)(inputs_embeds=texts, use_cache=False)[0]
                del texts
                rows = hidden[:, -shape.answer_tokens - 1 : -1].clone().flatten(0, 1)
                of_layers = tracker.live - rows.nbytes - hidden.nbytes
                logits = model.get_output_embeddings()(rows).float()
                loss = cross_entropy(logits, torch.empty(len(rows), dtype=torch.long), reduction="sum")
                del rows, logits, hidden  # nothing needs them: the output layer is frozen
            kept = tracker.live
            loss.backward()
    return of_layers, kept - of_layers, tracker.peak - kept


def _embeddings(model: Any, family: Family, dtype: torch.dtype, shape: Shape, batch: int) -> torch.Tensor:
    """The texts' embeddings with the photos' in their places, as the training loss makes them."""
    length, projector = shape.image_tokens + shape.text_tokens, model.get_submodule(family.projector)
    if family.caches_features:
        tokens = batch * shape.image_tokens
        features = torch.empty(tokens, projector.linear_1.in_features, dtype=dtype)
        vlm: Any = SimpleNamespace(base=model, projector=projector)
        return embedded(vlm, torch.zeros(batch, length, dtype=torch.long), features, torch.arange(tokens))
    # a projector of its own kind: three copies of its output
    width, grad = model.get_input_embeddings().embedding_dim, any(p.requires_grad for p in projector.parameters())
    photos = torch.empty(3, batch, length, width, dtype=dtype, requires_grad=grad)
    return photos[0] + torch.empty(batch, length, width, dtype=dtype)


def _config_with(config: Any, layers: int) -> Any:
    """A copy of a configuration with fewer layers, of the tower those up to the one that is read."""
    small = AutoConfig.for_model(config.model_type, **{k: v for k, v in config.to_dict().items() if k != "model_type"})
    text = small.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    read = getattr(small, "vision_feature_layer", None) or getattr(small, "vision_feature_layers", None) or 1
    small.vision_config.num_hidden_layers = max(abs(layer) for layer in ([read] if isinstance(read, int) else read))
    return small


def _make_fake(model: Any, four_bit: set[int]) -> None:
    """Replace a meta model's tensors by fake CPU ones: only those go through autocast and the real attention kernel's rules.

    Weights with an id in `four_bit` become NF4 blocks as bitsandbytes lays them out, which each use expands for a moment.
    """
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in four_bit:
                module._parameters[name] = _four_bit(parameter.shape)
                module.compute_dtype = torch.bfloat16
            elif parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


def _four_bit(shape: torch.Size) -> torch.nn.Parameter:
    blocks, code = shape.numel() // 64, torch.empty(256)
    scales = QuantState(absmax=torch.empty(-(-blocks // 256)), blocksize=256, code=code, dtype=torch.float32)
    weight: Any = torch.nn.Parameter(torch.empty((shape.numel() + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        shape=shape,
        dtype=torch.bfloat16,
        code=code[:16].clone(),
        blocksize=64,
        quant_type="nf4",
        offset=torch.empty(()),
        state2=scales,
    )
    return weight
