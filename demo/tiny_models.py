"""The demo models: a tiny CLIP and a tiny LLaVA in `demo/models`, and the command that made them.

    python -m demo.tiny_models OUT_DIR

They know the common breeds of the drawn cats and none of the priority ones. Everything is seeded; the same versions of
torch and Pillow on the same kind of processor give the same weights up to rounding.
"""

import argparse
import logging
import time
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
MODELS = Path(__file__).parent / "models"  # plain `from_pretrained` loads model and processor from each folder in it
SEED = 7
PICTURES, CLIP_EPOCHS, LLAVA_EPOCHS = 28160, 14, 5


def build(
    out: Path,
    pictures: int = PICTURES,
    clip_epochs: int = CLIP_EPOCHS,
    llava_epochs: int = LLAVA_EPOCHS,
    seed: int = SEED,
) -> Path:
    """Draw the corpus, train both models on one core and write them to `out`/clip and `out`/llava in bfloat16; `out`."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small to gain from more, and one thread adds in one order
    try:
        torch.manual_seed(seed)
        return _build(out, pictures, clip_epochs, llava_epochs, seed)
    finally:
        torch.set_num_threads(threads)


def _build(out: Path, pictures: int, clip_epochs: int, llava_epochs: int, seed: int) -> Path:
    import torch

    from demo.architecture import make_clip, make_llava, set_dtype
    from demo.corpus import draw_corpus, texts
    from demo.pretraining import train_clip, train_llava

    start = time.perf_counter()
    corpus = draw_corpus(pictures, seed)
    clip, clip_processor = make_clip(texts())
    train_clip(clip, clip_processor, corpus, clip_epochs, seed)
    _save(clip, clip_processor, out / "clip")
    torch.manual_seed(seed + 1)
    llava, llava_processor = make_llava(
        set_dtype(clip, torch.float32), texts()
    )  # LLaVA learns on the tower as it was saved
    train_llava(llava, llava_processor, corpus, llava_epochs, seed)
    _save(llava, llava_processor, out / "llava")
    log.info("demo models in %s after %.0f s, %.1f MB", out, time.perf_counter() - start, size_mb(out))
    return out


def _save(model: Any, processor: Any, folder: Path) -> None:
    """In bfloat16, which the model is left in."""
    import torch

    from demo.architecture import set_dtype

    set_dtype(model, torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def size_mb(folder: Path) -> float:
    """Size of all files below a folder, megabytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="drawn cats to learn from")
    parser.add_argument("--clip-epochs", type=int, default=CLIP_EPOCHS)
    parser.add_argument("--llava-epochs", type=int, default=LLAVA_EPOCHS)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    build(args.out_dir, args.pictures, args.clip_epochs, args.llava_epochs, args.seed)


if __name__ == "__main__":
    main()
