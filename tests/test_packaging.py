"""What is declared, what is locked and what is imported agree, and the README's commands exist."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from tiny_encoders import photo
from tiny_models import save_llava

from catlib.settings import TrainSettings, read_profile

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement(text: str) -> str:
    return normal(re.match(r"[A-Za-z0-9._-]+", text).group())


LOCKED = {requirement(line): line.split("==")[1] for line in LOCK}


def test_lock_holds_exact_versions_only():
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in LOCK), LOCK
    assert LOCKED["torch"] == "2.13.0"
    assert len(LOCKED) == len(LOCK)


def test_the_named_packages_are_direct_dependencies():
    named = ["jupyterlab", "papermill", "torch", "transformers", "peft", "bitsandbytes", "scikit-learn", "matplotlib"]
    assert {*named, "seaborn", "pillow"} <= {requirement(line) for line in PROJECT["dependencies"]}


@pytest.mark.parametrize("extra", [None, "lint", "test"])
def test_lock_satisfies_pyproject(extra):
    declared = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    for line in declared:
        name = requirement(line)
        assert name in LOCKED, f"{name} is declared but not locked: make lock"
        if at_least := re.search(r">=([\d.]+)", line):
            numbers = [[int(n) for n in re.findall(r"\d+", v)[:3]] for v in (LOCKED[name], at_least.group(1))]
            assert numbers[0] >= numbers[1], line


def conda_environment() -> tuple[list[str], list[str]]:
    """Conda's own requirements, and the lines that conda hands to pip as a requirements file."""
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    return [e for e in entries if isinstance(e, str)], next(e["pip"] for e in entries if isinstance(e, dict))


def test_conda_environment_leaves_python_packages_to_the_lock():
    own, pip = conda_environment()
    assert pip[0] == "-r requirements.lock"
    python = next(entry for entry in own if entry.startswith("python="))
    assert int(python.split(".")[1]) >= int(PROJECT["requires-python"].split(".")[1])
    assert not [entry for entry in own if normal(entry.split("=")[0]) in LOCKED]


@pytest.mark.slow
@pytest.mark.long
def test_pip_takes_the_conda_environment(tmp_path):
    shutil.copytree(ROOT / "catlib", tmp_path / "catlib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "condaenv.requirements.txt").write_text("\n".join(conda_environment()[1]), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "-r", "condaenv.requirements.txt"]
    done = subprocess.run(pip, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "catlib" in done.stdout.splitlines()[-1], done.stdout  # what it would install


@pytest.mark.slow
def test_every_import_is_declared():
    distributions = packages_distributions()
    core = {requirement(line) for line in PROJECT["dependencies"]}
    optional = {requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines}
    for path in (ROOT / "catlib").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"catlib"}:
                owners = {normal(d) for d in distributions.get(name, [name])}
                allowed = (
                    core if node in tree.body else core | optional
                )  # at the top of a module: no extra may be needed
                assert owners & allowed, (
                    f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not declare"
                )


@pytest.mark.slow
def test_no_module_needs_posix_to_be_imported():
    posix = {"fcntl", "resource", "termios", "pwd", "grp"}
    for path in (ROOT / "catlib").rglob("*.py"):
        top = ast.parse(path.read_text(encoding="utf-8")).body
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
        assert not names & posix, f"{path.relative_to(ROOT)} imports {names & posix}"


def test_readme_names_what_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"(?:`|^    )make ([a-z]+)\b", readme, re.MULTILINE))
    assert {"report", "test", "lab", "check", "clean"} <= used <= targets
    profiles = {path.stem for path in (ROOT / "notebooks/profiles").glob("*.yaml")}
    named = set(re.findall(r"catlib report ([a-z0-9-]+)", readme)) | set(re.findall(r"PROFILE=([a-z0-9-]+)", readme))
    assert named <= profiles
    for path in re.findall(r"\]\((?!http|#)([^)]+)\)", readme):
        assert (ROOT / path.split("#")[0]).exists(), f"README.md links to {path}"
    for path in re.findall(r"`((?:catlib|notebooks|benchmarks|tests|docs)/[\w./-]+\.\w+)`", readme):
        assert (ROOT / path).exists(), f"README.md names {path}"


def test_ci_runs_lint_and_every_test():
    script = (ROOT / ".ci/run").read_text()
    assert "make check" in script and "set +e" not in script and "|| true" not in script
    recipes = dict(re.findall(r"^(\w+):.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert "check: lint" in (ROOT / "Makefile").read_text() and " -m " not in recipes["check"].replace(" -m pytest", "")
    assert all(tool in recipes["lint"] for tool in ("ruff format --check", "ruff check", "mypy"))


def test_hooks_fetch_nothing():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {hook["repo"] for hook in hooks} == {"local"}
    assert {hook["language"] for repo in hooks for hook in repo["hooks"]} == {"system"}


def test_citation_names_this_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert "Apache License" in (ROOT / "LICENSE").read_text()


@pytest.mark.slow
@pytest.mark.long
def test_an_installed_wheel_makes_a_report_in_an_empty_folder(tmp_path):
    """No file of the checkout is in reach: the package, its notebooks and its profiles come from the wheel."""
    source, place, empty = tmp_path / "source", tmp_path / "installed", tmp_path / "empty"
    for name in ("catlib", "notebooks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(place), str(source)], check=True)
    shutil.rmtree(source)
    model = save_llava(tmp_path / "model")
    for number in range(36):
        path = tmp_path / "photos" / ("Birman", "Bombay", "Siamese")[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(number, 64).save(path)
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CATLIB_", "PYTHONPATH"))}
    environment |= {"PYTHONPATH": str(place), "CUDA_VISIBLE_DEVICES": ""}
    program = "import catlib, sys; print(catlib.__file__); from catlib.cli import main; sys.exit(main(sys.argv[1:]))"
    settings = {"photos": tmp_path / "photos", "base_model": model, "priority_breeds": "Bombay", "epochs": 1}
    command = [sys.executable, "-c", program, "report", "photos"]
    command += [part for name, value in settings.items() for part in ("-p", f"{name}={value}")]
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(str(place))
    assert (empty / "reports/photos/index.html").is_file() and (empty / "data/photos/vlm/train.jsonl").is_file()
    assert {path.name for path in empty.iterdir()} <= {"data", "outputs", "reports"}


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks/profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_profile_is_valid_and_says_what_it_needs(path):
    assert read_profile(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(line.startswith("# Hardware: ") for line in header)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("llava-7b-lora", {"mode": "lora", "lora_r": 32}),
        ("llava-7b-lora-r16", {"mode": "lora", "lora_r": 16}),
        ("llava-7b-qlora", {"mode": "qlora", "quantize": True}),
        ("pixtral-12b-qlora", {"mode": "qlora", "quantize": True}),
    ],
)
def test_profiles_of_the_plan(name, values):
    profile = read_profile(ROOT / "notebooks/profiles" / f"{name}.yaml")
    assert profile.items() >= (values | {"epochs": 3, "lr": 2e-4}).items()
    assert "lora_alpha" not in profile and TrainSettings().lora_alpha == 0  # twice the rank, whatever that is
    assert profile["early_stopping"] == 1
    assert profile["batch_size"] * profile["gradient_accumulation"] == 32
