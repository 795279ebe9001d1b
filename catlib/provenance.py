"""What produced a file: package versions, git commit, machine. Goes into sidecars, reports and model cards."""

import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from catlib.paths import project_root

PACKAGES = ("catlib", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "scikit-learn", "numpy", "pillow")


@cache
def package_versions() -> dict[str, str]:
    """Versions of the packages that can change a figure, by distribution name; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@cache
def git_commit() -> str | None:
    """The checkout's commit, with `+changes` when tracked files differ from it; None outside a git checkout."""
    git = ["git", "-C", str(project_root())]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
