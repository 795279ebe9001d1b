"""Do the fast closed-set scores equal plain forward passes on a real model, whatever the batch, padding and order?

    CATLIB_SMALL_LLAVA=DIR CATLIB_PHOTOS=DIR python benchmarks/score_equality.py [--photos 3] [--plain 1] [--labels 67]

In float32. `plain` is one forward pass for each photo and label, without cache, batch or padding, summed in float64. Then
the scorer against itself: photo by photo, the breeds in another order, labels in small groups, and both of its ways to read
them (token trie, padded rows). Prompts of unequal length share a batch, so that all but one row is padded on the left.
Prints the largest difference of each in nats; exit code 1 when one exceeds 1e-4.
"""

import argparse
import sys
import time

import numpy as np
import torch
from scoring_speed import real_input

from catlib.breeds import BREEDS
from catlib.vlm import scoring
from catlib.vlm.models import VLM
from catlib.vlm.prompting import answer_tokens, inference_inputs, known_ends
from catlib.vlm.scoring import LabelScorer

QUESTIONS = (
    "What breed is the cat in this photo?",
    "Breed?",
    "Look at the ears, the coat and the tail of the animal. What breed is the cat in this photo?",
)
LIMIT = 1e-4


@torch.inference_mode()
def plain_scores(vlm: VLM, image: object, question: str, breeds: list[str]) -> np.ndarray:
    """One full forward pass for each label (breeds,)."""
    inputs = inference_inputs(vlm, [image], [question])
    start, ends = inputs["input_ids"], known_ends(vlm)
    scores = []
    for breed in breeds:
        label = torch.tensor([answer_tokens(vlm.processor, question, breed, ends)], device=start.device)
        inputs["input_ids"] = torch.cat([start, label], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        steps = vlm.base(**inputs, use_cache=False).logits[0].double().log_softmax(-1)[start.shape[1] - 1 : -1]
        scores.append(float(steps.gather(1, label[0, :, None]).sum()))
    return np.array(scores)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=3)
    parser.add_argument("--plain", type=int, default=1, help="photos that plain passes are made for (slow)")
    parser.add_argument("--labels", type=int, default=len(BREEDS))
    args = parser.parse_args()
    if (real := real_input(args.photos, "float32")) is None:
        return 0
    vlm, images = real
    breeds = [breed.name for breed in BREEDS][: args.labels]
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(len(images))]
    scorer = LabelScorer(vlm, breeds, QUESTIONS[0])
    print(
        f"{len(breeds)} labels of {scorer.counts.min()} to {scorer.counts.max()} tokens, {len(images)} photos, way: {scorer.mode}"
    )
    whole = scorer.score(images, questions)
    worst = {}
    start = time.perf_counter()
    plain = np.stack([plain_scores(vlm, images[i], questions[i], breeds) for i in range(min(args.plain, len(images)))])
    worst["plain forward passes"] = np.abs(whole[: len(plain)] - plain).max()
    print(f"plain passes of {len(plain)} photos took {time.perf_counter() - start:.0f} s")
    single = [scorer.score([image], [question]) for image, question in zip(images, questions, strict=True)]
    worst["photo by photo"] = np.abs(whole - np.concatenate(single)).max()
    order = np.random.default_rng(0).permutation(len(breeds))
    turned = LabelScorer(vlm, [breeds[i] for i in order], QUESTIONS[0]).score(images, questions)
    worst["breeds in another order"] = np.abs(whole[:, order] - turned).max()
    other = LabelScorer(vlm, breeds, QUESTIONS[0], "plain" if scorer.mode == "tree" else "tree")
    worst[f"labels as {other.mode}"] = np.abs(whole - other.score(images, questions)).max()
    scoring.LOGITS_LIMIT = len(images) * vlm.base.get_input_embeddings().num_embeddings * 40
    worst["labels in small groups"] = np.abs(whole - scorer.score(images, questions)).max()
    for what, difference in worst.items():
        print(f"{what:<26} largest difference {difference:.1e} nats")
    return int(max(worst.values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
