"""What a run consists of: its notebooks, the parameters each of them gets, and whether its inputs have changed."""

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nbformat

from catlib.errors import InputError
from catlib.paths import notebooks_folder, relative, resolve
from catlib.provenance import package_versions
from catlib.runs import CALIBRATION
from catlib.settings import NOTEBOOK_SETTINGS, PROFILE, SOURCES, all_options, run_parameters

INPUTS = ("photos", "train_data", "val_data", "test_data", "base_model", "clip_model", "checkpoint")
OUTPUTS = ("run_dir", "data_dir", "output_dir")
WHOLE_FILE = 1 << 20  # bytes; larger files are compared by size and time of change, smaller ones by content


@dataclass(frozen=True)
class Stage:
    """A notebook of the chain with its parameters."""

    name: str  # file name without ending, for example 02_training
    source: Path
    title: str
    parameters: Mapping[str, Any]  # the settings that it ends up with
    injected: Mapping[str, Any]  # what papermill hands it


def find_notebooks() -> dict[str, Path]:
    """The numbered notebooks of the project in order, by name. Raises InputError when there are none."""
    folder = notebooks_folder()
    if found := {path.stem: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}:
        return found
    raise InputError(f"{folder}: no notebooks; run the command in a checkout of the project, or set CATLIB_ROOT to it")


def select(names: Sequence[str], wanted: str) -> list[str]:
    """Those `names` that `wanted` lists by name or number ("01,02"); empty: all. Raises InputError on unknown ones."""
    entries = [entry.strip() for entry in wanted.split(",") if entry.strip()]
    for entry in entries:
        if not any(name == entry or name.split("_")[0] == entry for name in names):
            raise InputError(f"--notebooks: no notebook {entry!r}; there are {', '.join(names)}")
    return [name for name in names if not entries or name in entries or name.split("_")[0] in entries]


def declared(notebook: nbformat.NotebookNode, where: str) -> dict[str, Any]:
    """Names and values of a notebook's parameters cell. Raises InputError unless there is one, of literals only."""
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            try:
                return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(cell.source).body}
            except (AttributeError, SyntaxError, ValueError) as error:
                reason = f"{where}: its parameters cell must hold assignments of literals only ({error})"
                raise InputError(reason) from None
    raise InputError(f"{where}: no cell is tagged 'parameters'")


def plan(profile: Path, overrides: Mapping[str, Any]) -> list[Stage]:
    """All stages of a run with every parameter checked. Raises InputError before anything is executed.

    A notebook of the library gets the profile, the run and those overrides that are among its settings, and derives the rest
    as it does in JupyterLab (`Settings.collect`); one of the project's own gets the values of all names that its parameters
    cell declares.
    """
    ours = profile.parent == notebooks_folder() / "profiles"
    values = run_parameters(str(profile), overrides)
    values |= {PROFILE: profile.stem if ours else relative(profile.absolute())}  # as a notebook may say it anywhere
    defaults = {name: option.default for name, option in all_options().items()}
    stages, taken = [], set()
    for name, source in find_notebooks().items():
        notebook = nbformat.read(source, as_version=4)
        cell = declared(notebook, source.name)
        if settings := NOTEBOOK_SETTINGS.get(name):
            parameters = asdict(settings.of_profile(str(profile), overrides))
            chosen = {key: value for key, value in overrides.items() if key in (*parameters, *SOURCES)}
            injected = {PROFILE: values[PROFILE], "run": values["run"], **chosen}
            taken |= set(parameters)
        else:
            library = {key: defaults.get(key) if default is None else default for key, default in cell.items()}
            parameters = injected = {key: values.get(key, default) for key, default in library.items()}
            taken |= set(cell)
        first = next((cell.source for cell in notebook.cells if cell.cell_type == "markdown"), "")
        title = first.strip().splitlines()[0].lstrip("# ").strip() if first.startswith("#") else ""
        stages.append(Stage(name, source, title or name, parameters, injected))
    if unused := sorted(set(overrides) - taken - {"run"}):
        raise InputError(f"no notebook has the parameter {', '.join(unused)}; they have {', '.join(sorted(taken))}")
    return stages


def fingerprint(stage: Stage, before: Mapping[str, str]) -> dict[str, str]:
    """A hash of each thing that a result depends on; `before` is the fingerprint of the notebook before this one."""
    parts = {
        "the notebook": [cell.source for cell in nbformat.read(stage.source, as_version=4).cells],
        "catlib": library(),
        "package versions": package_versions(),
        "parameters": {key: value for key, value in stage.parameters.items() if key != "hint"},
        "input files": [_listing(stage.parameters[key]) for key in INPUTS if stage.parameters.get(key)],
        "an earlier notebook": before,
    }
    return {name: digest(json.dumps(part, sort_keys=True).encode()) for name, part in parts.items()}


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def changes(entry: Mapping[str, Any], stage: Stage, now: Mapping[str, str]) -> list[str]:
    """What differs between the results that a run's state lists for a stage and those it would have now; empty: nothing."""
    then = entry.get("fingerprint")
    if not isinstance(then, dict):
        return ["never completed"]
    found = [name for name, digest in now.items() if then.get(name) != digest]
    if "parameters" in found:
        old, new = entry.get("parameters", {}), stage.parameters
        found[found.index("parameters")] = ", ".join(sorted(key for key in new if old.get(key, new) != new[key]))
    recorded = entry.get("outputs", {})
    return found + (["output files"] if signatures(recorded) != recorded else [])


def library() -> str:
    """A hash of catlib itself: its source and its assets."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(path for path in package.rglob("*") if path.suffix == ".py" or "assets" in path.parts)
    return digest(b"".join(f"{p.relative_to(package)}\0".encode() + p.read_bytes() for p in files if p.is_file()))


def output_files(stage: Stage) -> list[Path]:
    """The files that lie in the folders a stage writes to, in order; the runner's own files are left out."""
    folders = {resolve(stage.parameters[key]) for key in OUTPUTS if key in stage.parameters}
    run_dir = resolve(stage.parameters.get("run_dir", "outputs"))
    found = {path for folder in folders for path in folder.rglob("*") if path.is_file() and path.parent != run_dir}
    own = {p for p in run_dir.glob("*") if p.suffix in (".csv", ".json", ".jsonl") and p.stem not in ("state", "gate")}
    return sorted(found | own)


def signatures(paths: Iterable[str | Path]) -> dict[str, str]:
    """For each path that is a file, by its name relative to the project, a text that changes with its content."""
    found = {}
    for path in filter(Path.is_file, map(resolve, paths)):
        facts = path.stat()
        mark = digest(path.read_bytes())[:16] if facts.st_size <= WHOLE_FILE else str(facts.st_mtime_ns)
        found[relative(path)] = f"{facts.st_size}:{mark}"
    return found


def _listing(value: str) -> Any:
    """An input path's content; for a folder names, sizes and times of change, as photos are too many to read. What an evaluation
    writes beside the weights that it reads is no input of it.
    """
    path = resolve(value)
    if not path.is_dir():
        return signatures([path])
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != CALIBRATION)
    return [(str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
