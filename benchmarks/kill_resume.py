"""Kill a training run at random moments, resume it, and compare the final weights with those of a run that was left alone.

    python benchmarks/kill_resume.py --kills 20

A tiny LLaVA on drawn photos, saving its state after every optimizer step; `kill -9` in the middle of steps, saves and
validations, or `--signal SIGTERM`, upon which a training saves itself. Prints how often it was killed and whether the weights
are equal bit for bit.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

from catlib.vlm.adapters import read_training

TESTS = Path(__file__).resolve().parents[1] / "tests"


def command(work: Path, out: str, epochs: int) -> list[str]:
    """One training process on the model and data in `work`."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from tiny_models import settings; "
        "from catlib.training.trainer import train; w = Path(sys.argv[2]); import torch; torch.set_num_threads(1); "
        "train(settings(w / 'model', w / 'data' / 'vlm', w / sys.argv[3], epochs=int(sys.argv[4]), save_steps=1, "
        "lora_dropout=0.1, train_projector='full', balance='sqrt'))"
    )
    return [sys.executable, "-c", code, str(TESTS), str(work), out, str(epochs)]


def run_to_end(
    work: Path,
    out: str,
    epochs: int,
    kills: int,
    draw: random.Random,
    number: signal.Signals = signal.SIGKILL,
    within_s: float = 0.15,
) -> int:
    """Train, killing the first `kills` attempts that are still alive, at a random moment of the first `within_s` seconds in which they
    train; returns how many were killed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CATLIB_ROOT": str(work)}
    killed = 0
    while True:
        process = subprocess.Popen(command(work, out, epochs), env=environment, stderr=subprocess.PIPE, text=True)
        if killed < kills:
            started = work / out / "history.jsonl"
            before = started.stat().st_size if started.exists() else 0
            while process.poll() is None and (not started.exists() or started.stat().st_size == before):
                time.sleep(0.002)  # until it trains; loading the libraries takes most of the time
            time.sleep(draw.uniform(0, within_s))
            if process.poll() is None:
                process.send_signal(number)
                process.wait()
                killed += 1
                continue
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"a resumed run failed:\n{errors}")
        return killed


def compare(
    work: Path, kills: int, epochs: int, seed: int, number: signal.Signals = signal.SIGKILL
) -> tuple[int, bool]:
    """(kills that hit, whether the final adapters and histories are equal)."""
    sys.path.insert(0, str(TESTS))
    from tiny_models import save_llava, write_dataset

    save_llava(work / "model")
    write_dataset(work / "data")
    run_to_end(work, "whole", epochs, 0, random.Random(seed))
    # an epoch's time, so that on a busy machine, too, some kills come after a save
    took = read_training(work / "whole")["outcome"]["seconds"] / epochs
    killed = run_to_end(work, "killed", epochs, kills, random.Random(seed), number, took)
    whole, other = (load_file(work / out / "last" / "adapter_model.safetensors") for out in ("whole", "killed"))
    return killed, whole.keys() == other.keys() and all((whole[key] == other[key]).all() for key in whole)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=40, help="of 3 steps each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", default="SIGKILL", choices=["SIGKILL", "SIGTERM", "SIGINT"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        killed, equal = compare(Path(folder), args.kills, args.epochs, args.seed, signal.Signals[args.signal])
    print(f"killed {killed} times of {args.kills}; final weights {'equal bit for bit' if equal else 'DIFFER'}")
    return 0 if equal and killed else 1


if __name__ == "__main__":
    sys.exit(main())
