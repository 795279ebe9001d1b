"""The training loss: cross entropy of the answer's tokens, with logits computed only where the answer stands."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from catlib.vlm.batches import Batch, answer_positions
from catlib.vlm.features import embedded, tower_vectors
from catlib.vlm.models import VLM


class AnswerLoss(torch.nn.Module):
    """Maps a batch to (summed cross entropy, number of supervised tokens).

    A module of its own, so that one wrapper (accelerate's autocast, DDP) sees all of the model's work. A sum and not a mean, so
    that batches of unequal numbers of tokens add up to the right gradient under accumulation and over processes. A 7B model has
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
        inputs: dict[str, Any] = dict(batch.pixels or {})
        if vlm.family.caches_features:
            vectors = tower_vectors(vlm, inputs) if batch.features is None else batch.features
            inputs = {"inputs_embeds": embedded(vlm, batch.input_ids, vectors, batch.image_at)}
        else:
            inputs["input_ids"] = batch.input_ids
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(vlm.dtype)
        # Padding stands on the right, where a causal model never looks from a real token: without a mask the attention
        # kernel takes its fast way. Models that work out positions from the mask still get it where there is padding.
        needed = (batch.padded and not vlm.family.caches_features) or "token_type_ids" in inputs
        mask = batch.attention_mask if needed else None
        hidden = base.model(**inputs, attention_mask=mask, use_cache=False).last_hidden_state.flatten(0, 1)
        at = answer_positions(batch.labels) if batch.answer_at is None else batch.answer_at
        targets = batch.labels.flatten()[at]
        logits = vlm.logits(hidden)[at - 1] if self.full_logits else vlm.logits(hidden[at - 1])
        return cross_entropy(logits, targets, reduction="sum"), len(at)
