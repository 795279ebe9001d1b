"""Several processes train like one: launched by accelerate with the configurations that are shipped, on a CPU over gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import save_llava, save_wide_llava, settings, write_dataset

from catlib.errors import InputError
from catlib.settings import TrainSettings
from catlib.training import arguments
from catlib.training.arguments import check_launch, own_autocast, training_arguments
from catlib.training.order import share
from catlib.training.record import read_history
from catlib.training.saves import read_progress
from catlib.training.trainer import Trainer, train

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "accelerate"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of model and data, and a run of one process in it."""
    place = tmp_path_factory.mktemp("team")
    save_llava(place / "model")
    write_dataset(place / "data", train=14)  # the last step of an epoch is smaller than the others
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CATLIB_ROOT", str(place))
        result = train(chosen(place, "alone"))
        assert result.history[-1]["val_loss"] < result.history[0]["loss"]
        yield place


def chosen(place, out, **more):
    return settings(place / "model", place / "data" / "vlm", place / out, lora_dropout=0.0, save_steps=1, **more)


def curve(folder):
    return [row.get("loss", row.get("val_loss")) for row in read_history(folder / "history.jsonl")]


def stop_after(place, out, step):
    """A run of one process that is interrupted after an optimizer step."""
    trainer = Trainer(chosen(place, out))
    plain = trainer.training_step

    def watched(*given):
        trainer.interrupted = trainer.state.global_step + 1 == step
        return plain(*given)

    trainer.training_step = watched
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


def launch(place, config, out, **more):
    usual = vars(TrainSettings())
    given = vars(chosen(place, out, **more))
    arguments = [f"--{name}={value}" for name, value in given.items() if value != usual[name]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / config),
        "--main_process_port",
        str(port),
    ]
    return subprocess.run(
        [*command, "-m", "catlib.cli", "train", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CATLIB_ROOT": str(place / f"root-{out}")},
    )


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp.yaml", "zero2.yaml"])
def test_two_processes_train_like_one_at_the_same_effective_batch(alone, config):
    if config == "zero2.yaml":
        pytest.importorskip("deepspeed")
    out = config.removesuffix(".yaml")
    if config == "ddp.yaml":
        stop_after(alone, out, 3)  # one process begins, two go on
    done = launch(alone, config, out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("lie in 2 pieces" in done.stderr) == (config == "fsdp.yaml")
    assert ("resumed after step 3 of 8" in done.stderr) == (config == "ddp.yaml")
    assert done.stdout.count("checkpoint: ") == 1
    one, two = curve(alone / "alone"), curve(alone / out)
    assert len(one) == 10 and two == pytest.approx(one, rel=1e-4)
    ours, theirs = (load_file(alone / folder / "last" / "adapter_model.safetensors") for folder in ("alone", out))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


@pytest.mark.long
@pytest.mark.slow
def test_four_bit_weights_in_pieces_train_as_whole_ones(tmp_path):
    """Beside the same two processes with the whole of them: one process rounds other sums to bf16."""
    save_wide_llava(tmp_path / "model")
    write_dataset(tmp_path / "data", train=6)
    some = "q_proj,k_proj,v_proj,gate_proj,up_proj,down_proj"  # o_proj has no adapter: bitsandbytes' own layer, in pieces as well
    for config in ("ddp", "fsdp"):
        done = launch(tmp_path, f"{config}.yaml", config, mode="qlora", lora_targets=some)
        assert done.returncode == 0 and ("lie in 2 pieces" in done.stderr) == (config == "fsdp"), done.stderr[-3000:]
    whole, cut = curve(tmp_path / "ddp"), curve(tmp_path / "fsdp")
    assert len(whole) > 3 and cut == pytest.approx(whole, rel=1e-6)
    ours, theirs = (load_file(tmp_path / folder / "last" / "adapter_model.safetensors") for folder in ("ddp", "fsdp"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-7) for name in ours)
    cards = [(tmp_path / folder / "README.md").read_text().splitlines() for folder in ("ddp", "fsdp")]
    counts = [[line for line in card if "parameters were trained" in line] for card in cards]
    assert counts[0] == counts[1] != []


def test_processes_share_a_step_and_its_photos_are_seen_once():
    photos = list(range(8))
    for most, processes in ((4, 3), (2, 3), (4, 1), (1, 8)):
        turns = [share(photos, most, rank, processes) for rank in range(processes)]
        assert sorted(photo for own in turns for batch, weight in own for photo in batch if weight) == photos
        assert len({len(own) for own in turns}) == 1, "who has fewer batches repeats one with weight 0"
    assert [len(batch) for batch, _ in share(photos, 4)] == [4, 4]
    assert [len(own[0][0]) for own in (share(photos, 4, rank, 3) for rank in range(3))] == [3, 3, 2]
    assert share(photos[:1], 4, 1, 2) == [([0], 0.0)]


@pytest.mark.slow
def test_what_a_launch_cannot_do_is_said(alone, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for stage, file in (("3", ""), ("2", "own.json")):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", file)
        with pytest.raises(InputError, match="launch with configs/accelerate/zero2.yaml, or fsdp.yaml"):
            check_launch(chosen(alone, "refused"))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'catlib\[deepspeed\]'"):
        check_launch(chosen(alone, "refused"))
    monkeypatch.setattr(arguments, "find_spec", lambda name: name)
    assert check_launch(chosen(alone, "allowed", mode="qlora")) is False
    with pytest.raises(InputError, match="float32"):
        training_arguments(chosen(alone, "refused"), torch.float16, torch.device("cuda"))
    (alone / "saved").mkdir()
    (alone / "saved" / "latest").write_text("global_step1")
    with pytest.raises(InputError, match="with DeepSpeed"):
        read_progress(alone / "saved", False)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert check_launch(chosen(alone, "allowed", mode="qlora")) is True


@pytest.mark.slow
def test_deepspeed_does_not_round_what_is_trained(alone, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert not training_arguments(chosen(alone, "allowed"), torch.bfloat16, torch.device("cuda")).bf16
    with own_autocast(SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cpu"))):
        assert torch.is_autocast_enabled("cpu")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    assert training_arguments(chosen(alone, "allowed"), torch.bfloat16, torch.device("cpu")).bf16


def test_configurations_name_the_command_that_uses_them():
    for path in CONFIGS.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert f"accelerate launch --config_file configs/accelerate/{path.name}" in text
        assert yaml.safe_load(text)["num_machines"] == 1
