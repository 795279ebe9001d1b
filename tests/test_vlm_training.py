"""Training from end to end on tiny models: it learns, saves what loads, resumes to the same weights, stops before it lies."""

import json
import logging
import math
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import BREEDS, QUESTION, save_llava, save_pixtral, save_wide_llava, settings, write_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

from catlib.data.images import open_image
from catlib.data.records import read_samples
from catlib.errors import CatlibError, InputError
from catlib.training.lanes import Lanes
from catlib.training.loss import AnswerLoss, validation_loss
from catlib.training.order import Steps, epoch_order
from catlib.training.report import conclusion, cost_table, curves, epochs_table, setup_table, supervised_html
from catlib.training.trainer import Trainer, TrainResult, out_of_memory, train
from catlib.vlm.adapters import load_adapter
from catlib.vlm.batches import Collator
from catlib.vlm.checkpoint import find_checkpoint, open_vlm
from catlib.vlm.scoring import LabelScorer

LAYOUT = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "training_args.bin",
    "training.json",
    "README.md",
    "history.jsonl",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    save_llava(root / "model")
    write_dataset(root / "data")
    return root


@pytest.fixture(autouse=True)
def own_cache(place, monkeypatch):
    monkeypatch.setenv("CATLIB_ROOT", str(place))


def options(place, out, **more):
    return settings(place / "model", place / "data" / "vlm", out, **more)


def outcome(folder):
    return json.loads((folder / "training.json").read_text())["outcome"]


@pytest.fixture(scope="module")
def trained(place):
    rates = {"lr": 3e-2, "projector_lr": 3e-3}  # a tiny random model has everything to learn, in 24 steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CATLIB_ROOT", str(place))
        yield train(
            options(place, place / "trained", epochs=8, train_projector="full", priority_breeds="Burmilla", **rates)
        )


@pytest.mark.long
@pytest.mark.slow
def test_it_learns_and_says_so(trained, place):
    epochs = [row for row in trained.history if row["kind"] == "epoch"]
    steps = [row for row in trained.history if row["kind"] == "step"]
    assert len(epochs) == 8 and len(steps) == 24
    untrained = open_vlm(str(place / "model"), device="cpu", precision="float32")
    samples = read_samples(place / "data" / "vlm" / "val.jsonl")
    before = validation_loss(AnswerLoss(untrained), Collator(untrained, place / "data"), samples, 4, Lanes(1))
    # Seeds end at 0.28 to 0.37 of the untrained loss; the projector alone, without gradients in LoRA, at 0.99.
    assert epochs[-1]["val_loss"] < 0.6 * before
    assert epochs[-1]["val_loss"] < epochs[0]["val_loss"] < before
    assert steps[0]["lr"] > steps[-1]["lr"] >= 0
    assert all(math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in steps)
    assert all({"val_loss", "accuracy", "priority_f1", "seconds", "peak_memory_gb"} <= row.keys() for row in epochs)
    assert trained.best["val_loss"] == min(row["val_loss"] for row in epochs)


@pytest.mark.slow
def test_checkpoint_has_the_plans_layout_and_a_model_card(trained):
    names = {path.name for path in trained.checkpoint.iterdir()}
    assert names >= LAYOUT
    assert len(list(trained.checkpoint.glob("*.safetensors"))) == 1  # vLLM reads every one
    card = (trained.checkpoint / "README.md").read_text()
    assert card.startswith("---\nbase_model:") and "library_name: peft" in card
    assert "Burmilla (priority) | 3 | 1" in card
    facts = json.loads((trained.checkpoint / "training.json").read_text())
    assert facts["breeds"] == sorted(BREEDS) and facts["question"] == QUESTION
    assert facts["settings"]["lora_alpha"] == 2 * facts["settings"]["lora_r"] and "lora_r 4" in facts["remarks"][0]
    losses = [row["val_loss"] for row in trained.history if row["kind"] == "epoch"]
    expected = {
        "finished": True,
        "stopped_early": False,
        "out_of_memory": 0,
        "val_loss_fell": True,
        "val_losses": losses,
    }
    assert facts["outcome"].items() >= expected.items() and facts["outcome"]["peak_memory_gb"] > 0
    assert not list(trained.checkpoint.glob("checkpoint-*"))
    assert torch.load(trained.checkpoint / "training_args.bin", weights_only=False).learning_rate == 3e-2
    assert json.loads((trained.checkpoint / "preprocessor_config.json").read_text())["image_processor_type"]


@pytest.mark.slow
def test_tuned_model_predicts_and_plain_peft_loads_the_same(trained, place):
    image = open_image(next((place / "data" / "photos").iterdir()))
    vlm = open_vlm(trained.checkpoint, device="cpu", precision="float32")
    ours = LabelScorer(vlm, BREEDS, QUESTION).score([image])
    base = AutoModelForImageTextToText.from_pretrained(place / "model", dtype=torch.float32)
    untuned = open_vlm(str(place / "model"), device="cpu", precision="float32")
    plain = PeftModel.from_pretrained(base, trained.checkpoint).eval()
    AutoProcessor.from_pretrained(trained.checkpoint)
    vlm.model = plain
    theirs = LabelScorer(vlm, BREEDS, QUESTION).score([image])
    assert abs(ours - theirs).max() < 1e-4
    assert abs(ours - LabelScorer(untuned, BREEDS, QUESTION).score([image])).max() > 0.1


def edited(trained, tmp_path, change):
    folder = tmp_path / "edited"
    folder.mkdir()
    for path in trained.checkpoint.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors.sha256").unlink()  # told before anything else, and tested elsewhere
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(next(iter(w))), "is missing|is left over"),
        (lambda w: w.update(stray=torch.zeros(1)), "stray is left over"),
        (lambda w: w.update({next(iter(w)): torch.zeros(3, 3)}), r"\(3, 3\) in place of|has rank 3"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(trained, place, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        open_vlm(
            find_checkpoint(edited(trained, tmp_path, change), base_model=str(place / "model")),
            device="cpu",
            precision="float32",
        )


@pytest.mark.slow
def test_an_adapter_of_another_base_is_refused(trained, tmp_path):
    other = open_vlm(str(save_llava(tmp_path / "other", seed=7)), device="cpu", precision="float32")
    with pytest.raises(InputError, match="was trained on"):
        load_adapter(other, trained.checkpoint)


@pytest.mark.slow
def test_pixtral_trains_saves_loads_and_predicts(place, tmp_path):
    model = save_pixtral(tmp_path / "pixtral")
    result = train(options(place, tmp_path / "out", base_model=str(model), epochs=4, train_projector="full"))
    losses = [row["val_loss"] for row in result.history if row["kind"] == "epoch"]
    assert losses[-1] < losses[0]
    vlm = open_vlm(result.checkpoint, device="cpu", precision="float32")
    images = [open_image(path) for path in sorted((place / "data" / "photos").iterdir())[:3]]
    assert LabelScorer(vlm, BREEDS, QUESTION).score(images).shape == (3, 4)


@pytest.mark.slow
def test_qlora_trains_and_loads(place, tmp_path):
    model = save_wide_llava(tmp_path / "wide")
    result = train(
        options(
            place,
            tmp_path / "out",
            base_model=str(model),
            mode="qlora",
            dtype="auto",
            epochs=3,
            train_projector="lora",
            watch_photos=0,
        )
    )
    losses = [row["loss"] for row in result.history if row["kind"] == "step"]
    assert losses[-1] < losses[0]
    open_vlm(result.checkpoint, device="cpu", precision="4-bit")


@pytest.mark.long
@pytest.mark.slow
def test_cache_checkpointing_and_cut_of_the_batch_do_not_change_the_losses(place, tmp_path):
    ways = [
        {},
        {"cache_features": False},
        {"gradient_checkpointing": True},
        {"batch_size": 4, "gradient_accumulation": 1},
        {"cache_limit_gb": 0.0},
    ]
    losses = []
    for i, way in enumerate(ways):
        more = {"lora_dropout": 0.0, "watch_photos": 0, "epochs": 1, **way}
        result = train(options(place, tmp_path / str(i), **more))
        losses.append([row.get("loss", row.get("val_loss")) for row in result.history])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.long
@pytest.mark.slow
def test_features_on_disk_are_used_and_renewed_when_the_tower_changes(place, tmp_path, monkeypatch):
    from catlib.vlm import features

    computed = []
    plain = features.compute_features
    monkeypatch.setattr(
        features, "compute_features", lambda vlm, images: computed.append(len(images)) or plain(vlm, images)
    )
    monkeypatch.setenv("CATLIB_ROOT", str(tmp_path))
    for _ in range(2):
        train(options(place, tmp_path / "a", epochs=1, watch_photos=0, resume=False))
    assert sum(computed) == 16
    other = save_llava(tmp_path / "other", seed=3)
    train(options(place, tmp_path / "b", base_model=str(other), epochs=1, watch_photos=0))
    assert sum(computed) == 32


@pytest.mark.slow
def test_augmentation_switches_the_cache_off_and_says_so(place, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        first = train(options(place, tmp_path / "a", augment=True, watch_photos=0))
    assert "feature cache is not used" in caplog.text
    second = train(options(place, tmp_path / "b", augment=True, watch_photos=0))
    losses = [[row.get("loss") for row in result.history] for result in (first, second)]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(("after", "number"), [(2, signal.SIGINT), (3, signal.SIGTERM), (5, signal.SIGHUP)])
def test_an_interrupted_run_goes_on_to_the_same_weights(place, tmp_path, monkeypatch, after, number):
    more = {"lora_dropout": 0.1, "epochs": 3, "watch_photos": 0}
    whole = train(options(place, tmp_path / "whole", **more))
    step, calls = Trainer.training_step, []

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == after:
            signal.raise_signal(number)
        return step(self, *given)

    handler = signal.getsignal(number)
    if handler is signal.SIG_IGN:  # the tests run under nohup: the training rightly goes on there
        signal.signal(number, signal.SIG_DFL)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "training_step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(options(place, tmp_path / "cut", **more))
    finally:
        signal.signal(number, handler)
    assert len(calls) == after, "the step that is under way is the last"
    assert load_file(tmp_path / "cut" / "last" / "adapter_model.safetensors")
    assert not outcome(tmp_path / "cut")["finished"]
    cut = train(options(place, tmp_path / "cut", **more))
    weights = [load_file(tmp_path / out / "last" / "adapter_model.safetensors") for out in ("whole", "cut")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert [row.get("loss") for row in cut.history] == [row.get("loss") for row in whole.history]


@pytest.mark.slow
def test_an_interrupted_cell_that_is_run_again_goes_on_in_the_same_process(place, tmp_path, monkeypatch):
    more = {"lora_dropout": 0.1, "epochs": 3, "watch_photos": 0, "log_steps": 2}
    whole = train(options(place, tmp_path / "whole", **more))
    trainer, step, calls = Trainer(options(place, tmp_path / "cut", **more)), Trainer.training_step, []

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) in (2, 5):
            signal.raise_signal(signal.SIGINT)
        return step(self, *given)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
    result = trainer.fit()
    assert len(calls) == 9 and trainer.fit().history == result.history
    assert [row.get("loss") for row in result.history] == [row.get("loss") for row in whole.history]
    weights = [load_file(tmp_path / out / "last" / "adapter_model.safetensors") for out in ("whole", "cut")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.slow
def test_a_second_training_in_the_same_folder_is_refused(place, tmp_path, monkeypatch):
    first, second = (Trainer(options(place, tmp_path / "out", epochs=1, watch_photos=0)) for _ in range(2))
    step = Trainer.training_step

    def meanwhile(self, *given):
        with pytest.raises(InputError, match="another training writes there"):
            second.fit()
        return step(self, *given)

    monkeypatch.setattr(Trainer, "training_step", meanwhile)
    first.fit()


@pytest.mark.slow
@pytest.mark.long
def test_a_run_killed_at_random_moments_goes_on_to_the_same_weights(tmp_path):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from kill_resume import compare

    killed, equal = compare(tmp_path, kills=2, epochs=6, seed=1)
    assert killed and equal


@pytest.mark.slow
def test_a_checkpoint_is_never_replaced_by_other_settings(place, tmp_path, caplog):
    more = {"epochs": 1, "watch_photos": 0}
    train(options(place, tmp_path / "out", **more))
    kept = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(InputError, match="lr 0.005 in place of 0.001"):
        train(options(place, tmp_path / "out", lr=1e-3, **more))
    for number, way in enumerate(({"overwrite": True}, {"run": "out", "run_dir": str(tmp_path / "runs")}), start=1):
        train(options(place, tmp_path / "out", lr=1e-3 * number, **way, **more))
        assert f"out~{number}" in caplog.text
        assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != kept
    assert (tmp_path / "out~1" / "adapter_model.safetensors").read_bytes() == kept
    again = train(options(place, tmp_path / "out", lr=2e-3, **more))  # the same settings: nothing is left to do
    assert len([row for row in again.history if row["kind"] == "epoch"]) == 1


@pytest.mark.slow
def test_options_of_transformers_are_passed_on_and_checked(place, tmp_path):
    more = {"epochs": 2, "watch_photos": 0}
    chosen = options(place, tmp_path / "out", trainer_args={"optim": "adafactor", "max_steps": 2}, **more)
    trainer = Trainer(chosen)
    history = trainer.fit().history
    assert trainer.args.optim == "adafactor" and [row["step"] for row in history] == [1, 2, 2]
    for text, message in (
        ("{optimm: sgd}", "did you mean optim"),
        ("{learning_rate: 1}", "is the setting lr"),
        ("{label_smoothing_factor: 0.1}", "not available"),
        ("[1", "YAML"),
        ("optim", "mapping"),
        ("{optim: nothing}", "nothing"),
    ):
        with pytest.raises(InputError, match=message):
            Trainer(options(place, tmp_path / "other", trainer_args=text, **more))


@pytest.mark.slow
def test_the_checkpoints_question_is_the_one_that_most_validation_samples_ask(place, tmp_path, caplog):
    data = tmp_path / "vlm"
    shutil.copytree(place / "data" / "vlm", data)
    text = (data / "val.jsonl").read_text().replace(QUESTION, "Tell me the breed.")
    (data / "val.jsonl").write_text(text.replace("Tell me the breed.", QUESTION, 1))
    (data / "dataset.json").write_text(json.dumps({"image_root": str(place / "data")}))
    chosen = options(place, tmp_path / "out", val_data=str(data / "val.jsonl"), epochs=1)
    train(chosen)
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    assert (facts["question"], facts["other_questions"]) == ("Tell me the breed.", 1)
    assert "1 of 4 validation samples" in caplog.text


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before_it(place, tmp_path, monkeypatch):
    from catlib.vlm import adapters

    plain, calls = adapters.write_bytes, []

    def full(path, data):
        if path.name == "adapter_model.safetensors":
            calls.append(path)
            if len(calls) > 2:
                raise OSError(28, "No space left on device")
        return plain(path, data)

    monkeypatch.setattr(adapters, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        train(options(place, tmp_path / "out", watch_photos=0))
    open_vlm(tmp_path / "out", device="cpu", precision="float32")


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_and_names_the_samples(place, tmp_path, monkeypatch):
    from catlib.training.loss import AnswerLoss

    plain = AnswerLoss.forward

    def spoiled(self, batch):
        loss, n = plain(self, batch)
        return (loss * float("nan") if "train-5" in batch.sample_ids else loss), n

    monkeypatch.setattr(AnswerLoss, "forward", spoiled)
    with pytest.raises(CatlibError, match=r"loss nan in the samples .*train-5"):
        train(options(place, tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("lanes", (1, 2))
def test_out_of_memory_halves_the_batch_and_keeps_the_effective_one(place, tmp_path, monkeypatch, caplog, lanes):
    from catlib.training.loss import AnswerLoss

    monkeypatch.setattr("catlib.training.trainer.lanes_for", lambda *_: Lanes(lanes))

    more = {"batch_size": 4, "gradient_accumulation": 1, "lora_dropout": 0.0, "epochs": 1, "watch_photos": 0}
    expected = train(options(place, tmp_path / "plain", **more))
    plain = AnswerLoss.forward

    def narrow(self, batch):
        if len(batch.sample_ids) > 2 // lanes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, batch)

    monkeypatch.setattr(AnswerLoss, "forward", narrow)
    result = train(options(place, tmp_path / "out", **more))
    assert "micro-batches of 2" in caplog.text and outcome(tmp_path / "out")["out_of_memory"] == 1
    losses = [[row.get("loss") for row in r.history if row["kind"] == "step"] for r in (expected, result)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_photos_made_ready_ahead_train_to_the_same_weights(place, tmp_path, monkeypatch):
    ready = []
    plain = Collator._photo
    monkeypatch.setattr(
        Collator, "_photo", lambda self, s: ready.append(threading.current_thread().name[:6]) or plain(self, s)
    )
    weights = []
    for workers in (0, 2):
        ready.clear()
        more = {"augment": True, "balance": "uniform", "epochs": 2, "watch_photos": 0, "num_workers": workers}
        result = train(options(place, tmp_path / str(workers), **more))
        weights.append(load_file(result.checkpoint / "last" / "adapter_model.safetensors"))
        ahead = ready.count("photos") / len(ready)
        assert (
            ahead > 0.7 if workers else ahead == 0
        )  # not the batch that is checked first, nor a photo drawn twice in a row
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_an_exploding_loss_and_a_gradient_that_is_no_number_name_their_samples(place, tmp_path, monkeypatch):
    from catlib.training.loss import AnswerLoss

    plain = AnswerLoss.forward

    def exploding(self, batch):
        loss, n = plain(self, batch)
        return (loss * 1000 if "train-7" in batch.sample_ids else loss), n

    def torn(self, batch):
        loss, n = plain(self, batch)
        return (
            loss + (loss - loss.detach()).sqrt() if "train-7" in batch.sample_ids else loss
        ), n  # sqrt(0): infinite slope

    for forward, message in (
        (exploding, r"loss [\d.e+]+ in the samples .*train-7"),
        (torn, r"gradient is not finite.*train-7"),
    ):
        monkeypatch.setattr(AnswerLoss, "forward", forward)
        with pytest.raises(CatlibError, match=message):
            train(options(place, tmp_path / "out", resume=False))


@pytest.mark.slow
def test_the_best_epoch_lies_in_the_folder_and_the_last_one_beside_it(place, tmp_path, monkeypatch):
    from catlib.training import trainer

    measured, plain, states = iter([3.0, 1.0, 2.0]), Trainer.evaluate, []

    def noting(self, *given, **more):
        states.append({name: parameter.detach().clone() for name, parameter in self.trained})
        return plain(self, *given, **more)

    monkeypatch.setattr(trainer, "validation_loss", lambda *_: next(measured))
    monkeypatch.setattr(Trainer, "evaluate", noting)
    result = train(options(place, tmp_path / "out", epochs=3, watch_photos=0, train_projector="none"))
    assert result.best["val_loss"] == 1.0 and result.best["epoch"] == 2
    for folder, epoch in ((result.checkpoint, 1), (result.checkpoint / "last", 2)):
        kept = load_file(folder / "adapter_model.safetensors")
        expected = {name.replace(".default", ""): tensor for name, tensor in states[epoch].items()}
        assert kept.keys() == expected.keys()
        assert all(torch.equal(kept[name], expected[name]) for name in kept)
        open_vlm(folder, device="cpu", precision="float32")


@pytest.mark.long
@pytest.mark.slow
def test_a_disk_that_fills_while_the_state_is_written_leaves_the_state_before_it(place, tmp_path, monkeypatch):
    more = {"epochs": 3, "watch_photos": 0, "save_steps": 1, "lora_dropout": 0.1}
    whole = train(options(place, tmp_path / "whole", **more))
    plain, calls = torch.save, []

    def filling(value, path, *given):
        calls.append(Path(path).name if isinstance(path, str | Path) else "")
        if calls.count("optimizer.pt") == 5:
            Path(path).write_bytes(b"half of it")
            raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")
        plain(value, path, *given)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", filling)
        with pytest.raises(CatlibError, match=r"checkpoint-5.*No space left"):
            train(options(place, tmp_path / "cut", **more))
    assert [path.name for path in (tmp_path / "cut").glob("*checkpoint-*")] == ["checkpoint-4"]
    cut = train(options(place, tmp_path / "cut", **more))
    assert [row.get("loss") for row in cut.history] == [row.get("loss") for row in whole.history]
    weights = [load_file(tmp_path / out / "last" / "adapter_model.safetensors") for out in ("whole", "cut")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.slow
def test_early_stopping(place, tmp_path):
    result = train(options(place, tmp_path / "out", lr=1e-12, epochs=5, early_stopping=1, watch="priority_f1"))
    assert len([row for row in result.history if row["kind"] == "epoch"]) == 2
    assert outcome(tmp_path / "out")["stopped_early"]


def test_errors_that_say_that_memory_is_full():
    words = (
        "CUDA out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
        "DefaultCPUAllocator: can't allocate memory",
    )
    assert all(out_of_memory(RuntimeError(text)) for text in words)
    assert not out_of_memory(RuntimeError("shapes do not fit"))


def test_order_is_a_function_of_seed_and_epoch_and_balance_draws_rare_breeds_more(place):
    from catlib.data.records import read_samples

    samples = read_samples(place / "data" / "vlm" / "train.jsonl")
    assert epoch_order(samples, 1, 0) == epoch_order(samples, 1, 0) != epoch_order(samples, 1, 1)
    assert sorted(epoch_order(samples, 1, 0)) == list(range(12))
    uneven = [s for s in samples if s.breed != "Manx"] * 10 + [s for s in samples if s.breed == "Manx"][:1]
    seen = sum(uneven[i].breed == "Manx" for e in range(40) for i in epoch_order(uneven, 0, e, "uniform"))
    assert seen / (40 * len(uneven)) == pytest.approx(0.25, abs=0.05)
    asked = []
    steps = Steps(samples[:10], 4, 1, "none", lambda: 4, lambda *given: asked.append(given), lambda _: None)
    order = epoch_order(samples[:10], 1, 1)
    assert list(steps) == [order[:4], order[4:8], order[8:]] and len(steps) == 3
    assert asked == [(1, [samples[i] for i in order[:4]])], "the fourth step of all was the first of the second epoch"


@pytest.mark.parametrize(
    ("losses", "training", "fell", "overfits"),
    [
        ([1.0, 0.6, 0.5], 0.4, "in every epoch", "no sign"),
        ([1.0, 0.6, 0.5], 0.1, "in every epoch", "remembers"),
        ([1.0, 0.5, 0.505], 0.4, "until epoch 2", "levelled off"),
        ([1.0, 0.5, 0.9], 0.1, "until epoch 2", "after epoch 2"),
        ([0.5, 0.6], 0.4, "first epoch is the best", "after epoch 1"),
        ([0.5], 0.4, "no trend", "no sign"),
    ],
)
def test_the_conclusion_follows_from_the_history(losses, training, fell, overfits):
    epochs = [
        {"kind": "epoch", "step": 3 * n, "epoch": n, "val_loss": loss, "accuracy": 0.5, "seconds": n}
        for n, loss in enumerate(losses, start=1)
    ]
    step = {"kind": "step", "step": 1, "loss": training, "lr": 1e-4, "grad_norm": 1.0, "photos_per_second": 3.0}
    best = min(epochs, key=lambda row: row["val_loss"])
    said = conclusion(TrainResult(Path(), [step, *epochs], best, {}), "val_loss")
    assert fell in said.loc["Did the validation loss fall?", "answer"]
    assert overfits in said.loc["Does it overfit?", "answer"]
    assert f"epoch {best['epoch']}" in said.loc["Which epoch is kept?", "answer"]
    assert f"{best['val_loss']:.3f}" in curves([step, *epochs]).caption
    assert list(epochs_table([step, *epochs]).index) == [f"{row['epoch']}" for row in epochs]


@pytest.mark.slow
def test_tables_and_figure_of_a_training(trained, place):
    trainer = Trainer(options(place, place / "trained", epochs=8, train_projector="full", lr=3e-2, projector_lr=3e-3))
    assert trainer.fit().history == trained.history, "a finished training is not done again"
    assert "12 of 4 breeds" in setup_table(trainer).loc["training photos", "value"]
    assert supervised_html(trainer).count("Manx") == 1
    assert cost_table(trainer, trained).loc["out of memory", "value"] == "never"


@pytest.mark.long
@pytest.mark.slow
def test_it_goes_on_from_an_adapter_with_new_breeds_and_shows_the_old_ones_apart(trained, place, tmp_path):
    data = tmp_path / "vlm"
    shutil.copytree(place / "data" / "vlm", data)
    (data / "dataset.json").write_text(json.dumps({"image_root": str(place / "data")}))
    for part in ("train", "val"):  # the Siamese become a new breed, and the Burmilla have no training photo any more
        rows = [json.loads(line) for line in (data / f"{part}.jsonl").read_text().splitlines()]
        rows = [row for row in rows if part == "val" or row["metadata"]["breed"] != "Burmilla"]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{part}.jsonl").write_text(text.replace("Siamese", "Tonkinese"))
    more = {"train_data": str(data / "train.jsonl"), "val_data": str(data / "val.jsonl"), "train_projector": "full"}
    chosen = options(place, tmp_path / "out", init_adapter=str(place / "trained"), epochs=1, lr=1e-12, **more)
    trainer = Trainer(chosen)
    before = load_file(place / "trained" / "adapter_model.safetensors")
    for name, parameter in trainer.trained:
        saved = before[name.replace(".default", "").replace("modules_to_save.", "")]
        assert torch.equal(parameter, saved) and parameter.dtype is torch.float32, name
    result = trainer.fit()
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    assert facts["breeds"] == sorted([*BREEDS, "Tonkinese"]) and facts["lineage"]["breeds"] == sorted(BREEDS)
    assert facts["lineage"]["folder"] == str(place / "trained") and len(facts["lineage"]["sha256"]) == 64
    assert 0 <= result.history[-1]["old_accuracy"] <= 1 and "breeds known before" in epochs_table(result.history)
    for wrong, message in (
        ({"lora_r": 8}, "r 4 in place of 8"),
        ({"train_projector": "none"}, "modules_to_save"),
        ({"init_adapter": str(tmp_path / "nowhere")}, "nowhere"),
        ({"init_adapter": str(place / "model")}, "no adapter"),
    ):
        given = {**vars(chosen), "output_dir": str(tmp_path / "wrong"), "lora_alpha": 0, **wrong}
        with pytest.raises(InputError, match=message):
            Trainer(type(chosen).build(given))
