"""The memory estimate beside the measured peak of real training runs, each in a process of its own.

    CATLIB_SMALL_LLAVA=DIR python benchmarks/memory_reality.py [--only tiny,small,slice] [--json FILE]
    python benchmarks/memory_reality.py --full-7b       # the whole LLaVA-1.5-7B in NF4: one optimizer step; 9 GB, minutes

Models: the tests' tiny LLaVA; the small LLaVA in CATLIB_SMALL_LLAVA (left out without it); two of the 32 layers of LLaVA-1.5-7B at
their true widths with its whole vision tower, random weights, 576 image tokens. Each in LoRA and QLoRA, with and without
gradient checkpointing, through `catlib.training.trainer` from loading to the last checkpoint, closed-set validation included.

Measured: the most anonymous memory that is resident (RssAnon, every 5 ms) less what was so after imports and one training run of a
tiny model, which loads what is loaded late; plus the weights that are read from the mapped file in place. Pages of a mapped file that
no tensor uses any more are not counted: the system takes them back when it needs them. With --allocator, and for the tiny model, which is
smaller than such noise: what torch's CPU allocator handed out at most (torch.profiler) plus the weights. Linux only.
"""

import argparse
import ctypes
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]
BATCH = {"tiny": 4, "small": 4, "slice": 2, "full": 1}
DTYPE = {"tiny": "float32", "small": "bfloat16", "slice": "bfloat16", "full": "bfloat16"}


def resident(field: str) -> float:
    """A line of /proc/self/status in bytes: VmRSS, or VmHWM, the largest it was."""
    lines = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if ":" in line
    )
    return 1024.0 * int(lines[field].split()[0])


class AnonymousPeak:
    """The most anonymous memory that was resident since it was made, sampled by a thread."""

    def __init__(self) -> None:
        self.start = self.most = resident("RssAnon")
        self.running = True
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def _sample(self) -> None:
        while self.running:
            self.most = max(self.most, resident("RssAnon"))
            time.sleep(0.005)

    def stop(self) -> float:
        """Bytes above the start."""
        self.running = False
        self.thread.join()
        return self.most - self.start


def mapped_weights(model: Any) -> int:
    """Bytes of the tensors that lie in a mapped weights file."""
    lines = [
        line.split()
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        if line.endswith(".safetensors")
    ]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]
    }
    return sum(size for at, size in storages.items() if any(low <= at < high for low, high in ranges))


def start_measuring() -> float:
    """Give free memory back, forget the former peak, and return what is resident."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident("VmRSS")


def run_settings(kind: str, model: Path, data: Path, out: Path, mode: str, checkpointing: bool) -> Any:
    """Two optimizer steps of two passes; of one pass for the whole 7B, without closed-set validation."""
    from tiny_models import settings

    full = kind == "full"
    rank = 4 if kind == "tiny" else 32 if full else 16
    return settings(
        model,
        data,
        out,
        mode=mode,
        gradient_checkpointing=checkpointing,
        batch_size=BATCH[kind],
        dtype=DTYPE[kind],
        lora_r=rank,
        lora_dropout=0.05,
        gradient_accumulation=1 if full else 2,
        epochs=1,
        watch_photos=0 if full else 4,
        train_projector="none" if full else "full",
        force=True,
        lr=2e-4,
    )


def allocator_peak(work: Any) -> int:
    """Bytes that torch's CPU allocator had handed out at most while `work()` ran, counted from its start."""
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    peak, todo = 0, list(profiler.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo.extend(event.children)
        if event.tag == _EventType.Allocation:
            peak = max(peak, event.extra_fields.total_allocated)
    return peak


def measure(
    kind: str, model: Path, work: Path, mode: str, checkpointing: bool, allocator: bool = False
) -> dict[str, Any]:
    """One case, in this process: estimate and measured peak in bytes, and where the peak was."""
    import torch
    from tiny_models import save_llava, save_wide_llava, write_dataset

    from catlib.training import run
    from catlib.training.memory_check import check_fits
    from catlib.training.trainer import Trainer, train

    os.environ["CATLIB_ROOT"] = str(work)
    passes = 1 if kind == "full" else 4
    data = write_dataset(work / "data", train=BATCH[kind] * passes, val=1 if kind == "full" else 4)
    warm = write_dataset(work / "warm-data")
    warm_model = save_wide_llava(work / "warm") if mode == "qlora" else save_llava(work / "warm")
    train(run_settings("tiny", warm_model, warm, work / "warm-out", mode, checkpointing))
    chosen = run_settings(kind, model, data, work / "out", mode, checkpointing)
    loaded = run.TrainingData(chosen)
    pairs = [(s, root / s.image) for root, samples in loaded.parts for s in samples]
    need = check_fits(chosen, str(model), pairs)
    if kind == "full":
        from llava_shapes import build_7b_in_nf4

        run.open_vlm = lambda found, **_: build_7b_in_nf4(found.base)  # in place of reading weights from a folder
    times = {}

    def timed(trainer: Trainer) -> None:
        step = trainer.training_step

        def one(*given: Any) -> Any:
            since = time.perf_counter()
            before = start_measuring() if kind == "full" else 0.0
            result = step(*given)
            times["step_seconds"] = time.perf_counter() - since
            times["step_peak"] = resident("VmHWM") if kind == "full" else 0.0
            times["step_start"] = before
            return result

        trainer.training_step = one

    before, since = start_measuring(), time.perf_counter()
    anonymous = AnonymousPeak()
    trainer = Trainer(chosen)
    set_up_peak = resident("VmHWM") - before
    timed(trainer)
    if tensors := allocator or kind == "tiny":
        held = {
            t.untyped_storage()._cdata: t.untyped_storage().nbytes()
            for m in (trainer.vlm.model,)
            for t in [*m.parameters(), *m.buffers()]
        }
        measured = float(sum(held.values()) + allocator_peak(trainer.fit))
    else:
        trainer.fit()
        measured = anonymous.stop() + mapped_weights(trainer.vlm.model)
    return {
        "model": kind,
        "mode": mode,
        "gradient_checkpointing": checkpointing,
        "batch": BATCH[kind],
        "estimate": need.peak - (need.heap if tensors else 0),
        "phase": need.worst,
        "phases": need.phases,
        "measured": measured,
        "set_up": set_up_peak,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - since,
        "step_seconds": times["step_seconds"],
        "step_peak": times["step_peak"] - before if kind == "full" else None,
        "parts": need.as_dict(),
    }


def in_own_process(case: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--case", json.dumps(case)],
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(row: dict[str, Any]) -> None:
    ratio = row["estimate"] / row["measured"]
    checkpointing = "yes" if row["gradient_checkpointing"] else "no"
    print(
        f"| {row['model']} | {row['mode']} | {checkpointing} | {row['batch']} | {row['estimate'] / 1e9:.4g} | {row['measured'] / 1e9:.4g} "
        f"| {ratio:.2f} | {row['phase']} | {row['step_seconds']:.1f} |",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="tiny,small,slice", help="models, comma separated")
    parser.add_argument("--modes", default="lora,qlora")
    parser.add_argument(
        "--full-7b", action="store_true", help="one optimizer step of the whole LLaVA-1.5-7B in NF4 instead"
    )
    parser.add_argument(
        "--allocator", action="store_true", help="measure what torch's allocator handed out, for all models"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, bytes")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        logging.basicConfig(level=logging.INFO)
        print(
            json.dumps(
                measure(**{k: Path(v) if k in ("model", "work") else v for k, v in json.loads(args.case).items()})
            )
        )
        return 0
    rows = []
    print(
        "| model | mode | checkpointing | batch | estimate GB | measured GB | estimate / measured | peak expected in | s a step |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        models = built(Path(folder), ["full"] if args.full_7b else args.only.split(","))
        for kind, model in models.items():
            for mode in ["qlora"] if args.full_7b else args.modes.split(","):
                for checkpointing in (True,) if args.full_7b else (False, True):
                    with tempfile.TemporaryDirectory() as work:
                        path = model[mode] if isinstance(model, dict) else model
                        rows.append(
                            in_own_process(
                                {
                                    "kind": kind,
                                    "model": str(path),
                                    "work": work,
                                    "mode": mode,
                                    "checkpointing": checkpointing,
                                    "allocator": args.allocator,
                                }
                            )
                        )
                    show(rows[-1])
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    outside = [r for r in rows if not 1 / 1.15 <= r["estimate"] / r["measured"] <= 1.15]
    print(f"{len(rows) - len(outside)} of {len(rows)} estimates within 15 % of the measured peak")
    return 0


def built(folder: Path, kinds: list[str]) -> dict[str, Any]:
    """The models' folders."""
    from llava_shapes import save_empty_7b, save_slice
    from tiny_models import save_llava, save_wide_llava

    models: dict[str, Any] = {}
    if "tiny" in kinds:  # 4-bit blocks need a language model of width 64
        models["tiny"] = {"lora": save_llava(folder / "tiny"), "qlora": save_wide_llava(folder / "wide")}
    if "small" in kinds:
        if small := os.environ.get("CATLIB_SMALL_LLAVA"):
            models["small"] = Path(small)
        else:
            print("CATLIB_SMALL_LLAVA is not set: the small LLaVA is left out", file=sys.stderr)
    if "slice" in kinds:
        models["slice"] = save_slice(folder / "slice")
    if "full" in kinds:
        models["full"] = save_empty_7b(folder / "full")
    return models


if __name__ == "__main__":
    sys.exit(main())
