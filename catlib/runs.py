"""What a training has left: the names of its files, its record, and how it is kept before the run is trained anew."""

import shutil
from pathlib import Path
from typing import Any

from catlib.files import read_json
from catlib.paths import relative

WEIGHTS, CONFIG, TRAINING = "adapter_model.safetensors", "adapter_config.json", "training.json"
DIGEST = f"{WEIGHTS}.sha256"  # SHA-256 of the weights, and of those that they replaced
CALIBRATION = "calibration.json"  # temperature and threshold that an evaluation has found for the weights
# In a run's folder: what the runner holds open (hidden names), and what does not depend on the training.
OF_THE_DATA = ("01_*", "audit*", "gate.json", "parameters.yaml", "state.json", "log.txt")


def set_aside(run_dir: Path, checkpoint: Path) -> str:
    """Keep the earlier attempt as RUN~1 (or ~2 …), its checkpoint likewise; where both lie now, as text, "" if there is none.

    Called from the training, when `checkpoint` was trained with other settings than those of now. The checkpoint is renamed. Of
    the run's folder, in which a runner may be at work, what came after the training is moved, the data's inspection copied.
    """
    if not checkpoint.exists():
        return ""
    number = 1
    while any(_numbered(path, number).exists() for path in (run_dir, checkpoint)):
        number += 1
    kept = [_numbered(checkpoint, number)]
    checkpoint.rename(kept[0])
    entries = [path for path in run_dir.glob("*") if not path.name.startswith(".")] if run_dir.is_dir() else []
    for path in entries:
        target = _numbered(run_dir, number) / path.name
        target.parent.mkdir(exist_ok=True)
        if not any(path.match(pattern) for pattern in OF_THE_DATA):
            path.rename(target)
        elif path.is_file():
            shutil.copy2(path, target)
    if entries:
        kept.append(_numbered(run_dir, number))
    return " and ".join(map(relative, kept))


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}~{number}")


def read_training(folder: Path) -> dict[str, Any]:
    """What training wrote beside the adapter; empty for an adapter made by another tool."""
    path = folder / TRAINING
    return read_json(path) if path.is_file() else {}
