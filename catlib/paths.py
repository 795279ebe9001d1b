"""Where things lie: every relative path in a profile, notebook or command is relative to the project's root; and servers' URLs."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from catlib.errors import InputError

_USER = re.compile(r"(?<=://)[^/\s#]*@")  # user and password in a URL
KEY = "CATLIB_API_KEY"  # environment variable: a server's key; sent as a bearer token where it is set
RUNS = "outputs/runs"  # below the project's root: a folder for each run
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


def application_file() -> Path:
    """The web application that `catlib serve` runs: the project's examples/app.py, else the checkout's or the package's copy."""
    places = [place / "examples" / "app.py" for place in (project_root(), PACKAGE.parent, PACKAGE)]
    return next(filter(Path.is_file, places), places[-1])


def resolve(path: str | Path) -> Path:
    """An absolute path: `path` itself when absolute (after `~`), else below the project's root."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else project_root() / path


def given_path(path: str | Path) -> Path:
    """What the command line names: from the working directory, else from the project's root, as everywhere in catlib."""
    here = Path(path).expanduser()
    return here if here.exists() or not resolve(path).exists() else resolve(path)


def folder_of_run(run: str) -> Path:
    """The folder of a run by its name."""
    return resolve(RUNS) / run


def relative(path: str | Path) -> str:
    """`path` as it is written down: relative to the project's root where it lies in it, so that a moved project stays the same."""
    full = resolve(path)
    return full.relative_to(project_root()).as_posix() if full.is_relative_to(project_root()) else str(full)


def public_url(url: str, where: str, server: bool = True) -> str:
    """A server's URL as it may be logged and written down. Every URL that a user gives passes here, before anything is written.

    Raises InputError, without the secret in it, for one that holds a user's name, a password or a query, and for what is no URL.
    `server` False: a text that may be something else and is refused only for a password in it.
    """
    if not server and not _USER.search(url):
        return url
    url = url.strip()
    if "@" in url.partition("#")[0] or "?" in url.partition("#")[0]:
        raise InputError(
            f"{where}: a URL with a user, password or query (http://USER:PASSWORD@HOST, …?key=…) would stand in logs and reports; "
            f"give http://HOST:PORT/v1 and set the server's key in the environment variable {KEY}"
        )
    try:
        parts = urlsplit(url)
        fits = bool(parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)  # `port` raises
    except ValueError:
        fits = False
    if not fits:  # not shown: what stands where a port belongs may be a password
        raise InputError(f"{where}: expected http://HOST:PORT/v1, with #MODEL behind it if it serves several")
    return url


def server_key() -> str:
    """The key in the environment, empty without one. Raises InputError, without showing it, for what no header can carry."""
    key = os.environ.get(KEY, "").strip()
    if not all("!" <= letter <= "~" for letter in key):
        raise InputError(f"{KEY}: a key is of ASCII letters, digits and signs, without spaces; this one is not")
    return key


def without_secrets(text: str) -> str:
    """A text of other programs as it may be logged: no user or password in its URLs."""
    return _USER.sub("***@", text)
