"""Curves in MLflow, TensorBoard and W&B: the figures of history.jsonl, one run however often it was interrupted, and never its end."""

import logging
import sqlite3
import sys

import pytest
from tiny_models import save_llava, settings, write_dataset
from transformers import TrainerCallback

from catlib.training.callbacks import Tracker
from catlib.training.trainer import Trainer, train

NEVER = ("on_init_end", "on_predict", "on_prediction_step", "on_push_begin", "on_substep_end")  # do not occur here


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("trackers")
    save_llava(root / "model")
    write_dataset(root / "data")
    return root


def options(place, report_to, name=""):
    out = place / (name or report_to)
    return settings(place / "model", place / "data" / "vlm", out, report_to=report_to, watch_photos=0)


def interrupted_then_resumed(place, report_to, monkeypatch):
    """The history of a run that was stopped after its fourth step and went on."""
    monkeypatch.setenv("CATLIB_ROOT", str(place))
    step, calls = Trainer.training_step, []

    def stopping(self, *given):
        calls.append(1)
        self.interrupted = len(calls) == 4
        return step(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(options(place, report_to))
    history = train(options(place, report_to)).history
    return {kind: [row for row in history if row["kind"] == kind] for kind in ("step", "epoch")}


@pytest.mark.slow
def test_mlflow_has_one_run_with_the_curves_of_the_history(place, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    rows = interrupted_then_resumed(place, "mlflow", monkeypatch)
    client = mlflow.MlflowClient(f"sqlite:///{place}/outputs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("catlib").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["learning_rate"] == "0.005"
    for key, name, kind in (("loss", "loss", "step"), ("val_loss", "eval_loss", "epoch")):
        curve = {point.step: point.value for point in client.get_metric_history(run.info.run_id, name)}
        assert curve == pytest.approx({row["step"]: row[key] for row in rows[kind]})
    train(options(place, "mlflow"))  # nothing is left to train; the same run
    assert len(client.search_runs([run.info.experiment_id])) == 1


@pytest.mark.slow
def test_an_mlflow_store_that_is_locked_at_the_second_step_does_not_end_training(place, monkeypatch, caplog):
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("CATLIB_ROOT", str(place / "locked"))
    step, held = Trainer.training_step, []

    def locking(self, *given):
        if self.state.global_step == 1 and not held:
            held.append(sqlite3.connect(place / "locked" / "outputs" / "mlflow.db"))
            held[0].execute("BEGIN EXCLUSIVE")
        return step(self, *given)

    monkeypatch.setattr(Trainer, "training_step", locking)
    history = train(options(place, "mlflow", "of-locked")).history
    held[0].close()
    assert len([row for row in history if row["kind"] == "step"]) == 6
    assert caplog.text.count("takes no curves") == 1


@pytest.mark.slow
def test_tensorboard_shows_each_step_once(place, monkeypatch):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = interrupted_then_resumed(place, "tensorboard", monkeypatch)
    events = EventAccumulator(str(place / "outputs" / "tensorboard" / "tensorboard")).Reload()
    for key, name, kind in (("loss", "train/loss", "step"), ("val_loss", "eval/loss", "epoch")):
        curve = [(point.step, point.value) for point in events.Scalars(name)]
        assert [step for step, _ in curve] == [row["step"] for row in rows[kind]]
        assert [value for _, value in curve] == pytest.approx([row[key] for row in rows[kind]], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("report_to", ["mlflow", "tensorboard", "wandb"])
def test_a_missing_package_is_named_once_and_training_goes_on(place, monkeypatch, caplog, report_to):
    monkeypatch.setenv("CATLIB_ROOT", str(place))
    for name in ("mlflow", "wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    result = train(options(place, report_to, f"without-{report_to}"))
    assert result.history[-1]["kind"] == "epoch"
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING and report_to in r.message]
    assert len(warnings) == 1 and f"catlib[{report_to}]" in warnings[0]


@pytest.mark.slow
@pytest.mark.parametrize("event", sorted(name for name in vars(TrainerCallback) if name.startswith("on_")))
def test_a_tracker_that_fails_is_let_be(place, monkeypatch, caplog, event):
    class Broken(TrainerCallback):
        calls = 0

        def fail(self, *given, **more):
            self.calls += 1
            raise OSError("database is locked")

    broken = Broken()
    setattr(broken, event, broken.fail)
    monkeypatch.setenv("CATLIB_ROOT", str(place))
    monkeypatch.setattr(Tracker, "_open", lambda self, step: setattr(self, "inner", broken))
    monkeypatch.setattr(Tracker, "_run_id", lambda self: "1")
    result = train(options(place, "mlflow", f"broken-{event}"))
    assert result.outcome["finished"] and len(result.history) == 8
    assert caplog.text.count("database is locked") == broken.calls == (event not in NEVER)
