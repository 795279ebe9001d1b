"""How good the model is after an epoch: loss on all validation samples, breed accuracy on a fixed small part of them."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from sklearn.metrics import f1_score

from catlib.data.images import inside, open_image
from catlib.data.records import Sample
from catlib.training.lanes import Lanes
from catlib.training.loss import AnswerLoss
from catlib.training.order import share
from catlib.vlm.batches import Collator
from catlib.vlm.features import embedded
from catlib.vlm.models import VLM
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


class Watch:
    """Closed-set accuracy and priority macro-F1 on a fixed part of the validation photos."""

    def __init__(
        self,
        vlm: VLM,
        collate: Collator,
        samples: Sequence[Sample],
        breeds: Sequence[str],
        priority: Sequence[str],
        question: str,
        spelled: Mapping[str, str] | None = None,
    ) -> None:
        self.vlm, self.collate, self.samples, self.question = vlm, collate, list(samples), question
        self.breeds, self.priority = list(breeds), [b for b in priority if any(s.breed == b for s in samples)]
        self.scorer = LabelScorer(vlm, self.breeds, question, spelled=spelled)

    @torch.inference_mode()
    def measure(self, batch_size: int) -> dict[str, float]:
        """{"accuracy", "priority_f1"}; the second only when a priority breed is among the photos."""
        predicted = []
        for i in range(0, len(self.samples), batch_size):
            scores = self._scores(self.samples[i : i + batch_size])
            predicted += [self.breeds[j] for j in scores.argmax(1)]
        true = [s.breed for s in self.samples]
        figures = {"accuracy": float(np.mean([p == t for p, t in zip(predicted, true, strict=True)]))}
        if self.priority:
            figures["priority_f1"] = float(
                f1_score(true, predicted, labels=self.priority, average="macro", zero_division=0)
            )
        return figures

    def _scores(self, samples: Sequence[Sample]) -> np.ndarray:
        cache = self.collate.features
        cached = [cache.get(s.metadata["sha256"]) for s in samples] if cache else []
        found = [one for one in cached if one is not None]
        if len(found) < len(samples):
            return self.scorer.score([open_image(inside(self.collate.image_root, s.image)) for s in samples])
        device = self.vlm.base.device
        prompts = [torch.tensor(self.collate.prompt_ids(self.question, f)) for f in found]
        length = max(map(len, prompts))
        pad = self.vlm.processor.tokenizer.pad_token_id or 0
        ids = torch.stack([torch.nn.functional.pad(p, (length - len(p), 0), value=pad) for p in prompts]).to(device)
        mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (length - len(p), 0)) for p in prompts]).to(
            device
        )
        embeds = embedded(self.vlm, ids, torch.cat([f.vectors for f in found]))
        return self.scorer.score_inputs({"inputs_embeds": embeds, "attention_mask": mask})
