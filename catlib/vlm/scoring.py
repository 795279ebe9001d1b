"""Closed-set scores: the log-likelihood of every breed's name after photo and question, in two forward passes.

The first pass reads photo and question once (prefill). The second reads all names at once, laid out as a token trie:
each token attends to the prompt and to its own ancestors only, through a 4D attention mask, at the position it would
have in its own sentence. The result equals one plain forward pass per name, at a fraction of its cost.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from catlib.errors import CatlibError, InputError
from catlib.vlm.families import ALONG_TEXT
from catlib.vlm.label_trie import TokenTrie, build_trie, split_labels
from catlib.vlm.models import VLM
from catlib.vlm.prompting import inference_inputs, label_tokens

log = logging.getLogger(__name__)
LOGITS_LIMIT = 2**27  # logits held at once: 512 MB in float32


class LabelScorer:
    """Scores a photo for every breed by log p(name, end token | photo, question), tokenized exactly as in training.

    `spelled`: the text that settles a breed for models that learned longer answers (see `label_tokens`).

    `mode`: "tree" is the trie in one pass; "padded" expands the cache to one row for each name and pads, for models
    whose attention takes no 4D mask (flash attention, sliding windows) or whose positions are no plain numbers; "auto" picks. Sums are independent of batch size and of the order of `breeds` up to rounding.
    """

    def __init__(
        self,
        vlm: VLM,
        breeds: Sequence[str],
        question: str,
        mode: str = "auto",
        spelled: Mapping[str, str] | None = None,
    ) -> None:
        self.vlm, self.breeds, self.question, self.spelled = vlm, tuple(breeds), question, dict(spelled or {})
        self.mode = mode if mode != "auto" else ("tree" if takes_tree_mask(vlm.base.config) else "padded")
        self.labels = [self.tokens(breed) for breed in self.breeds]
        same = {tuple(label): breed for label, breed in zip(self.labels, self.breeds, strict=True)}
        if len(same) != len(self.breeds):
            raise InputError("two breeds have the same tokens; breeds must differ in their names")
        self.counts = np.array([len(label) for label in self.labels])  # the end token included

    def tokens(self, breed: str, question: str | None = None) -> list[int]:
        """What is scored for a breed after the scorer's question, or another."""
        return label_tokens(self.vlm, question or self.question, breed, self.spelled)

    @torch.inference_mode()
    def score(self, images: Sequence[Image], questions: Sequence[str] | None = None) -> np.ndarray:
        """Summed label log-likelihoods (n photos, breeds), natural log, float64.

        `questions` puts another question to each photo; the labels' tokens must be the same after all of them.
        """
        questions = [self.question] * len(images) if questions is None else list(questions)
        for question in set(questions) - {self.question}:
            if any(self.tokens(b, question) != t for b, t in zip(self.breeds, self.labels, strict=True)):
                raise CatlibError(
                    f"after the question {question!r} the breeds are tokenized differently; score it apart"
                )
        return self.score_inputs(inference_inputs(self.vlm, images, questions))

    @torch.inference_mode()
    def prior(self) -> np.ndarray:
        """The same scores for the question without a photo (breeds,): what the model says before it looks."""
        return self.score_inputs(inference_inputs(self.vlm, None, [self.question]))[0]

    def mean(self, sums: np.ndarray) -> np.ndarray:
        """Length-normalised scores: `sums` (n, breeds) divided by each label's number of tokens, end token included."""
        return sums / self.counts

    @torch.inference_mode()
    def score_inputs(self, inputs: dict[str, Any]) -> np.ndarray:
        """Scores (n, breeds) of inputs made elsewhere, padded on the left: the trainer's, from cached features."""
        first, cache, mask = self._prefill(inputs)
        # what each token may look at of the photo, where that is told token by token: the names see what the prompt's end does
        looks = {name: inputs[name][:, -1:] for name in ALONG_TEXT if name in inputs and inputs[name].dim() > 2}
        rows, vocabulary = first.shape
        bodies = [label[:-1] for label in self.labels]  # the end token is only predicted, never read
        scores = np.empty((rows, len(bodies)))
        run = self._tree if self.mode == "tree" else self._padded
        for group in split_labels(bodies, max(1, LOGITS_LIMIT // (rows * vocabulary))):
            scores[:, group] = run([self.labels[i] for i in group], first, cache, mask, looks).double().cpu().numpy()
        return scores

    def _prefill(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """Log-probabilities of the first answer token (n, vocabulary), the cache, and the prompt's mask (n, length)."""
        mask = inputs["attention_mask"]
        if self._plain_positions:
            inputs = {**inputs, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        # Not the model's own logits_to_keep=1: on a CPU its slice is multiplied as a batch, with a copy of the output layer a photo.
        output = self.vlm.base.model(**inputs, use_cache=True)
        logits = self.vlm.base.get_output_embeddings()(output.last_hidden_state[:, -1])
        return logits.float().log_softmax(-1), output.past_key_values, mask

    def _tree(
        self,
        labels: list[list[int]],
        first: torch.Tensor,
        cache: Any,
        mask: torch.Tensor,
        looks: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        trie = build_trie([label[:-1] for label in labels])
        device, rows = first.device, len(first)
        tokens = torch.as_tensor(trie.tokens, device=device).expand(rows, -1)
        depths = torch.as_tensor(trie.depths, device=device)
        output = self.vlm.base(
            input_ids=tokens,
            attention_mask=tree_mask(trie, mask, self.vlm.dtype),
            position_ids=mask.sum(-1, keepdim=True) - 1 + depths,
            past_key_values=cache,
            use_cache=True,
            **{name: look.expand(-1, len(trie), *look.shape[2:]) for name, look in looks.items()},
        )
        cache.crop(-len(trie))  # back to the prompt, for the next group of labels
        normaliser = output.logits.float().logsumexp(-1)  # (rows, nodes)
        sums = []
        for label, path in zip(labels, trie.paths, strict=True):
            score = first[:, label[0]]
            for node, following in zip(path, label[1:], strict=True):
                score = score + output.logits[:, node, following].float() - normaliser[:, node]
            sums.append(score)
        return torch.stack(sums, dim=1)

    def _padded(
        self,
        labels: list[list[int]],
        first: torch.Tensor,
        cache: Any,
        mask: torch.Tensor,
        looks: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        device, rows, longest = first.device, len(first), max(map(len, labels)) - 1
        tokens = torch.zeros(len(labels), longest, dtype=torch.long, device=device)
        real = torch.zeros(len(labels), longest, dtype=mask.dtype, device=device)
        for i, label in enumerate(labels):
            tokens[i, : len(label) - 1] = torch.tensor(label[:-1], device=device)
            real[i, : len(label) - 1] = 1
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(labels))
        start = mask.sum(-1, keepdim=True).repeat_interleave(len(labels), dim=0)
        positions = start + torch.arange(longest, device=device)
        if (
            not self._plain_positions
        ):  # after a photo the text goes on from the photo's longest side, the same on all three axes
            shift = self.vlm.base.model.rope_deltas
            positions = (
                positions if shift is None else positions + shift.repeat_interleave(len(labels), dim=0).to(device)
            )
            positions = positions.expand(3, -1, -1)
        output = self.vlm.base(
            input_ids=tokens.repeat(rows, 1),
            attention_mask=torch.cat([mask.repeat_interleave(len(labels), dim=0), real.repeat(rows, 1)], dim=1),
            past_key_values=cache,
            position_ids=positions,
            use_cache=True,
            **{
                name: look.repeat_interleave(len(labels), dim=0).expand(-1, longest, *look.shape[2:])
                for name, look in looks.items()
            },
        )
        following = torch.tensor([label[1:] + [0] * (longest + 1 - len(label)) for label in labels], device=device)
        chosen = output.logits.float().log_softmax(-1).gather(-1, following.repeat(rows, 1)[..., None])[..., 0]
        sums = (chosen * real.repeat(rows, 1)).sum(-1).reshape(rows, len(labels))
        return sums + first[:, [label[0] for label in labels]]

    @property
    def _plain_positions(self) -> bool:
        return not _has_multimodal_positions(self.vlm.base.config)


def tree_mask(trie: TokenTrie, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The additive 4D mask (n, 1, nodes, length + nodes): 0 where a node may look, the lowest number elsewhere.

    A node sees the prompt's real tokens (`mask`, (n, length)), its ancestors and itself.
    """
    rows, length = mask.shape
    seen = torch.cat(
        [
            mask.bool()[:, None, :].expand(rows, len(trie), length),
            torch.as_tensor(trie.ancestors, device=mask.device).expand(rows, -1, -1),
        ],
        dim=-1,
    )
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def takes_tree_mask(config: Any) -> bool:
    """Whether the language model attends by a 4D mask: eager or sdpa attention, every layer over the whole sequence."""
    text = config.get_text_config()
    if getattr(
        text, "cross_attention_layers", None
    ):  # what the photo has in the cache could not be kept when it is cut back
        return False
    if getattr(text, "_attn_implementation", None) not in ("sdpa", "eager") or _has_multimodal_positions(config):
        return False
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        return set(kinds) <= {"full_attention"}
    return getattr(text, "sliding_window", None) is None


def _has_multimodal_positions(config: Any) -> bool:
    """Whether positions are triples (time, height, width), which the model itself must work out."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return "mrope_section" in rope
