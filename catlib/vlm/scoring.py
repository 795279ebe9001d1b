"""Closed-set scores: the log-likelihood of every breed's name after photo and question, in two forward passes.

The first pass reads photo and question once (prefill). The second reads all names at once, laid out as a token trie:
each token attends to the prompt and to its own ancestors only, through a 4D attention mask, at the position it would
have in its own sentence. The result equals one plain forward pass per name, at a fraction of its cost.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from catlib.errors import CatlibError, InputError, NotFinite
from catlib.vlm.families import ALONG_TEXT, STATEFUL
from catlib.vlm.models import VLM
from catlib.vlm.prompting import continued, inference_inputs, label_tokens

LOGITS_LIMIT = 2**27  # logits held at once: 512 MB in float32
PLAIN_ROWS = 16  # names in one plain pass


class LabelScorer:
    """Scores a photo for every breed by log p(name, end token | photo, question), tokenized exactly as in training.

    `spelled`: see `label_tokens`. `mode`: "tree" is the trie in one pass; "plain" reads each name behind photo and
    question anew, for layers that keep no cache that could be shared, and where a sliding window has no room; "auto"
    picks. Sums are independent of batch size and of the order of `breeds` up to rounding.
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
        text = vlm.base.config.get_text_config()
        # without layer_types all layers are alike, and a window, where there is one, is of all
        kinds = set(getattr(text, "layer_types", None) or ["sliding_attention"])
        self.mode = mode if mode != "auto" else "plain" if kinds & STATEFUL else "tree"
        self.window = (getattr(text, "sliding_window", None) if "sliding_attention" in kinds else None) or math.inf
        # else the photo's part of the cache would be cut with the names'
        self.cuts_back = not getattr(text, "cross_attention_layers", None)
        # 3 where positions are triples (time, height, width), which the model itself must work out for a photo
        self.axes = 3 if "mrope_section" in (getattr(text, "rope_parameters", None) or {}) else 1
        self.labels = [self.tokens(breed) for breed in self.breeds]
        if len(set(map(tuple, self.labels))) != len(self.breeds):
            raise InputError("two breeds have the same tokens; breeds must differ in their names")
        self.counts = np.array([len(label) for label in self.labels])  # the end token included

    def tokens(self, breed: str, question: str = "") -> list[int]:
        """What is scored for a breed, of the list or not, after the scorer's question or another."""
        return label_tokens(self.vlm, question or self.question, breed, self.spelled)

    @torch.inference_mode()
    def score(self, images: Sequence[Image], questions: Sequence[str] | None = None) -> np.ndarray:
        """Summed label log-likelihoods (n photos, breeds), natural log, float64; `questions` puts another one to each
        photo; the labels' tokens must be the same after all of them, else CatlibError. Raises NotFinite, which names the
        photo, for scores that are no finite numbers.
        """
        questions = questions or [self.question] * len(images)
        for question in set(questions) - {self.question}:
            if any(self.tokens(b, question) != t for b, t in zip(self.breeds, self.labels, strict=True)):
                raise CatlibError(
                    f"after the question {question!r} the breeds are tokenized differently; score it apart"
                )
        if self.mode == "tree":
            inputs = inference_inputs(self.vlm, images, questions)
            if self.room(inputs["input_ids"].shape[1]):
                return self.score_inputs(inputs)
        each = (inference_inputs(self.vlm, [image], [q]) for image, q in zip(images, questions, strict=True))
        return _checked(torch.stack([self._plain(inputs) for inputs in each]))

    @torch.inference_mode()
    def prior(self) -> np.ndarray:
        """The same scores for the question without a photo (breeds,): what the model says before it looks."""
        return self.score_inputs(inference_inputs(self.vlm, None, [self.question]))[0]

    def mean(self, sums: np.ndarray) -> np.ndarray:
        """Length-normalised scores: `sums` (n, breeds) divided by each label's number of tokens, end token included."""
        return sums / self.counts

    @torch.inference_mode()
    def score_inputs(self, inputs: dict[str, Any]) -> np.ndarray:
        """Scores (n, breeds) of inputs made elsewhere, padded on the left: the trainer's, from cached features. A
        single photo, where there is no room for a tree behind it.
        """
        room = self.room(inputs["attention_mask"].shape[1])
        if not room:
            return _checked(self._plain(inputs)[None])
        first, cache, mask = self._prefill(inputs)
        # what each token may look at of the photo, where that is told token by token: the names see what the prompt's end does
        looks = {name: inputs[name][:, -1:] for name in ALONG_TEXT if name in inputs and inputs[name].dim() > 2}
        rows, vocabulary = first.shape
        scores = first.new_empty(rows, len(self.labels))
        groups = split_labels(self.labels, int(min(room, max(1, LOGITS_LIMIT // (rows * vocabulary)))))
        for number, group in enumerate(groups, start=1):
            own = cache if self.cuts_back or number == len(groups) else copy.deepcopy(cache)
            scores[:, group] = self._tree([self.labels[i] for i in group], first, own, mask, looks)
        return _checked(scores)

    def room(self, length: int) -> float:
        """Nodes of a tree that fit behind a prompt of this length into every layer's view; 0 where not even the longest name does."""
        room = self.window - 1 - length
        return room if self.mode == "tree" and room >= max(self.counts) else 0

    def _prefill(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """Log-probabilities of the first answer token (n, vocabulary), the cache, and the prompt's mask (n, length)."""
        mask = inputs["attention_mask"]
        if self.axes == 1:
            inputs = {**inputs, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        # Not the model's own logits_to_keep=1: on a CPU its slice is multiplied as a batch, with a copy of the output layer a photo.
        output = self.vlm.base.model(**inputs, use_cache=True)
        return self.vlm.logits(output.last_hidden_state[:, -1]).log_softmax(-1), output.past_key_values, mask

    def _tree(
        self,
        labels: list[list[int]],
        first: torch.Tensor,
        cache: Any,
        mask: torch.Tensor,
        looks: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        trie = build_trie(labels)
        base, device, rows, nodes = self.vlm.base, first.device, len(first), len(trie.tokens)
        positions = mask.sum(-1, keepdim=True) - 1 + torch.as_tensor(trie.depths, device=device)
        if self.axes > 1:  # after a photo the text goes on from the photo's longest side, the same on all axes
            shift = base.model.rope_deltas
            positions = (positions if shift is None else positions + shift.to(device)).expand(self.axes, -1, -1)
        with _masked_attention(base.config):
            output = base.model(
                input_ids=torch.as_tensor(trie.tokens, device=device).expand(rows, -1),
                attention_mask=tree_mask(trie, mask, self.vlm.dtype),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **{name: look.expand(-1, nodes, *look.shape[2:]) for name, look in looks.items()},
            )
        if self.cuts_back:
            cache.crop(-nodes)  # back to the prompt, for the next group of labels
        steps = self.vlm.logits(output.last_hidden_state)
        at = torch.as_tensor([node for path in trie.paths for node in path], device=device)
        following = torch.as_tensor([token for label in labels for token in label[1:]], device=device)
        owner = torch.as_tensor([i for i, path in enumerate(trie.paths) for _ in path], device=device)
        chosen = steps[:, at, following] - steps.logsumexp(-1)[:, at]
        return first[:, [label[0] for label in labels]].index_add(1, owner, chosen)

    def _plain(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Scores (breeds,) of one photo: every name behind photo and question, without a shared cache."""
        sums, device = [], self.vlm.device
        for start in range(0, len(self.labels), PLAIN_ROWS):
            labels = self.labels[start : start + PLAIN_ROWS]
            length = max(map(len, labels))
            # Padding stands behind a name, where nothing that counts looks.
            padded = torch.tensor([[*label, *label[-1:] * (length - len(label))] for label in labels], device=device)
            real = torch.arange(length, device=device) < torch.tensor([[len(label)] for label in labels], device=device)
            rows = {name: x.repeat(len(labels), *[1] * (x.dim() - 1)) for name, x in inputs.items()}
            output = self.vlm.base.model(**continued(self.vlm, rows, padded[:, :-1]), use_cache=False)
            steps = self.vlm.logits(output.last_hidden_state[:, -length:]).log_softmax(-1)
            sums.append((steps.gather(-1, padded[..., None])[..., 0] * real).sum(-1))
        return torch.cat(sums)


def _checked(scores: torch.Tensor) -> np.ndarray:
    found = scores.double().cpu().numpy()
    for row in np.flatnonzero(~np.isfinite(found).all(axis=1)):
        raise NotFinite(int(row))
    return found


@contextmanager
def _masked_attention(config: Any) -> Iterator[None]:
    """While open, the language model attends by a kernel that takes a 4D mask."""
    text = config.get_text_config()
    before = text._attn_implementation
    text._attn_implementation = before if before in ("sdpa", "eager") else "sdpa"
    try:
        yield
    finally:
        text._attn_implementation = before


@dataclass(frozen=True)
class TokenTrie:
    """Labels as a tree of tokens laid out flat, parents before children: what two names share is computed once.

    `tokens`, `depths`: (nodes,) the token of each node and its distance from the root, 1 for first tokens. `ancestors`:
    (nodes, nodes) bool, row i marks node i and all above it, the nodes that node i may attend to. `paths`: for each
    label, in the caller's order, the nodes it runs through.
    """

    tokens: np.ndarray
    depths: np.ndarray
    ancestors: np.ndarray
    paths: tuple[tuple[int, ...], ...]


def build_trie(labels: Sequence[Sequence[int]]) -> TokenTrie:
    """The trie of different labels, without the end token that closes each: it is only predicted, never read."""
    ways = [_prefixes(label) for label in labels]
    nodes = list(dict.fromkeys(node for way in ways for node in way))
    number = {node: i for i, node in enumerate(nodes)}
    ancestors = np.zeros((len(nodes), len(nodes)), dtype=bool)
    for node, i in number.items():
        ancestors[i, [number[node[:n]] for n in range(1, len(node) + 1)]] = True
    paths = tuple(tuple(number[node] for node in way) for way in ways)
    return TokenTrie(np.array([node[-1] for node in nodes]), np.array(list(map(len, nodes))), ancestors, paths)


def split_labels(labels: Sequence[Sequence[int]], max_nodes: int) -> list[list[int]]:
    """Groups of label indices whose tries have at most `max_nodes` nodes each (a longer label stands alone). Neighbours
    in token order go together, so that little of what they share is computed twice.
    """
    groups: list[list[int]] = []
    nodes: set[tuple[int, ...]] = set()
    for i in sorted(range(len(labels)), key=lambda i: tuple(labels[i][:-1])):
        own = set(_prefixes(labels[i]))
        if not groups or len(nodes | own) > max_nodes:
            groups.append([])
            nodes = set()
        groups[-1].append(i)
        nodes |= own
    return groups


def _prefixes(label: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(label[:n]) for n in range(1, len(label))]


def tree_mask(trie: TokenTrie, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The additive 4D mask (n, 1, nodes, length + nodes): 0 where a node may look, which is at the prompt's real tokens
    (`mask`, (n, length)), its ancestors and itself; the lowest number elsewhere.
    """
    own = torch.as_tensor(trie.ancestors, device=mask.device).expand(len(mask), -1, -1)
    seen = torch.cat([mask.bool()[:, None].expand(-1, len(own[0]), -1), own], dim=-1)
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
