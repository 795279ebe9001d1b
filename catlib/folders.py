"""Folders that appear whole or not at all."""

import glob
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from catlib.errors import InputError
from catlib.files import WRITING, locked, saving

FORMER = ".former"  # in the name of what is being replaced


@contextmanager
def whole_folder(
    out: Path, force: bool, keep: Sequence[Path] = (), ours: Callable[[Path], bool] = lambda folder: True
) -> Iterator[Path]:
    """A temporary folder beside `out` that gets its name at the end; an error or interruption leaves nothing behind.

    Raises InputError when `out` holds something already (unless `force`, and it is a folder that `ours` knows as one of its
    kind), when another process writes it, or one of the `keep` folders is in it.
    """
    out = out.resolve()
    if any(folder.exists() and folder.resolve().is_relative_to(out) for folder in keep):
        raise InputError(f"{out} holds what is to be exported; name another folder")
    with saving(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        for other in out.parent.glob(f".{glob.escape(out.name)}{WRITING}-*"):
            with locked(other / WRITING, f"{out}: another process writes it; wait for it, or name another folder"):
                shutil.rmtree(other)  # its process was killed
        _end_replacement(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not force:
            raise InputError(f"{out} exists and is not empty: name another folder, or replace it with --force")
        if not out.is_dir() or not ours(out):
            raise InputError(f"{out} was not written by this command, so --force does not replace it; name another")
    temporary, former = (out.with_name(f".{out.name}{part}-{secrets.token_hex(4)}") for part in (WRITING, FORMER))
    with saving(out):
        temporary.mkdir()
        mode = temporary.stat().st_mode & 0o777
    try:
        with locked(temporary / WRITING), saving(out, reads=True):
            yield temporary
            for path in temporary.rglob("*"):
                path.chmod(mode if path.is_dir() else mode & 0o666)
            if out.exists():
                out.rename(former)
            temporary.rename(out)
            (out / WRITING).unlink()
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        _end_replacement(out)


def _end_replacement(out: Path) -> None:
    """Remove the folder that `out` has replaced; where an end came between the two renames, give it its name back."""
    for former in out.parent.glob(f".{glob.escape(out.name)}{FORMER}-*"):
        if out.exists():
            shutil.rmtree(former, ignore_errors=True)
        else:
            former.rename(out)
