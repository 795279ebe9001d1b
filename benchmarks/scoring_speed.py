"""How fast a closed set of breeds is scored: catlib's two passes against the ways of the plan and of published code.

    CATLIB_SMALL_LLAVA=DIR CATLIB_PHOTOS=DIR python benchmarks/scoring_speed.py [--photos 8] [--dtype float32] [--png FILE]

Ways, on the same photos and model, all greedy and without gradients:
  catlib       one prefill of photo and question for a batch, then all labels as a token trie in one pass
  generate     the plan's loop: photo by photo, `generate` with at most 50 new tokens; and with at most 5, which is
               what it costs with a tuned model that stops after the name
  per label    a full forward pass over photo, question and label for each label (Zhang et al., arXiv 2405.18415)
  per token    a full forward pass for each token of each label
  CLIP         catlib's batches with text encoded once, against transformers' zero-shot pipeline called photo by photo
               (random weights in the shapes of ViT-B/32: speed does not depend on them)
The full passes are timed once on one photo, at most --passes of them. The other figures are the best of --repeat runs,
in photos per second. Takes about five minutes on two cores.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast, pipeline

from catlib.breeds import BREEDS
from catlib.classifiers.clip import PLAIN, ClipZeroShot
from catlib.classifiers.encoder import ClipEncoder
from catlib.data.images import open_image
from catlib.vlm.checkpoint import open_vlm
from catlib.vlm.models import VLM
from catlib.vlm.prompting import inference_inputs
from catlib.vlm.scoring import LabelScorer

QUESTION = "What breed is the cat in this photo?"
OXFORD = [
    "Abyssinian",
    "Bengal",
    "Birman",
    "Bombay",
    "British Shorthair",
    "Egyptian Mau",
    "Maine Coon",
    "Persian",
    "Ragdoll",
    "Russian Blue",
    "Siamese",
    "Sphynx",
]


def generate_loop(vlm: VLM, images: list[Image.Image], tokens: int = 50) -> None:
    """The plan's inference: one photo at a time, at most 50 new tokens."""
    for image in images:
        inputs = inference_inputs(vlm, [image], [QUESTION])
        vlm.base.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=vlm.processor.tokenizer.pad_token_id
        )


def full_passes(vlm: VLM, image: Image.Image, labels: list[list[int]], each_token: bool, most: int) -> float:
    """Photos per second of a full forward pass for each label, or for each token of each label, nothing kept between.

    Of more than `most` passes that many are timed, drawn at random, and stand for all: each reads the same photo.
    """
    inputs = inference_inputs(vlm, [image], [QUESTION])
    start = inputs["input_ids"]
    parts = [label[:n] for label in labels for n in (range(len(label)) if each_token else [len(label) - 1])]
    timed = random.Random(0).sample(parts, min(most, len(parts)))
    clock = time.perf_counter()
    for part in timed:
        inputs["input_ids"] = torch.cat([start, torch.tensor([part], dtype=start.dtype, device=start.device)], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        vlm.base(**inputs, use_cache=False).logits.log_softmax(-1)
    return len(timed) / (time.perf_counter() - clock) / len(parts)


def random_clip(folder: Path, words: list[str]) -> Path:
    """CLIP ViT-B/32 with random weights and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["<pad>", "<end>", *sorted({w for text in words for w in text.split()})]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", unk_token="<pad>", model_max_length=77
    )
    config = CLIPConfig(
        text_config={"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 0}
    )  # the defaults are ViT-B/32
    CLIPModel(config).eval().save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)
    return folder


def rate(work: Callable[[list], None], items: list, repeat: int) -> float:
    """Photos per second of the fastest of `repeat` runs, after one photo to warm up."""
    work(items[:1])
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        work(items)
        best = min(best, time.perf_counter() - start)
    return len(items) / best


def batches(work: Callable[[list], None], size: int) -> Callable[[list], None]:
    return lambda items: [work(items[first : first + size]) for first in range(0, len(items), size)]


def real_input(photos: int, dtype: str) -> tuple[VLM, list[Image.Image]] | None:
    """The LLaVA and so many photos, spread over the folder, that the environment names; None, and said so, without them."""
    missing = [name for name in ("CATLIB_SMALL_LLAVA", "CATLIB_PHOTOS") if not os.environ.get(name)]
    if missing:
        print(f"skipped: set {' and '.join(missing)} (a LLaVA folder, a folder of photos)")
        return None
    files = sorted(Path(os.environ["CATLIB_PHOTOS"]).expanduser().rglob("*.jpg"))
    images = [open_image(file) for file in files[:: max(1, len(files) // photos)][:photos]]
    return open_vlm(os.environ["CATLIB_SMALL_LLAVA"], precision=dtype), images


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--passes", type=int, default=60, help="at most so many full passes are timed for each way")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--png", type=Path, help="cost against the number of breeds, as a curve")
    args = parser.parse_args()
    if (real := real_input(args.photos, args.dtype)) is None:
        return 0
    vlm, images = real
    everything = [breed.name for breed in BREEDS]
    figures: dict[str, float] = {}
    curve: dict[int, float] = {}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        generated = rate(lambda items: generate_loop(vlm, items), images[:2], args.repeat)
        stopping = rate(lambda items: generate_loop(vlm, items, 5), images[:4], args.repeat)
        print(f"{'labels':>6} {'way':<22} {'photos/s':>9} {'catlib is faster by':>20}")
        for breeds in (OXFORD, everything):
            scorer, n = LabelScorer(vlm, breeds, QUESTION), len(breeds)
            ours = rate(batches(scorer.score, args.batch_size), images, args.repeat)
            ways = {"catlib": ours, "generate, 50 tokens": generated, "generate, 5 tokens": stopping}
            ways["per label"] = full_passes(vlm, images[0], scorer.labels, False, args.passes)
            ways["per token"] = full_passes(vlm, images[0], scorer.labels, True, args.passes)
            for way, speed in ways.items():
                figures[f"{way}, {n} labels"] = round(speed, 4)
                print(f"{n:>6} {way:<22} {speed:>9.3f} {ours / speed:>19.1f}x", flush=True)
        for n in (2, 12, 25, 45, 67):
            scorer = LabelScorer(vlm, everything[:n], QUESTION)
            curve[n] = 1000 / rate(batches(scorer.score, args.batch_size), images[: args.batch_size], args.repeat)
        print("breeds  ms/photo\n" + "\n".join(f"{n:>6} {ms:>9.1f}" for n, ms in curve.items()))
        clip = str(random_clip(Path(folder), [PLAIN.format(name) for name in everything]))
        classifier = ClipZeroShot(ClipEncoder.load(clip), everything, "plain")
        ours = rate(batches(classifier.classify, 16), images * 2, args.repeat)
        zero_shot = pipeline("zero-shot-image-classification", model=clip)
        ask = {"candidate_labels": everything, "hypothesis_template": PLAIN}
        theirs = rate(lambda items: [zero_shot(image, **ask) for image in items], images[:4], args.repeat)
        print(f"{67:>6} {'CLIP, catlib':<22} {ours:>9.2f}")
        print(f"{67:>6} {'CLIP, pipeline':<22} {theirs:>9.2f} {ours / theirs:>19.1f}x")
    figures |= {"CLIP catlib": round(ours, 2), "CLIP pipeline": round(theirs, 2)}
    print(
        json.dumps(
            {"dtype": args.dtype, "threads": torch.get_num_threads(), "photos_per_s": figures, "curve_ms": curve}
        )
    )
    if args.png:
        draw(curve, args.png)
    return 0


def draw(curve: dict[int, float], out: Path) -> None:
    """Milliseconds a photo against the number of breeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(list(curve), list(curve.values()), marker="o")
    axis.set(xlabel="breeds", ylabel="ms a photo", ylim=(0, None), title="Cost of scoring a closed set")
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
