"""Where things lie: every relative path in a profile, notebook or command is relative to the project's root."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def project_root() -> Path:
    """The folder that holds `notebooks/profiles`, so that a notebook finds the same files from any folder.

    In order: the environment variable CATLIB_ROOT; the working directory or the nearest folder above it that holds
    `notebooks/profiles`; the checkout this package was installed from; the working directory.
    """
    if named := os.environ.get("CATLIB_ROOT"):
        return Path(named).resolve()
    here = Path.cwd().resolve()
    for folder in (here, *here.parents, PACKAGE.parent):
        if (folder / "notebooks" / "profiles").is_dir():
            return folder
    return here


def notebooks_folder() -> Path:
    """The folder with the notebooks and their `profiles`: the project's; where it has none, the copy in an installed package."""
    own, packaged = project_root() / "notebooks", PACKAGE / "notebooks"
    return packaged if packaged.is_dir() and not own.is_dir() else own


def resolve(path: str | Path) -> Path:
    """An absolute path: `path` itself when absolute (after `~`), else below the project's root."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else project_root() / path


def relative(path: str | Path) -> str:
    """`path` as it is written down: relative to the project's root where it lies in it, so that a moved project stays the same."""
    full = resolve(path)
    return full.relative_to(project_root()).as_posix() if full.is_relative_to(project_root()) else str(full)
