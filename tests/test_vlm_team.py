"""Several processes train like one: launched by accelerate with the configurations that are shipped, on a CPU over gloo."""

import os
import re
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


def last_weights(place, *folders):
    return [load_file(place / folder / "last" / "adapter_model.safetensors") for folder in folders]


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


def launch(place, config, out, script=("-m", "catlib.cli", "train"), **more):
    usual = vars(TrainSettings())
    given = vars(chosen(place, out, device="auto", **more))  # as users leave it: this machine's CPU
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
        [*command, *script, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "CATLIB_ROOT": str(place / f"root-{out}"),
        },
    )


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp.yaml", "zero2.yaml", "zero3.yaml"])
def test_two_processes_train_like_one_at_the_same_effective_batch(alone, config):
    if config.startswith("zero"):
        pytest.importorskip("deepspeed")
    out = config.removesuffix(".yaml")
    if config == "ddp.yaml":
        stop_after(alone, out, 3)  # one process begins, two go on
    done = launch(alone, config, out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("lie in 2 pieces" in done.stderr) == (config in ("fsdp.yaml", "zero3.yaml"))
    assert ("resumed after step 3 of 8" in done.stderr) == (config == "ddp.yaml")
    assert done.stdout.count("checkpoint: ") == 1
    one, two = curve(alone / "alone"), curve(alone / out)
    assert len(one) == 10 and two == pytest.approx(one, rel=1e-4)
    ours, theirs = last_weights(alone, "alone", out)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


# The command with DeepSpeed's allowance of whole matrices (10^9 numbers, more than these models have) at nothing, which says after
# each step what the process holds, and is killed before the step that is named.
WATCHED = """
import os
import sys
from catlib import cli
from catlib.training import callbacks, trainer

def nothing_ahead(engine):
    coordinator = engine.optimizer.parameter_offload.param_coordinator
    for name in ("max_reuse_dist_in_numel", "max_n_available_params", "prefetch_bucket_sz"):
        assert getattr(coordinator, f"_PartitionedParameterCoordinator__{name}") > 0
        setattr(coordinator, f"_PartitionedParameterCoordinator__{name}", 0)
    keep_whole(engine)

def watched(self, *given):
    if self.state.global_step + 1 == int(os.environ.get("KILLED_AT", 0)):
        os.kill(os.getpid(), 9)
    loss = step(self, *given)
    absent = {name for name, parameter in self.vlm.model.named_parameters() if parameter.numel() == 0}
    matrices = {name for name, module in self.vlm.model.named_modules() if name.endswith(("_proj", "base_layer"))}
    assert absent and {name.removesuffix(".weight") for name in absent} <= matrices, absent
    assert all(".layers." in name and "lora_" not in name and "vision" not in name for name in absent), absent
    os.write(1, b"in pieces: %d, " % len(absent))
    return loss

keep_whole, callbacks.keep_whole = callbacks.keep_whole, nothing_ahead
step, trainer.Trainer.training_step = trainer.Trainer.training_step, watched
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


@pytest.mark.long
@pytest.mark.slow
def test_zero3_cuts_frozen_matrices_and_goes_on_after_a_kill(alone, monkeypatch):
    pytest.importorskip("deepspeed")
    script = [str(alone / "watched.py")]
    Path(script[0]).write_text(WATCHED)
    monkeypatch.setenv("KILLED_AT", "3")
    assert launch(alone, "zero3.yaml", "killed", script).returncode
    assert [path.name for path in (alone / "killed").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.setenv("KILLED_AT", "0")
    done = launch(alone, "zero3.yaml", "killed", script)
    assert done.returncode == 0 and "resumed after step 2 of 8" in done.stderr, done.stderr[-3000:]
    found = re.findall(r"in pieces: (\d+), ", done.stdout)
    assert found == ["21"] * 2 * 6, "7 matrices in each of 3 layers, at each of the 6 steps left, in 2 processes"
    assert curve(alone / "killed") == pytest.approx(curve(alone / "alone"), rel=1e-4)
    ours, theirs = last_weights(alone, "alone", "killed")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp", "zero3"])
def test_four_bit_weights_in_pieces_train_as_whole_ones(tmp_path, config):
    """Beside the same two processes with the whole of them: one process rounds other sums to bf16."""
    if config == "zero3":
        pytest.importorskip("deepspeed")
    save_wide_llava(tmp_path / "model")
    write_dataset(tmp_path / "data", train=6)
    some = "q_proj,k_proj,v_proj,gate_proj,up_proj,down_proj"  # o_proj has no adapter: bitsandbytes' own layer, in pieces as well
    for name in ("ddp", config):
        done = launch(tmp_path, f"{name}.yaml", name, mode="qlora", lora_targets=some)
        assert done.returncode == 0 and ("lie in 2 pieces" in done.stderr) == (name == config), done.stderr[-3000:]
    whole, cut = curve(tmp_path / "ddp"), curve(tmp_path / config)
    assert len(whole) > 3 and cut == pytest.approx(whole, rel=1e-6)
    ours, theirs = last_weights(tmp_path, "ddp", config)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-7) for name in ours)
    cards = [(tmp_path / folder / "README.md").read_text().splitlines() for folder in ("ddp", config)]
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
    for stage, file in (("1", ""), ("3", "own.json")):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", file)
        with pytest.raises(InputError, match="launch with configs/accelerate/zero2.yaml or zero3.yaml"):
            check_launch()
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'catlib\[deepspeed\]'"):
        check_launch()
    monkeypatch.setattr(arguments, "find_spec", lambda name: name)
    assert check_launch() == "zero3"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    assert check_launch() == ""
    with pytest.raises(InputError, match="float32"):
        training_arguments(chosen(alone, "refused"), torch.float16, torch.device("cuda"))
    (alone / "saved").mkdir()
    (alone / "saved" / "latest").write_text("global_step1")
    with pytest.raises(InputError, match="with DeepSpeed"):
        read_progress(alone / "saved", False)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert check_launch() == "fsdp"


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
