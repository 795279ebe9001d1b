"""The runner on small notebooks: what is executed, what is skipped, and what a run that ends badly leaves behind."""

import asyncio
import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from catlib import cli
from catlib.commands import options, render
from catlib.errors import InputError
from catlib.evaluation.verdict import Verdict
from catlib.progress import CLEAR, Console
from catlib.reports import stages
from catlib.reports.index import read_state
from catlib.vlm.checkpoint import find_checkpoint

PARAMETERS = 'profile = "small"  # profile\nrun_dir = None  # folder\nseed = 0  # seed\n'
LIBRARY = stages.library
COUNT = 'from catlib.paths import resolve\nfolder = resolve(run_dir)\nopen(folder / "NAME.count", "a").write("x")'


def write_notebook(path: Path, title: str, code: str, parameters: str = PARAMETERS) -> None:
    """A notebook with a parameters cell, a line that counts its executions, and `code`."""
    cells = [
        new_markdown_cell(f"# {title}\nDoes it work?"),
        new_code_cell(parameters.strip(), metadata={"tags": ["parameters"]}),
        new_code_cell(COUNT.replace("NAME", path.stem)),
        new_code_cell(code),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of three small notebooks and the profile `small`."""
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    (tmp_path / "notebooks" / "profiles" / "small.yaml").write_text("seed: 3\n")
    write_notebook(tmp_path / "notebooks" / "01_first.ipynb", "First <b>page</b>", 'print("seed is", seed)')
    more = PARAMETERS + "epochs = 1  # passes\nresume = True  # go on\n"
    write_notebook(
        tmp_path / "notebooks" / "02_second.ipynb", "Second", 'print("epochs", epochs, "resume", resume)', more
    )
    write_notebook(tmp_path / "notebooks" / "03_third.ipynb", "Third", 'print("the end")')
    monkeypatch.setenv("CATLIB_ROOT", str(tmp_path))
    monkeypatch.setattr(stages, "library", lambda: "as it was")
    return tmp_path


def executions(project: Path, run: str = "small") -> list[int]:
    """How often each notebook was executed in a run."""
    folder = project / "outputs" / "runs" / run
    names = ("01_first", "02_second", "03_third")
    return [len(p.read_text()) if (p := folder / f"{name}.count").is_file() else 0 for name in names]


def state(project: Path, run: str = "small") -> dict:
    return read_state(project / "outputs" / "runs" / run)


def wait_for(path: Path) -> None:
    """Until a notebook has written this file, or four minutes are over."""
    deadline = time.monotonic() + 240
    while not (path.is_file() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)


def page(project: Path, name: str, run: str = "small") -> str:
    return (project / "reports" / run / f"{name}.html").read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.slow
def test_run_skip_change_force(project, capsys):
    assert cli.main(["report", "small", "--quiet"]) == 0
    assert executions(project) == [1, 1, 1]
    assert state(project)["status"] == "done"
    assert "seed is 3" in page(project, "01_first")
    printed = capsys.readouterr().out
    assert re.search(r"02_second +done in \d+ s", printed) and str(project / "reports/small/index.html") in printed
    assert "seed: 3" in (project / "outputs/runs/small/parameters.yaml").read_text()

    assert cli.main(["report", "small", "--quiet"]) == 0
    assert executions(project) == [1, 1, 1]
    assert capsys.readouterr().out.count("unchanged") == 3

    assert (
        cli.main(["report", "small", "--quiet", "-p", "epochs=2"]) == 0
    )  # the second notebook's, so the first is kept
    assert executions(project) == [1, 2, 2]
    assert "epochs 2 resume True" in page(project, "02_second")

    assert cli.main(["report", "small", "--quiet", "-p", "epochs=3", "--force", "--notebooks", "02"]) == 0
    assert executions(project) == [1, 3, 2]
    assert "resume False" in page(project, "02_second")  # forced: trained anew, not continued
    entry = state(project)["stages"]["03_third"]
    assert state(project)["status"] == "incomplete" and entry["status"] == "outdated"
    assert "outdated. Changed since" in page(project, "index")
    assert "is outdated" in page(project, "03_third") and "the end" in page(project, "03_third")  # kept, and marked


@pytest.mark.slow
def test_the_gate_is_asked_after_the_data_and_a_skip_ends_the_run(project, monkeypatch, capsys):
    asked = []

    def gate(profile, given):
        asked.append((executions(project), given["run"], given["epochs"]))
        verdict = Verdict(("skip", "train")[len(asked) > 1], "", ("Too slow.",), (), "")
        wishes = {"run": "small", "run_dir": str(project / "outputs/runs/small")}
        return verdict, {**verdict.as_json(), "profile": "small", "seconds": 1.0, "models": {}, "wishes": wishes}

    monkeypatch.setattr("catlib.evaluation.gate.gate", gate)
    assert cli.main(["report", "small", "--quiet", "--gate", "-p", "epochs=2"]) == 0
    assert executions(project) == [1, 0, 0] and asked == [([1, 0, 0], "small", 2)]
    assert "skip: Too slow." in capsys.readouterr().out and "<b>skip</b>" in page(project, "gate")
    assert cli.main(["report", "small", "--quiet", "--gate", "--json", "-p", "epochs=2"]) == 0
    assert executions(project) == [1, 1, 1]
    assert json.loads(capsys.readouterr().out)["gate"]["decision"] == "train"


@pytest.mark.slow
def test_what_was_not_asked_for_is_never_deleted(project, monkeypatch):
    assert cli.main(["report", "small", "--quiet"]) == 0
    run_dir = project / "outputs/runs/small"
    before = {path: path.read_bytes() for path in run_dir.glob("0*")}
    monkeypatch.setattr(stages, "library", lambda: "changed")
    assert cli.main(["report", "small", "--quiet", "-p", "epochs=2", "--notebooks", "03"]) == 0
    assert executions(project) == [1, 1, 2]
    assert [entry["status"] for entry in state(project)["stages"].values()] == ["outdated", "outdated", "done"]
    assert state(project)["stages"]["01_first"]["changed"] == ["catlib"]
    assert "epochs" in state(project)["stages"]["02_second"]["changed"]
    for name in ("01_first", "02_second"):
        assert (run_dir / f"{name}.ipynb").read_bytes() == before[run_dir / f"{name}.ipynb"]
        assert "is outdated" in page(project, name)
    monkeypatch.setattr(stages, "library", lambda: "as it was")
    assert cli.main(["report", "small", "--quiet", "--notebooks", "01"]) == 0  # as it was run: up to date again
    assert executions(project) == [1, 1, 2] and state(project)["stages"]["01_first"]["status"] == "done"


@pytest.mark.slow
def test_a_moved_project_is_unchanged(project, monkeypatch, tmp_path_factory):
    code = '(folder / "table.csv").write_text("a")'
    write_notebook(project / "notebooks/01_first.ipynb", "First", code)
    assert cli.main(["report", "small", "--quiet"]) == 0
    moved = tmp_path_factory.mktemp("elsewhere") / "project"
    project.rename(moved)
    monkeypatch.setenv("CATLIB_ROOT", str(moved))
    assert cli.main(["report", "small", "--quiet"]) == 0
    assert executions(moved) == [1, 1, 1]
    assert str(project) not in (moved / "outputs/runs/small/state.json").read_text()


@pytest.mark.long
@pytest.mark.slow
def test_a_lost_notebook_is_run_again_and_a_damaged_run_stops_no_other(project):
    assert cli.main(["report", "small", "--quiet"]) == 0
    (project / "outputs/runs/small/02_second.ipynb").unlink()
    (project / "outputs/runs/broken").mkdir()
    for damage in ("{}", '{"stages": []}', "no json"):
        (project / "outputs/runs/broken/state.json").write_text(damage)
        assert cli.main(["report", "small", "--quiet"]) == 0
        listed = (project / "reports/index.html").read_text()
        assert "outputs/runs/broken" in listed and "small/index.html" in listed
    assert executions(project) == [1, 2, 1]
    assert cli.main(["report", "small", "--quiet", "--run", "broken"]) == 0  # and is itself begun anew


@pytest.mark.long
@pytest.mark.slow
def test_a_training_with_other_settings_sets_the_earlier_attempt_aside(project):
    """Notebook 02 calls `set_aside` before it trains; the runner is at work in the folder and keeps an account of both."""
    parameters = PARAMETERS + "output_dir = None  # checkpoint\nepochs = 1  # passes\n"
    train = (
        "from catlib.runs import set_aside\ncheckpoint = resolve(output_dir)\n"
        'if (checkpoint / "epochs").is_file() and (checkpoint / "epochs").read_text() != str(epochs):\n'
        "    print(set_aside(folder, checkpoint))\n"
        'checkpoint.mkdir(parents=True, exist_ok=True)\n(checkpoint / "epochs").write_text(str(epochs))\nprint("epochs", epochs)'
    )
    write_notebook(project / "notebooks/02_second.ipynb", "Second", train, parameters)
    assert cli.main(["report", "small", "--quiet"]) == cli.main(["report", "small", "--quiet", "-p", "epochs=2"]) == 0
    assert [entry["status"] for entry in state(project)["stages"].values()] == ["done"] * 3
    assert "outputs/runs/small~1" in page(project, "02_second") and "epochs 2" in page(project, "02_second")
    earlier = project / "outputs/runs/small~1"
    assert read_state(earlier)["status"] == "done" and read_state(earlier)["run"] == "small~1"
    assert "epochs 1" in page(project, "02_second", "small~1") and "the end" in page(project, "03_third", "small~1")
    assert "epochs: 1" in (earlier / "parameters.yaml").read_text()
    assert (project / "outputs/vlm_checkpoints/small~1/epochs").read_text() == "1"
    assert (project / "outputs/vlm_checkpoints/small/epochs").read_text() == "2"
    assert 'href="small~1/index.html"' in (project / "reports/index.html").read_text()


@pytest.mark.long
@pytest.mark.slow
def test_what_makes_a_stage_run_again(project, monkeypatch):
    data = project / "train.jsonl"
    data.write_text("one\n")
    parameters = PARAMETERS + 'train_data = "x"  # samples\n'
    write_notebook(project / "notebooks/01_first.ipynb", "First", '(folder / "table.csv").write_text("a")', parameters)
    write_notebook(project / "notebooks/02_second.ipynb", "Second", "1")
    (project / "notebooks/03_third.ipynb").unlink()
    command = ["report", "small", "--quiet", "-p", "train_data=train.jsonl"]
    assert cli.main(command) == 0 and cli.main(command) == 0
    assert executions(project)[:2] == [1, 1]
    (project / "outputs/runs/small/table.csv").unlink()
    assert cli.main(command) == 0
    assert executions(project)[:2] == [2, 1]  # the lost file is back, and the second does not depend on it
    data.write_text("two\n")
    assert cli.main(command) == 0
    assert executions(project)[:2] == [3, 2]  # what follows a changed input is run again, too
    monkeypatch.setattr(stages, "library", lambda: "changed")
    assert cli.main(command) == 0
    assert executions(project)[:2] == [4, 3]


def test_library_hash_changes_with_the_source(tmp_path, monkeypatch):
    (tmp_path / "catlib" / "reports").mkdir(parents=True)
    monkeypatch.setattr(stages, "__file__", str(tmp_path / "catlib" / "reports" / "stages.py"))
    module = tmp_path / "catlib" / "data.py"
    module.write_text("a = 1")
    before = stages.library()
    (tmp_path / "catlib" / "notes.txt").write_text("not source")
    assert stages.library() == before
    module.write_text("a = 2")
    assert stages.library() != before


@pytest.mark.long
@pytest.mark.slow
def test_metrics_begin_anew_with_the_notebook_that_begins_them(project):
    """One stage begins metrics.json and the next adds to it, as notebooks 03 and 04 do."""
    write = "import json\nm = folder / 'metrics.json'\nold = json.loads(m.read_text()) if m.exists() else {}\n"
    write_notebook(
        project / "notebooks/02_second.ipynb", "Second", write + "m.write_text(json.dumps(old | {'second': 1}))"
    )
    write_notebook(
        project / "notebooks/03_third.ipynb", "Third", write + "m.write_text(json.dumps(old | {'third': 1}))"
    )
    metrics = project / "outputs/runs/small/metrics.json"
    assert cli.main(["report", "small", "--quiet"]) == cli.main(["report", "small", "--quiet"]) == 0
    assert executions(project) == [1, 1, 1] and json.loads(metrics.read_text()) == {"second": 1, "third": 1}
    assert cli.main(["report", "small", "--quiet", "--force", "--notebooks", "03"]) == 0
    assert executions(project) == [1, 1, 2] and json.loads(metrics.read_text()) == {"second": 1, "third": 1}
    assert cli.main(["report", "small", "--quiet", "--force", "--notebooks", "02"]) == 0
    assert json.loads(metrics.read_text()) == {"second": 1}
    assert state(project)["stages"]["03_third"]["status"] == "outdated"
    write_notebook(project / "notebooks/01_first.ipynb", "First", "1 / 0")
    assert cli.main(["report", "small", "--quiet"]) == 1
    assert [entry["status"] for entry in state(project)["stages"].values()] == ["failed", "outdated", "outdated"]


@pytest.mark.slow
def test_failure_shows_page_and_marks_the_rest(project, capsys):
    write_notebook(project / "notebooks/02_second.ipynb", "Second", 'raise ValueError("<i>bad</i> & worse")')
    assert cli.main(["report", "small", "--quiet"]) == 1
    captured = capsys.readouterr()
    assert "ValueError: <i>bad</i> & worse" in captured.err and "Traceback" not in captured.err
    html = page(project, "02_second")
    error = html.index("ValueError: &lt;i&gt;bad&lt;/i&gt; &amp; worse")
    assert error < html.index("<h1")  # at the top
    assert 'id="error"' in html and "<i>bad</i>" not in html
    assert "Third (not run)" in html and "Third (not run)" in page(project, "01_first")
    assert not (project / "reports/small/03_third.html").exists()
    assert [entry["status"] for entry in state(project)["stages"].values()] == ["done", "failed", "not run"]
    index = page(project, "index")
    assert "ValueError" in index and "not run" in index
    assert "failed" in (project / "reports/index.html").read_text()

    write_notebook(project / "notebooks/02_second.ipynb", "Second", "1 + 1")  # repaired: goes on where it stopped
    assert cli.main(["report", "small", "--quiet"]) == 0
    assert executions(project) == [1, 2, 1]
    assert "ValueError" not in page(project, "index")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("raised", "code"),
    [
        ('from catlib.errors import InputError\nraise InputError("photos/x.jpg: not a photo")', 2),
        ('from catlib.data.images import ImageError\nraise ImageError("photos/x.jpg: not a photo")', 2),
        ('from catlib.errors import CatlibError\nraise CatlibError("photos/x.jpg: not a photo")', 1),
    ],
)
def test_own_errors_keep_message_and_exit_code(project, capsys, raised, code):
    write_notebook(project / "notebooks/01_first.ipynb", "First", raised)
    assert cli.main(["report", "small", "--quiet"]) == code
    printed = capsys.readouterr().err
    assert printed.startswith("catlib: photos/x.jpg: not a photo\n") and "Traceback" not in printed
    shown = page(project, "01_first")
    error = shown[shown.index('id="error"') :].split("</pre>")[0]
    assert "not a photo" in error and "raise" not in error and "Traceback" not in error  # as JupyterLab shows it, too


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["smal"], ["no profile 'smal'", "did you mean small", "there are small"]),
        (["small", "-p", "sede=1"], ["unknown parameter 'sede'", "did you mean seed"]),
        (["small", "-p", "seed=many"], ["seed must be a whole number", "'many'"]),
        (["small", "-p", "seed"], ["expected key=value"]),
        (
            ["small", "-p", "lora_r=8"],
            ["no notebook has the parameter lora_r", "epochs, profile, resume, run_dir, seed"],
        ),
        (["small", "--notebooks", "07"], ["no notebook '07'", "01_first"]),
        (["small", "--run", "../elsewhere"], ["becomes a folder"]),
        (["small", "--sweep", "seed=1"], ["two or more"]),
        (["small", "--sweep", "sede=1,2"], ["unknown parameter 'sede'"]),
        (["small", "--sweep", "seed=1,2", "--sweep", "seed=3,4"], ["twice"]),
        (["small", "--sweep", "seed=1,2", "--jobs", "0"], ["--jobs 0", "1 or more"]),
        (["small", "--sweep", "seed=1,2", "--sweep", "epochs=1,many"], ["epochs must be a whole number"]),
        (["small", "--sweep", "base_model=a/b,a:b", "-p", "seed=1"], ["same name"]),
    ],
)
def test_wrong_input_stops_before_anything_runs(project, capsys, arguments, words):
    assert cli.main(["report", *arguments]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not (project / "outputs").exists()


def test_profile_with_wrong_key_or_type(project, capsys):
    profile = project / "elsewhere.yaml"
    profile.write_text("sed: 1\n")
    assert cli.main(["report", str(profile)]) == 2
    assert "elsewhere.yaml: unknown parameter 'sed'" in capsys.readouterr().err
    profile.write_text("epochs: three\n")
    assert cli.main(["report", str(profile)]) == 2
    assert "epochs must be a whole number" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 3])
def test_a_sweep_goes_over_texts_and_combinations_and_keeps_what_is_finished(project, capsys, monkeypatch, jobs):
    monkeypatch.setattr(stages, "library", LIBRARY)  # as processes of their own see it
    (project / "notebooks/03_third.ipynb").unlink()
    parameters = PARAMETERS + 'epochs = 1  # passes\nmode = "lora"  # mode\n'
    code = 'assert (mode, epochs) != ("qlora", 2), "no room"\nprint(mode, epochs)'
    write_notebook(project / "notebooks/02_second.ipynb", "Second", code, parameters)
    sweeps = ["--sweep", "mode=lora,qlora", "--sweep", "epochs=1,2", "--jobs", str(jobs)]
    command = ["report", "small", "--quiet", "--json", *sweeps]
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [run["run"] for run in found["runs"]] == [
        "small-mode=lora-epochs=1",
        "small-mode=lora-epochs=2",
        "small-mode=qlora-epochs=1",
    ]
    assert list(found["failed"]) == ["small-mode=qlora-epochs=2"] and "1 of 4 runs failed" in captured.err
    assert "qlora 1" in page(project, "02_second", "small-mode=qlora-epochs=1")
    assert executions(project, "small-mode=lora-epochs=2") == [1, 1, 0]
    again = ["report", "small", "--quiet", "--sweep", "mode=lora,qlora", "--jobs", str(jobs)]
    assert cli.main([*again, "--notebooks", "01"]) == 0
    assert executions(project, "small-mode=lora") == [1, 0, 0]
    assert cli.main([*again, "--notebooks", "02"]) == 0  # only what is asked for
    assert executions(project, "small-mode=lora") == executions(project, "small-mode=qlora") == [1, 1, 0]
    assert cli.main([*again, "--force"]) == 0
    assert executions(project, "small-mode=lora") == executions(project, "small-mode=qlora") == [2, 2, 0]


def test_a_checkpoint_that_is_not_there_yet_names_the_notebook_that_makes_it(project):
    with pytest.raises(InputError, match="02_training"):
        find_checkpoint("outputs/vlm_checkpoints/small", base_model="a/b")


def test_the_progress_of_a_notebook_is_one_line():
    """A moving one on a terminal, one a minute elsewhere; the log has everything, and other lines are shown as they are."""
    lines = [
        "step 40 of 159, 3 min left: epoch 0.25, loss 0.2104, lr 0.0002",
        "predicting: 12 of 480 photos, 3.1/s, 150 s to go",
    ]
    for terminal in (True, False):
        log, out = io.StringIO(), io.StringIO()
        out.isatty = lambda terminal=terminal: terminal
        console = Console("02_training", log, out)
        for text in ("loading\n" + lines[0][:20], lines[0][20:] + "\n" + lines[1] + "\n", "done\n"):
            console.write(text)
        console.close()
        assert log.getvalue() == "\n".join(["loading", *lines, "done", ""])
        shown = out.getvalue()
        assert "loading\n" in shown and "02_training 40/159 · loss 0.2104 · 3 min left" in shown
        assert ("02_training 12/480 · 150 s left" in shown) is terminal  # elsewhere the minute is not over
        assert shown.count("\n") == (2 if terminal else 3) and shown.endswith(CLEAR if terminal else "done\n")
    console = Console("02_training", log, None)
    console.write(lines[0] + "\n")
    assert log.getvalue().endswith(lines[0] + "\n")


@pytest.mark.slow
def test_the_training_s_log_reaches_the_terminal_as_progress(project, capsys):
    for path in (project / "notebooks").glob("*.ipynb"):
        path.unlink()
    code = (
        "import logging\nfrom catlib.settings import TrainSettings\nsettings = TrainSettings.collect(globals())\n"
        'logging.getLogger("catlib.training").info("step 40 of 159, 3 min left: epoch 0.25, loss 0.21")'
    )
    write_notebook(
        project / "notebooks/02_training.ipynb", "Training", code, 'profile = "small"  # p\nrun_dir = None  # r\n'
    )
    source = nbformat.read(project / "notebooks/02_training.ipynb", as_version=4)
    del source.cells[2]  # which counts, in a folder that this notebook's own parameters do not name
    nbformat.write(source, project / "notebooks/02_training.ipynb")
    assert cli.main(["report", "small"]) == 0
    assert "02_training 40/159 · loss 0.21 · 3 min left" in capsys.readouterr().err
    assert (
        "step 40 of 159" in page(project, "02_training")
        and "step 40" in (project / "outputs/runs/small/log.txt").read_text()
    )


@pytest.mark.long
@pytest.mark.slow
def test_interrupt_leaves_a_truthful_state(project):
    code = 'import os, time\n(folder / "kernel.pid").write_text(str(os.getpid()))\ntime.sleep(600)'
    write_notebook(project / "notebooks/02_second.ipynb", "Second", code)
    command = [sys.executable, "-m", "catlib.cli", "report", "small"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid_file = project / "outputs/runs/small/kernel.pid"
    wait_for(pid_file)
    assert state(project)["status"] == "running"

    second = subprocess.run(command, capture_output=True, text=True)  # meanwhile
    assert second.returncode == 2 and f"in progress (process {process.pid})" in second.stderr

    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=240)
    assert process.returncode == 130 and "interrupted" in printed and "Traceback" not in printed
    assert state(project)["status"] == "interrupted"
    assert [e["status"] for e in state(project)["stages"].values()] == ["done", "interrupted", "not run"]
    assert "interrupted" in page(project, "index") and "seed is 3" in page(project, "01_first")
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(int(pid_file.read_text()), 0)
            time.sleep(0.1)


@pytest.mark.slow
def test_an_interrupt_prints_no_traceback_however_slowly_the_kernel_ends(project, monkeypatch, capsys, caplog):
    write_notebook(
        project / "notebooks/01_first.ipynb", "First", '(folder / "here").write_text("x")\nimport time; time.sleep(600)'
    )
    ends = AsyncKernelManager.shutdown_kernel

    async def slowly(self, **options):
        await ends(self, **options)
        await asyncio.sleep(2.5)  # nbclient looks every second whether the kernel is alive

    monkeypatch.setattr(AsyncKernelManager, "shutdown_kernel", slowly)

    def interrupt():
        wait_for(project / "outputs/runs/small/here")
        os.kill(os.getpid(), signal.SIGINT)

    waiting = threading.Thread(target=interrupt)
    waiting.start()
    assert cli.main(["report", "small"]) == 130
    waiting.join()
    gc.collect()  # asyncio tells of an exception that nobody took when its task is collected
    printed = capsys.readouterr().err + caplog.text
    assert "interrupted" in printed and "Traceback" not in printed and "Kernel died" not in printed
    assert state(project)["status"] == "interrupted"


def test_an_interrupt_while_the_commands_are_imported_prints_no_traceback(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    assert cli.main(["runs"]) == 130
    assert capsys.readouterr().err.startswith("catlib: interrupted")


def test_what_a_library_prints_stays_out_of_the_result(monkeypatch, capsys):
    def noisy(args):
        with options.results_only():  # as each run of a sweep has it, too
            print("Setting accelerator to CPU")
            options.show(args, {"answer": 1}, "one")

    monkeypatch.setattr(render, "run", noisy)
    assert cli.main(["render", "notebook.ipynb", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"answer": 1} and printed.err == "Setting accelerator to CPU\n"
    assert cli.main(["render", "notebook.ipynb"]) == 0
    assert capsys.readouterr().out == "one\n"


def test_a_killed_run_is_not_called_running(project):
    run_dir = project / "outputs/runs/small"
    run_dir.mkdir(parents=True)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stage = {"01_first": {"status": "running", "title": "First"}}
    kept = {"run": "small", "profile": "small", "status": "running", "pid": gone.pid, "stages": stage}
    kept |= {"started": "2026-01-02T03:04:05+00:00", "commit": None, "versions": {}}
    (run_dir / "state.json").write_text(json.dumps(kept))
    assert state(project)["status"] == "interrupted"
    assert state(project)["stages"]["01_first"]["status"] == "interrupted"


def test_parameters_cell_of_anything_but_literals_is_refused(project):
    write_notebook(project / "notebooks/01_first.ipynb", "First", "1", "seed = 1 + len('x')\n")
    with pytest.raises(InputError, match="01_first.ipynb: its parameters cell must hold assignments of literals"):
        stages.plan(project / "notebooks/profiles/small.yaml", {})


def test_paths_follow_from_the_run_and_the_data_folder(project):
    cell = PARAMETERS + "data_dir = None  # d\ntrain_data = None  # t\noutput_dir = None  # o\ncheckpoint = None  # c\n"
    write_notebook(project / "notebooks/01_first.ipynb", "First", "1", cell)
    profile = project / "notebooks/profiles/small.yaml"
    found = stages.plan(profile, {"run": "trial", "data_dir": "data/x"})[0].parameters
    assert found["run_dir"] == "outputs/runs/trial"
    assert found["train_data"] == "data/x/vlm/train.jsonl"
    assert found["output_dir"] == found["checkpoint"] == "outputs/vlm_checkpoints/trial"
    found = stages.plan(profile, {"output_dir": "models/a", "train_data": "mine.jsonl"})[0].parameters
    assert found["train_data"] == "mine.jsonl" and found["checkpoint"] == "models/a"
