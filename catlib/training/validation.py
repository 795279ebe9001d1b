"""How good the model is after an epoch: loss on all validation samples, breed accuracy on a fixed small part of them."""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from sklearn.metrics import f1_score
from torch.nn.utils.rnn import pad_sequence

from catlib.data.images import inside, open_image
from catlib.data.records import Sample
from catlib.training.lanes import Lanes
from catlib.training.loss import AnswerLoss
from catlib.training.order import share
from catlib.training.run import Run
from catlib.vlm.batches import Collator
from catlib.vlm.features import embedded
from catlib.vlm.scoring import LabelScorer


@torch.no_grad()
def validation_loss(
    loss: AnswerLoss, collate: Collator, samples: Sequence[Sample], batch_size: int, lanes: Lanes | None = None
) -> float:
    """Mean cross entropy of the answers' tokens, in nats; processes share the samples, lanes each batch."""
    lanes, processes = lanes or Lanes(1), PartialState()
    device = collate.vlm.base.device
    total = tokens = 0.0
    for batch, weight in share(samples, batch_size, processes.process_index, processes.num_processes):
        for summed, n in lanes.run(loss, [collate(part).to(device) for part in lanes.cut(batch)]):
            total, tokens = total + weight * float(summed), tokens + weight * n
    if processes.num_processes > 1:
        total, tokens = reduce(torch.tensor([total, tokens], dtype=torch.float64, device=device)).tolist()
    return total / tokens


WATCHED = ("accuracy", "priority_f1", "old_accuracy")


class Watch:
    """Closed-set accuracy and priority macro-F1 on a fixed part of the validation photos."""

    def __init__(self, run: Run, samples: Sequence[Sample]) -> None:
        self.run, self.samples, data = run, list(samples), run.data
        self.priority = [b for b in data.priority if any(s.breed == b for s in samples)]
        self.scorer = LabelScorer(run.vlm, data.breeds, data.question, spelled=data.spelled)
        self.old = [
            i for i, s in enumerate(samples) if s.breed in data.old_breeds
        ]  # learned before: are they forgotten?

    @torch.inference_mode()
    def measure(self, batch_size: int) -> dict[str, float]:
        """Of WATCHED: the second only with photos of a priority breed, the third with photos of breeds learned before."""
        parts = [self.samples[i : i + batch_size] for i in range(0, len(self.samples), batch_size)]
        predicted = np.array([self.scorer.breeds[j] for part in parts for j in self._scores(part).argmax(1)])
        true = np.array([s.breed for s in self.samples])
        figures = {"accuracy": float(np.mean(predicted == true))}
        if self.old:
            figures["old_accuracy"] = float(np.mean((predicted == true)[self.old]))
        if self.priority:
            f1 = f1_score(true, predicted, labels=self.priority, average="macro", zero_division=0)
            figures["priority_f1"] = float(f1)
        return figures

    def _scores(self, samples: Sequence[Sample]) -> np.ndarray:
        vlm, collate = self.run.vlm, self.run.val_collate
        cached = [collate.features.get(s.metadata["sha256"]) for s in samples] if collate.features else []
        found = [one for one in cached if one is not None]
        prompts = [torch.tensor(collate.prompt_ids(self.scorer.question, one)) for one in found]
        length = max(map(len, prompts), default=0)
        if len(found) < len(samples) or not self.scorer.room(length):
            return self.scorer.score([open_image(inside(collate.image_root, s.image)) for s in samples])
        ids = pad_sequence(prompts, True, collate.pad, "left").to(vlm.device)
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, 0, "left").to(vlm.device)
        embeds = embedded(vlm, ids, torch.cat([one.vectors for one in found]))
        return self.scorer.score_inputs({"inputs_embeds": embeds, "attention_mask": mask})
