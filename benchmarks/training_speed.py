"""catlib's training against TRL's SFTTrainer and against the plan's own loop: the same model, photos, prompts and LoRA.

    CATLIB_SMALL_LLAVA=DIR CATLIB_PHOTOS=DIR python benchmarks/training_speed.py [--photos-per-breed 11] [--epochs 3]
        [--seeds 3]

Needs the extra `bench` (TRL). Batch 4, LoRA of rank 16 on all linear layers of the language model, projector in full, bf16
base, no gradient checkpointing, one process. Each contender runs in a process of its own and is timed from the loaded libraries
to the end of the last epoch: loading the model, and for catlib filling an empty feature cache, are in it. catlib also
validates on a few photos and saves its checkpoint and state after each epoch; the others do neither.

  catlib      `catlib.training.trainer.train` as users call it
  pooled      the same with a quarter of the image tokens, `image_pool: 2`
  uncached    the same with every photo through the tower each time; one epoch, to compare the losses of the first steps
  trl         `trl.SFTTrainer` on prompt-completion conversations, so that its loss is that of the answer alone
  plan        the plan's loop, repaired just enough to run: bf16 for fp16, no truncation, padding to the longest. Its labels are
              the input ids, its LoRA matches layers by last name (in the vision tower too), logits for all positions; one epoch,
              as it caches nothing that would make the others faster

With --seeds N, catlib (with all tokens, and pooled) and trl are trained N times, and each adapter answers for all validation photos,
opened and scored in one and the same way: mean log-loss of the true breed's name, and accuracy.

Prints a line for each and then all as JSON: photos a second over all epochs, photos a second of processor time (all threads
and workers together: a figure that other work on the machine disturbs less; with --threads 1 it is the one to compare), peak
resident memory (GB of 10^9 bytes, of the training process alone), the losses of the first steps.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ENVIRONMENT = dict(
    os.environ
)  # before catlib asks OpenMP's threads not to spin, which TRL would have to live with, too

from catlib.data.images import inside, open_image  # noqa: E402
from catlib.data.records import Sample, image_root_of, read_samples  # noqa: E402
from catlib.settings import DataSettings, TrainSettings  # noqa: E402

ONE_EPOCH, JUDGED_ONES = ("uncached", "plan"), ("catlib", "trl", "pooled")
FIRST = 6  # steps whose losses are compared
SEED = "CATLIB_BENCHMARK_SEED"
JUDGED = "judged.jsonl"  # all validation photos; the training sees a few of them


def settings(work: Path, epochs: int, **more: Any) -> TrainSettings:
    """The settings that all contenders share."""
    values = {
        "base_model": os.environ["CATLIB_SMALL_LLAVA"],
        "train_data": str(work / "vlm/train.jsonl"),
        "val_data": str(work / "vlm/val.jsonl"),
        "output_dir": str(work / "out"),
        "epochs": epochs,
        "batch_size": 4,
        "gradient_accumulation": 1,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "train_projector": "full",
        "lr": 3e-4,
        "projector_lr": 3e-4,
        "lr_schedule": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "dtype": "bfloat16",
        "device": "cpu",
        "seed": int(os.environ.get(SEED, 0)),
        "log_steps": 1,
        "watch_photos": 0,
        "num_workers": 2,
        "resume": False,
    }
    return TrainSettings.build({**values, **more})


def run_catlib(work: Path, epochs: int, **more: Any) -> list[float]:
    """Training losses by step."""
    from catlib.training.trainer import train

    return [row["loss"] for row in train(settings(work, epochs, **more)).history if row["kind"] == "step"]


def run_pooled(work: Path, epochs: int) -> list[float]:
    return run_catlib(work, epochs, image_pool=2)


def run_uncached(work: Path, epochs: int) -> list[float]:
    return run_catlib(work, 1, cache_features=False)


def lora_model(chosen: TrainSettings, plans_targets: bool = False) -> tuple[Any, Any, Any]:
    """(bf16 base, processor, peft's configuration): catlib's layers, or the plan's by last name."""
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from catlib.settings import split_list
    from catlib.training.lora import lora_config

    model = AutoModelForImageTextToText.from_pretrained(chosen.base_model, dtype=torch.bfloat16)
    config = lora_config(model, chosen)
    if plans_targets:
        config = LoraConfig(
            r=chosen.lora_r,
            lora_alpha=chosen.lora_alpha,
            lora_dropout=chosen.lora_dropout,
            task_type="CAUSAL_LM",
            target_modules=split_list(chosen.lora_targets),
            modules_to_save=config.modules_to_save,
        )
    return model, AutoProcessor.from_pretrained(chosen.base_model), config


def trainer_arguments(chosen: TrainSettings, workers: int) -> dict[str, Any]:
    """transformers' names for the shared settings."""
    return {
        "output_dir": chosen.output_dir,
        "num_train_epochs": chosen.epochs,
        "learning_rate": chosen.lr,
        "per_device_train_batch_size": chosen.batch_size,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": chosen.max_grad_norm,
        "bf16": True,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": chosen.seed,
        "disable_tqdm": True,
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
        "dataloader_pin_memory": False,
    }


def run_trl(work: Path, epochs: int, workers: int = 2) -> list[float]:
    """TRL with what it does best here: completion-only loss on prompt-completion data, photos decoded by workers."""
    from datasets import Dataset, Image
    from trl import SFTConfig, SFTTrainer

    chosen, samples, root = settings(work, epochs), *training_samples(work)
    rows = [
        {
            "images": [str(inside(root, s.image))],
            "prompt": [{"role": "user", "content": s.question}],
            "completion": [{"role": "assistant", "content": s.answer}],
        }
        for s in samples
    ]
    model, processor, config = lora_model(chosen)
    data = Dataset.from_list(rows).cast_column("images", [Image()])
    arguments = SFTConfig(max_length=None, **trainer_arguments(chosen, workers))
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=processor, peft_config=config)
    trainer.train()
    trainer.save_model(chosen.output_dir)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def run_plan(work: Path, epochs: int, workers: int = 2) -> list[float]:
    """A dataset that calls the processor for each sample, labels copied from the input ids, transformers' Trainer."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    chosen, samples, root = settings(work, 1), *training_samples(work)
    model, processor, config = lora_model(chosen, plans_targets=True)
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    data = PlanDataset(samples, root, processor)
    arguments = TrainingArguments(remove_unused_columns=False, **trainer_arguments(chosen, workers))
    pad = processor.tokenizer.pad_token_id
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=lambda rows: padded(rows, pad))
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


class PlanDataset(torch.utils.data.Dataset):
    """The plan's: photo and text through the processor when a sample is asked for."""

    def __init__(self, samples: list[Sample], root: Path, processor: Any) -> None:
        self.samples, self.root, self.processor = samples, root, processor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        sample = self.samples[i]
        text = f"USER: <image>\n{sample.question}\nASSISTANT: {sample.answer}"
        row = self.processor(images=open_image(inside(self.root, sample.image)), text=text, return_tensors="pt")
        return {name: tensor[0] for name, tensor in row.items()}


def padded(rows: list[dict[str, torch.Tensor]], pad: int) -> dict[str, torch.Tensor]:
    """A batch as long as its longest row; labels are the input ids, padding included, as the plan copies them."""
    fill = {"input_ids": pad, "attention_mask": 0}
    batch = {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }
    return {
        **batch,
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": batch["input_ids"].clone(),
    }


CONTENDERS: dict[str, Callable[[Path, int], list[float]]] = {
    "catlib": run_catlib,
    "trl": run_trl,
    "pooled": run_pooled,
    "uncached": run_uncached,
    "plan": run_plan,
}


def training_samples(work: Path) -> tuple[list[Sample], Path]:
    path = work / "vlm/train.jsonl"
    root = image_root_of(path)
    return read_samples(path, root), root


def run_one(name: str, work: Path, epochs: int) -> dict[str, Any]:
    """One contender in this process."""
    from catlib.provenance import peak_resident_gb

    if name == "trl":
        import trl  # noqa: F401  (loaded before the clock starts, as the libraries of the others are)
    start, before = time.perf_counter(), sum(os.times()[:4])
    losses = CONTENDERS[name](work, epochs)
    seconds, busy = time.perf_counter() - start, sum(os.times()[:4]) - before
    photos = len(training_samples(work)[0]) * (1 if name in ONE_EPOCH else epochs)
    return {
        "photos_per_s": round(photos / seconds, 3),
        "photos_per_cpu_s": round(photos / busy, 3),
        "seconds": round(seconds, 1),
        "steps": len(losses),
        "peak_gb": round(peak_resident_gb(), 2),
        "first_losses": [round(x, 4) for x in losses[:FIRST]],
        "last_losses_mean": round(sum(losses[-10:]) / len(losses[-10:]), 4),
    }


def judge(work: Path) -> dict[str, float]:
    """Log-loss and accuracy of the adapter in `work`/out on the validation photos."""
    import numpy as np

    from catlib.classifiers.predict import read_batches
    from catlib.classifiers.vlm import VLMClassifier
    from catlib.vlm.checkpoint import find_checkpoint, open_vlm

    path = work / "vlm" / JUDGED
    root = image_root_of(path)
    samples, breeds = read_samples(path, root), sorted({s.breed for s in training_samples(work)[0]})
    found = find_checkpoint(
        work / "out", base_model=os.environ["CATLIB_SMALL_LLAVA"], question=samples[0].question, breeds=breeds
    )
    classifier = VLMClassifier(open_vlm(found, device="cpu", precision="bfloat16"), breeds)
    scores = np.concatenate([classifier.raw_scores(images) for _, images, _ in read_batches(samples, root, 16)])
    true = np.array([breeds.index(s.breed) for s in samples])
    loss = -scores[np.arange(len(true)), true].mean()
    return {
        "photos": len(true),
        "log_loss": round(float(loss), 4),
        "accuracy": float(np.mean(scores.argmax(1) == true)),
    }


def write_data(work: Path, photos_per_breed: int) -> int:
    """Training photos drawn evenly over the breeds, a few others for validation; returns how many are trained on."""
    from catlib.data.prepare import prepare

    chosen = DataSettings(
        photos=os.environ["CATLIB_PHOTOS"],
        data_dir=str(work),
        run_dir=str(work / "run"),
        photos_per_breed=photos_per_breed,
    )
    dataset = prepare(chosen)
    by_breed: dict[str, list[str]] = defaultdict(list)
    path = work / "vlm/val.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.with_name(JUDGED).write_text("".join(lines), encoding="utf-8")
    random.Random(0).shuffle(lines)
    for line in lines:
        by_breed[json.loads(line)["metadata"]["breed"]].append(line)
    path.write_text("".join(own[0] for own in by_breed.values()), encoding="utf-8")
    return len(dataset.train)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos-per-breed", type=int, default=11)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="comma separated; default: all")
    parser.add_argument("--threads", type=int, default=0, help="threads of each contender; 0: as many as torch takes")
    parser.add_argument(
        "--seeds", type=int, default=0, help="trainings of catlib, trl and pooled that are judged; 0: none"
    )
    parser.add_argument("--one", choices=[*CONTENDERS, "judge"], help=argparse.SUPPRESS)  # here, on the data in --work
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(judge(args.work) if args.one == "judge" else run_one(args.one, args.work, args.epochs)))
        return 0
    missing = [name for name in ("CATLIB_SMALL_LLAVA", "CATLIB_PHOTOS") if not os.environ.get(name)]
    if missing:
        print(f"skipped: set {' and '.join(missing)} (a LLaVA folder, a folder of photos)")
        return 0
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        photos = write_data(work, args.photos_per_breed)
        threads = args.threads or torch.get_num_threads()
        print(f"{photos} photos, {args.epochs} epochs, {threads} threads", flush=True)
        print(f"{'contender':<10} {'photos/s':>9} {'a CPU s':>8} {'peak GB':>8}  first losses", flush=True)

        def run(name: str, seed: int, **more: str) -> dict[str, Any]:
            command = [sys.executable, __file__, "--one", name, "--work", folder, "--epochs", str(args.epochs)]
            threads = {"OMP_NUM_THREADS": str(args.threads)} if args.threads else {}
            environment = {**ENVIRONMENT, **threads, SEED: str(seed), **more}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            return json.loads(done.stdout.splitlines()[-1])

        todo = [(name, 0) for name in args.contenders.split(",")]
        todo += [(name, seed) for seed in range(1, args.seeds) for name in JUDGED_ONES]
        for name, seed in todo:
            # with a feature cache of its own, empty
            row = run(name, seed, CATLIB_ROOT=str(work / f"{name}-{seed}"))
            rates = f"{row['photos_per_s']:>9.2f} {row['photos_per_cpu_s']:>8.2f} {row['peak_gb']:>8.2f}"
            print(f"{name:<10} {rates}  {row['first_losses']}", flush=True)
            if args.seeds and name in JUDGED_ONES:
                row["judged"] = run("judge", seed)
                print(f"{name:<10} seed {seed}: {row['judged']}, last losses {row['last_losses_mean']}", flush=True)
                shutil.rmtree(work / "out")
            figures[f"{name}-{seed}" if seed else name] = row
    for name in ("trl", "plan"):
        if {name, "catlib"} <= figures.keys():
            ours, theirs = figures["catlib"], figures[name]
            speed, work_done, memory = (
                ours[key] / theirs[key] for key in ("photos_per_s", "photos_per_cpu_s", "peak_gb")
            )
            print(
                f"catlib against {name}: {speed:.2f} times the photos a second, {work_done:.2f} times those of a second of "
                f"processor time, at {memory:.2f} of the peak memory"
            )
    print(json.dumps({"photos": photos, "epochs": args.epochs, "threads": threads, **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
