"""What is declared, what is locked and what is imported agree, and the README's commands exist."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

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


@pytest.mark.parametrize("extra", [None, "lab", "test"])
def test_lock_satisfies_pyproject(extra):
    declared = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    for line in declared:
        name = requirement(line)
        assert name in LOCKED, f"{name} is declared but not locked: make lock"
        if at_least := re.search(r">=([\d.]+)", line):
            numbers = [[int(n) for n in re.findall(r"\d+", v)[:3]] for v in (LOCKED[name], at_least.group(1))]
            assert numbers[0] >= numbers[1], line


def test_conda_environment_installs_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip[0] == "-r requirements.lock" and "--editable ." in pip[1] and "--no-deps" in pip[1]
    python = next(entry for entry in environment["dependencies"] if str(entry).startswith("python="))
    minor = int(python.split(".")[1])
    assert minor >= int(PROJECT["requires-python"].split(".")[1])
    assert not [e for e in environment["dependencies"] if isinstance(e, str) and normal(e.split("=")[0]) in LOCKED]


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


def test_readme_names_what_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"(?:`|^    )make ([a-z]+)\b", readme, re.MULTILINE))
    assert {"report", "test", "lab", "clean"} <= used <= targets
    profiles = {path.stem for path in (ROOT / "notebooks/profiles").glob("*.yaml")}
    named = set(re.findall(r"catlib report ([a-z0-9-]+)", readme)) | set(re.findall(r"PROFILE=([a-z0-9-]+)", readme))
    assert named <= profiles
    for path in re.findall(r"\]\((?!http|#)([^)]+)\)", readme):
        assert (ROOT / path.split("#")[0]).exists(), f"README.md links to {path}"
    for path in re.findall(r"`((?:catlib|notebooks|benchmarks|tests|docs)/[\w./-]+\.\w+)`", readme):
        assert (ROOT / path).exists(), f"README.md names {path}"


def test_ci_runs_the_readme_command():
    script = (ROOT / ".ci/run").read_text()
    assert "make test" in script and "set +e" not in script and "|| true" not in script


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
