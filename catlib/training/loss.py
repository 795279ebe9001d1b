"""The training loss: cross entropy of the answer's tokens, with logits computed only where the answer stands."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import BaseModelOutputWithPooling

from catlib.vlm.batches import IGNORED, Batch
from catlib.vlm.models import VLM


class AnswerLoss(torch.nn.Module):
    """Maps a batch to (summed cross entropy, number of supervised tokens).

    A module of its own, so that one wrapper (accelerate's autocast, DDP) sees all of the model's work. A sum and not a mean, so
    that batches of unequal numbers of tokens add up to the right gradient under accumulation and over processes. LLaVA-1.5 has
    32,064 logits for each of ~600 positions; an answer has about five.
    """

    def __init__(self, vlm: VLM, full_logits: bool = False) -> None:
        super().__init__()
        self.model = vlm.model
        self.full_logits = full_logits  # for the test that both ways give the same gradients
        self._vlm = [vlm]  # in a list, so that it is no submodule
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        # DDP would send the whole frozen base to every process, which has read it from the same files.
        self._ddp_params_and_buffers_to_ignore = [*frozen, *(name for name, _ in self.named_buffers())]

    def train(self, mode: bool = True) -> "AnswerLoss":
        """The frozen tower stays as it answers: no dropout in it, in whatever mode the rest is."""
        super().train(mode)
        vlm = self._vlm[0]
        vlm.base.get_submodule(vlm.family.tower).eval()
        return self

    def forward(self, batch: Batch) -> tuple[torch.Tensor, int]:
        vlm = self._vlm[0]
        base = vlm.base
        extra: dict[str, Any] = dict(batch.pixels or {})
        if batch.features is not None:
            projected = vlm.projector(batch.features.to(_dtype(vlm.projector)))
            output = BaseModelOutputWithPooling(pooler_output=[projected])  # type: ignore[arg-type]  # one entry an image
            extra = {"mm_encoder_outputs": {"image": output}}
        elif "pixel_values" in extra:
            extra["pixel_values"] = extra["pixel_values"].to(base.get_input_embeddings().weight.dtype)
        # Padding stands on the right, where a causal model never looks from a real token: without a mask the attention
        # kernel takes its fast way. Models that work out positions from the mask still get it.
        mask = None if batch.features is not None else batch.attention_mask
        outputs = base.model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False, **extra)
        hidden, targets = outputs.last_hidden_state[:, :-1], batch.labels[:, 1:]
        answer = targets != IGNORED
        logits = vlm.logits(hidden)[answer] if self.full_logits else vlm.logits(hidden[answer])
        return cross_entropy(logits, targets[answer], reduction="sum"), int(answer.sum())


def _dtype(module: torch.nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
