"""Which image patches drove the score of a breed's name: gradients on its image tokens, and scores with tokens hidden."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from catlib.errors import CatlibError
from catlib.vlm.families import image_token_of
from catlib.vlm.models import VLM
from catlib.vlm.prompting import continued, inference_inputs, label_tokens

OCCLUSION_BATCH = 8
Label = str | Sequence[int]  # a breed's name, or the tokens that stand for it


def patch_gradients(vlm: VLM, image: Image, question: str, breed: Label, steps: int = 8) -> np.ndarray:
    """Signed relevance (h, w) of each image token for log p(breed, end token | photo, question), in nats.

    Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) from a photo whose tokens are all its mean token to the photo
    itself, taken at the middles of `steps` equal parts. They add up, as far as the steps suffice, to the score of the photo less
    that of the featureless one; a single gradient at the photo does not, where the model is saturated.
    """
    inputs, label = _inputs_with_answer(vlm, image, question, breed)
    positions, grid = image_positions(vlm, inputs["input_ids"][0])
    relevance = torch.zeros(len(positions), device=positions.device)
    for step in range(steps):
        held: list[torch.Tensor] = []

        def hold(embeddings: torch.Tensor, share: float = (step + 0.5) / steps, held: list = held) -> torch.Tensor:
            tokens = embeddings[0, positions].detach()
            away = tokens - tokens.mean(0)
            embeddings = embeddings.detach().clone()
            embeddings[0, positions] = tokens.mean(0) + share * away
            held += [embeddings.requires_grad_(), away]
            return embeddings

        with _edited(vlm, hold), torch.enable_grad():
            score = _label_score(vlm, inputs, label).sum()
            (gradient,) = torch.autograd.grad(score, held[:1])
        relevance += (gradient[0, positions].float() * held[1].float()).sum(-1) / steps
    return relevance.cpu().numpy().reshape(grid)


@torch.inference_mode()
def occluded_scores(vlm: VLM, image: Image, question: str, breed: Label, masks: list[np.ndarray]) -> np.ndarray:
    """log p(breed, end token | photo, question) for each mask (h, w, bool), masked tokens replaced by the mean."""
    inputs, label = _inputs_with_answer(vlm, image, question, breed)
    positions, _ = image_positions(vlm, inputs["input_ids"][0])
    scores = []
    for first in range(0, len(masks), OCCLUSION_BATCH):
        chosen = np.stack(masks[first : first + OCCLUSION_BATCH]).reshape(-1, len(positions), 1)

        def occlude(embeddings: torch.Tensor, chosen: np.ndarray = chosen) -> torch.Tensor:
            tokens, hidden = embeddings[0, positions], torch.as_tensor(chosen, device=embeddings.device)
            rows = embeddings.repeat(len(hidden), 1, 1)
            rows[:, positions] = torch.where(hidden, tokens.mean(0), tokens)
            return rows

        with _edited(vlm, occlude):
            scores.append(_label_score(vlm, inputs, label))
    return torch.cat(scores).double().cpu().numpy()


def image_positions(vlm: VLM, ids: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Where the image tokens stand in `ids` (length,), row by row of the photo, and their grid (h, w).

    Tokens in one run are a square; runs of equal length are the rows or, of a photo cut into tiles, the tiles, the last
    of which shows the whole. Raises CatlibError when the tokens form no grid.
    """
    found = (ids == image_token_of(vlm.base.config)).nonzero()[:, 0]
    breaks = (found.diff() > 1).nonzero()[:, 0] + 1
    runs = torch.tensor_split(found, breaks.cpu())
    if len(runs) > 1 and vlm.family.tiled:
        found, runs = runs[-1], runs[-1:]
    if len(runs) > 1 and len({len(run) for run in runs}) == 1:
        return found, (len(runs), len(runs[0]))
    side = round(len(found) ** 0.5)
    if not len(found) or side * side != len(found):
        raise CatlibError(f"{len(found)} image tokens of a {vlm.family.name} form no grid; a heat map is not defined")
    return found, (side, side)


def _inputs_with_answer(vlm: VLM, image: Image, question: str, breed: Label) -> tuple[dict[str, Any], list[int]]:
    label = label_tokens(vlm, question, breed) if isinstance(breed, str) else list(breed)
    return continued(vlm, inference_inputs(vlm, [image], [question]), label[:-1]), label


def _label_score(vlm: VLM, inputs: dict[str, torch.Tensor], label: list[int]) -> torch.Tensor:
    """Summed log-probabilities (rows,) of the label at the end of the inputs."""
    logits = vlm.base(**inputs, use_cache=False, logits_to_keep=len(label)).logits.float()
    following = torch.tensor(label, device=logits.device).expand(len(logits), -1)
    return logits.log_softmax(-1).gather(-1, following[..., None])[..., 0].sum(-1)


@contextmanager
def _edited(vlm: VLM, edit: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While open, the language model reads `edit(embeddings)` (rows, length, width) instead of its one row."""

    def before(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs.get("attention_mask")  # of one row; only those of four dimensions fit several
        mask = None if isinstance(mask, torch.Tensor) and mask.dim() == 2 else mask
        return args, {**kwargs, "inputs_embeds": edit(kwargs["inputs_embeds"]), "attention_mask": mask}

    handle = vlm.base.get_submodule(vlm.family.language_model).register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
