"""Curves in MLflow and TensorBoard: the same figures as history.jsonl, one run however often it was interrupted."""

import sys

import pytest
from tiny_models import save_llava, settings, write_dataset

from catlib.errors import MissingExtra
from catlib.training.trainer import Trainer, train


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("trackers")
    save_llava(root / "model")
    write_dataset(root / "data")
    return root


def options(place, tracker):
    return settings(place / "model", place / "data" / "vlm", place / tracker, tracker=tracker, watch_photos=0)


def interrupted_then_resumed(place, tracker, monkeypatch):
    """The history of a run that was stopped after its fourth step and went on."""
    monkeypatch.setenv("CATLIB_ROOT", str(place))
    step, calls = Trainer._step, []

    def stopping(self, samples):
        calls.append(1)
        self.interrupt.wanted = len(calls) == 4
        return step(self, samples)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(options(place, tracker))
    history = train(options(place, tracker)).history
    return {kind: [row for row in history if row["kind"] == kind] for kind in ("step", "epoch")}


def test_mlflow_has_one_run_with_the_curves_of_the_history(place, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    rows = interrupted_then_resumed(place, "mlflow", monkeypatch)
    client = mlflow.MlflowClient(f"sqlite:///{place}/outputs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("catlib").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["lora_r"] == "4"
    for key, kind in (("loss", "step"), ("val_loss", "epoch")):
        curve = {point.step: point.value for point in client.get_metric_history(run.info.run_id, key)}
        assert curve == pytest.approx({row["step"]: row[key] for row in rows[kind]})
    train(options(place, "mlflow"))  # nothing is left to train; the same run
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_tensorboard_shows_each_step_once(place, monkeypatch):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = interrupted_then_resumed(place, "tensorboard", monkeypatch)
    events = EventAccumulator(str(place / "outputs" / "tensorboard" / "tensorboard")).Reload()
    for key, kind in (("loss", "step"), ("val_loss", "epoch")):
        curve = [(point.step, point.value) for point in events.Scalars(key)]
        assert [step for step, _ in curve] == [row["step"] for row in rows[kind]]
        assert [value for _, value in curve] == pytest.approx([row[key] for row in rows[kind]], rel=1e-6)


@pytest.mark.parametrize(("tracker", "module"), [("mlflow", "mlflow"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_named_before_a_model_is_loaded(place, monkeypatch, tracker, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("catlib.training.trainer.set_up", lambda *_: pytest.fail("loaded the model first"))
    with pytest.raises(MissingExtra, match=rf"catlib\[{tracker}\]"):
        train(options(place, tracker))
