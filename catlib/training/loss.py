"""The loss, computed only where an answer stands, and how good a model is after an epoch: loss and breed accuracy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from sklearn.metrics import f1_score
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from catlib.data.images import inside, open_image
from catlib.data.records import Sample
from catlib.training.arguments import own_autocast
from catlib.training.lanes import Lanes
from catlib.training.order import share
from catlib.training.run import Run
from catlib.vlm.batches import Batch, Collator, answer_positions
from catlib.vlm.features import embedded, tower_vectors
from catlib.vlm.models import VLM
from catlib.vlm.scoring import LabelScorer


class AnswerLoss(torch.nn.Module):
    """Maps a batch to (summed cross entropy, number of supervised tokens).

    A module of its own, so that one wrapper (accelerate's autocast, DDP) sees all of the model's work. A sum, so that
    batches of unequal numbers of tokens add up to the right gradient. A 7B model has 32,064 logits for each of ~600
    positions; an answer has about five.
    """

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.model = vlm.model
        self._vlm = [vlm]  # in a list, so that it is no submodule
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        # DDP would send the whole frozen base to every process, which has read it from the same files.
        self._ddp_params_and_buffers_to_ignore = [*frozen, *(name for name, _ in self.named_buffers())]

    def train(self, mode: bool = True) -> "AnswerLoss":
        """The frozen tower stays as it answers: no dropout in it, in whatever mode the rest is."""
        super().train(mode)
        self._vlm[0].tower.eval()
        return self

    def forward(self, batch: Batch) -> tuple[torch.Tensor, int]:
        (vlm,) = self._vlm
        with own_autocast(vlm):
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
            hidden = vlm.base.model(**inputs, attention_mask=mask, use_cache=False).last_hidden_state.flatten(0, 1)
            at = answer_positions(batch.labels) if batch.answer_at is None else batch.answer_at
            return cross_entropy(vlm.logits(hidden[at - 1]), batch.labels.flatten()[at], reduction="sum"), len(at)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """From DeepSpeed's saves, which hold what is trained and no more."""
        return super().load_state_dict(state_dict, False, assign)


@torch.no_grad()
def validation_loss(
    loss: AnswerLoss, collate: Collator, samples: Sequence[Sample], batch_size: int, lanes: Lanes
) -> float:
    """Mean cross entropy of the answers' tokens, in nats; processes share the samples, lanes each batch."""
    processes, device = PartialState(), collate.vlm.device
    total = tokens = 0.0
    for batch, weight in share(samples, batch_size, processes.process_index, processes.num_processes):
        for summed, n in lanes.run(loss, [collate(part).to(device) for part in lanes.cut(batch)]):
            total, tokens = total + weight * float(summed), tokens + weight * n
    if processes.num_processes > 1:
        total, tokens = reduce(torch.tensor([total, tokens], dtype=torch.float64, device=device)).tolist()
    return total / tokens


class Watch:
    """Closed-set accuracy and priority macro-F1 on a fixed part of the validation photos."""

    def __init__(self, run: Run, samples: Sequence[Sample]) -> None:
        self.run, self.samples, data = run, list(samples), run.data
        self.priority = [b for b in data.priority if any(s.breed == b for s in samples)]
        self.scorer = LabelScorer(run.vlm, data.breeds, data.question, spelled=data.spelled)
        learned = data.lineage.get("breeds", ())  # before this training: are they forgotten?
        self.old = [i for i, sample in enumerate(samples) if sample.breed in learned]

    @torch.inference_mode()
    def measure(self, batch_size: int) -> dict[str, float]:
        """`accuracy`, with photos of a priority breed `priority_f1`, with photos of breeds learned before `old_accuracy`."""
        parts = [self.samples[i : i + batch_size] for i in range(0, len(self.samples), batch_size)]
        predicted = np.array([self.scorer.breeds[j] for part in parts for j in self._scores(part).argmax(1)])
        true = np.array([s.breed for s in self.samples])
        figures = {"accuracy": float(np.mean(predicted == true))}
        if self.priority:
            f1 = f1_score(true, predicted, labels=self.priority, average="macro", zero_division=0)
            figures["priority_f1"] = float(f1)
        if self.old:
            figures["old_accuracy"] = float(np.mean((predicted == true)[self.old]))
        return figures

    def _scores(self, samples: Sequence[Sample]) -> np.ndarray:
        vlm, collate = self.run.vlm, self.run.val_collate
        cached = [collate.features.get(s.metadata["sha256"]) for s in samples] if collate.features else []
        found = [one for one in cached if one is not None]
        prompts = [torch.tensor(collate.prompt_ids(self.scorer.question, one)) for one in found]
        if len(found) < len(samples) or not self.scorer.room(max(map(len, prompts), default=0)):
            return self.scorer.score([open_image(inside(collate.image_root, s.image)) for s in samples])
        ids = pad_sequence(prompts, True, collate.pad, "left").to(vlm.device)
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, 0, "left").to(vlm.device)
        embeds = embedded(vlm, ids, torch.cat([one.vectors for one in found]))
        return self.scorer.score_inputs({"inputs_embeds": embeds, "attention_mask": mask})
