"""Everything that a run needs to go on to the same weights: one file, replaced whole, never half written."""

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from catlib.errors import CatlibError

log = logging.getLogger(__name__)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state beside its final place, flush it to disk, and rename it: a kill at any moment leaves the old or the new
    one. Raises CatlibError when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        raise CatlibError(
            f"{path}: the state could not be written ({error}); the one before it is untouched"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: Path) -> dict[str, Any] | None:
    """The saved state, or None when there is none. `weights_only`: tensors and plain values, no code."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink(missing_ok=True)  # of a run that was killed while it wrote
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CatlibError(
            f"{path}: not a readable training state ({error}); delete it, or train with --no-resume"
        ) from None


def random_state() -> dict[str, Any]:
    """The state of the generators that dropout and augmentation draw from."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Continue the generators where `random_state` left them."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
