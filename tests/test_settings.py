"""How parameters reach a notebook: the same by Run All, by papermill and by the runner, with misspelt names seen."""

import logging

import nbformat
import papermill
import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from catlib.errors import InputError
from catlib.reports import stages
from catlib.settings import DataSettings, EvaluationSettings, TrainSettings, derive, find_profile, parse_assignment
from catlib.vlm.models import pick_device

CELL = 'profile = "mine"  # profile\nlr = None  # learning rate\ndevice = None  # device\n'
COLLECT = "from catlib.settings import TrainSettings\nprint(repr(TrainSettings.collect(globals())))"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with the profile `mine`."""
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    profile = "lr: 2e-3\nepochs: 7\ndata_dir: data/x\nlora_targets: q_proj,v_proj\n"
    (tmp_path / "notebooks" / "profiles" / "mine.yaml").write_text(profile)
    monkeypatch.setenv("CATLIB_ROOT", str(tmp_path))
    return tmp_path


def notebook(*cells: str) -> nbformat.NotebookNode:
    """A notebook whose first cell is the parameters cell."""
    first, *others = [new_code_cell(cell) for cell in cells]
    first.metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return new_notebook(cells=[first, *others], metadata=kernel)


def printed(executed: nbformat.NotebookNode) -> str:
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.slow
def test_run_all_papermill_and_the_runner_give_the_same_settings(project):
    expected = TrainSettings.of_profile("mine", {})
    assert (expected.lr, expected.epochs, expected.lora_targets) == (2e-3, 7, "q_proj,v_proj")
    assert expected.run_dir == "outputs/runs/mine" and expected.output_dir == "outputs/vlm_checkpoints/mine"
    assert expected.train_data == "data/x/vlm/train.jsonl"
    # names of settings in other cells, and those of papermill's and IPython's own, are no parameters
    made = notebook(CELL, "device = 3\nbalance = []\nfolder = 'x'", COLLECT)
    by_hand = printed(NotebookClient(made.copy(), kernel_name="python3").execute())
    source = project / "notebooks" / "02_training.ipynb"
    nbformat.write(notebook(CELL.replace("mine", "other"), "device = 3", COLLECT), source)
    papermill.execute_notebook(source, out := project / "out.ipynb", {"profile": "mine"}, progress_bar=False)
    by_papermill = printed(nbformat.read(out, 4))
    (stage,) = stages.plan(find_profile("mine"), {"lr": 0.5, "run": "trial"})
    papermill.execute_notebook(source, out, dict(stage.injected), progress_bar=False)
    assert by_hand.strip() == by_papermill.strip() == repr(expected)
    assert printed(nbformat.read(out, 4)).strip() == repr(TrainSettings(**stage.parameters))
    assert stage.parameters["lr"] == 0.5 and stage.parameters["output_dir"] == "outputs/vlm_checkpoints/trial"


class TestCells:
    """The two cells, found in IPython's history by what they say."""

    def collect(self, *history: str, **namespace: object) -> TrainSettings:
        return TrainSettings.collect({"In": ["", *history], **namespace})

    def test_papermills_cell_wins_and_a_parameters_cell_run_again_starts_anew(self, project):
        injected = "# Parameters\nlr = 0.25\nepochs = 2\n"
        assert self.collect(CELL, injected, "lr = 9", lr=9).lr == 0.25
        again = self.collect(CELL, injected, CELL.replace("lr = None", "lr = 0.125"))
        assert (again.lr, again.epochs) == (0.125, 7)

    def test_any_setting_may_be_written_into_the_cell_and_be_computed(self, project):
        found = self.collect(CELL + "import os\nseed = int(os.environ['X'])\ndata_dir = 'data/y'\n", seed=5)
        assert found.seed == 5 and found.val_data == "data/y/vlm/val.jsonl"

    @pytest.mark.parametrize("cell", [CELL + "learning_rat = 1\nlearning_rate = 0.1\n", CELL + "epochss = 3\n"])
    def test_a_misspelt_name_in_the_cell_is_an_error(self, project, cell):
        with pytest.raises(InputError, match="unknown parameter"):
            self.collect(cell)
        with pytest.raises(InputError, match="did you mean epochs"):
            self.collect(CELL, "# Parameters\nepochss = 3\n")

    def test_without_a_parameters_cell_nothing_is_guessed(self, project):
        with pytest.raises(InputError, match="parameters cell"):
            self.collect("lr = 1", lr=1)

    def test_a_setting_of_another_notebook_is_said_to_have_no_effect(self, project, caplog):
        with caplog.at_level(logging.WARNING):
            self.collect(CELL + "clip_model = 'x'\n")
        assert "clip_model" in caplog.text


def test_outside_ipython_known_names_count(project):
    assert TrainSettings.collect({"profile": "mine", "lr": None, "epochs": 2, "helper": print}).epochs == 2
    assert TrainSettings.collect({}) == TrainSettings()  # no profile: the plan's values


def test_what_follows_from_run_and_data_folder_yields_to_what_is_given():
    assert derive({}) == {}
    found = derive({"run": "b", "output_dir": "models/a", "data_dir": "d/", "train_data": "t"}, "profile")
    assert found == {
        "run": "b",
        "run_dir": "outputs/runs/b",
        "output_dir": "models/a",
        "checkpoint": "models/a",
        "data_dir": "d/",
        "train_data": "t",
        "val_data": "d/vlm/val.jsonl",
        "test_data": "d/vlm/test.jsonl",
    }
    with pytest.raises(InputError, match="becomes a folder"):
        derive({"run": "../x"})


def test_values_are_typed_and_lists_stay_text(project):
    assert parse_assignment("serving_concurrency=1,4") == ("serving_concurrency", "1,4")
    assert parse_assignment("lr=2e-4") == ("lr", 2e-4) and parse_assignment("clip_model=") == ("clip_model", "")
    assert TrainSettings.build({"run": 7}).run == "7"  # papermill reads `-p run 7` as a number
    for wrong in ({"epochs": 1.5}, {"epochs": True}, {"lr": "fast"}, {"mode": "x"}, {"resume": 1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            TrainSettings.build(wrong)


def test_a_profile_by_path_and_what_is_wrong_with_one(project):
    other = project / "elsewhere.yaml"
    other.write_text("data_dir: d\nhint: get the photos first\n")
    found = DataSettings.of_profile(str(other), {})
    assert (found.run, found.data_dir, found.hint) == ("elsewhere", "d", "get the photos first")
    assert EvaluationSettings.of_profile("elsewhere.yaml", {}).test_data == "d/vlm/test.jsonl"
    other.write_text("base_model: demo/models/gone\nhint: make the models first\n")
    with pytest.raises(InputError, match="base_model: .*demo/models/gone; make the models first"):
        TrainSettings.of_profile(str(other), {})
    for text, words in (("lrr: 1", "did you mean lr"), ("- a", "key: value"), ("epochs: many", "whole number")):
        other.write_text(text)
        with pytest.raises(InputError, match=words):
            DataSettings.of_profile(str(other), {})
    with pytest.raises(InputError, match="did you mean mine"):
        find_profile("mime")


def test_a_gpu_may_be_named_by_its_number():
    assert TrainSettings.build({"device": "cuda:1"}).device == "cuda:1"
    for wrong in ("cuda:x", "cuda:", "cpu:1", "cuda:N", "gpu"):
        with pytest.raises(InputError, match="one of auto, cpu, cuda, cuda:N, mps"):
            TrainSettings.build({"device": wrong})


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="needs a machine with fewer than two GPUs")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="device cuda:7: this machine has"):
        pick_device("cuda:7")
