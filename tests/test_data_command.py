"""`catlib data`: the layouts, the files it writes, its check, two runs at once, and what it says to wrong input."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
from demo_files import LLAVA
from photo_makers import fill, jpeg

from catlib.cli import main
from catlib.data import tables
from catlib.data.archives import fetch_oxford_pets, unpacked
from catlib.data.check import check
from catlib.data.conversations import PARAPHRASES, answer_for, balance_weights
from catlib.data.dataset import load_dataset
from catlib.data.findings import read_audit
from catlib.data.prepare import prepare
from catlib.data.records import Prediction, PredictionSet, make_sample, read_samples, write_samples
from catlib.errors import CatlibError, InputError
from catlib.evaluation.metrics_file import choose_priority
from catlib.settings import DataSettings

NAMES = ("train.jsonl", "val.jsonl", "test.jsonl", "dataset.json", "groups.csv")


def settings(tmp_path, **more) -> DataSettings:
    values = {"photos": str(tmp_path / "photos"), "data_dir": str(tmp_path / "data"), "run_dir": str(tmp_path / "run")}
    return DataSettings(**{**values, **more})


def oxford(root, present: int = 12):
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    stems = [f"{b}_{i}" for b in ("Bengal", "British_Shorthair") for i in range(1, 15)]
    for n, stem in enumerate(stems):
        if int(stem.rsplit("_", 1)[1]) <= present:
            (root / "images" / f"{stem}.jpg").write_bytes(jpeg(n + 31))
    (root / "images" / "beagle_1.jpg").write_bytes(jpeg(999))
    lines = [f"{stem} 1 1 1" for stem in stems]
    (root / "annotations" / "list.txt").write_text("#Image\n" + "\n".join([*lines, "beagle_1 5 2 1"]) + "\n")
    (root / "annotations" / "trainval.txt").write_text(
        "\n".join(x for x in lines if int(x.split()[0].rsplit("_", 1)[1]) <= 8)
    )
    (root / "annotations" / "test.txt").write_text(
        "\n".join(x for x in lines if int(x.split()[0].rsplit("_", 1)[1]) > 8)
    )
    return root


def test_oxford_layout_packed_or_not(tmp_path):
    root = oxford(tmp_path / "photos")
    plain = prepare(settings(tmp_path))
    assert plain.card["source"] == "oxford-pets" and plain.breeds == ("Bengal", "British Shorthair")
    assert plain.card["missing"]["count"] == 4 and "Bengal_13" in plain.card["missing"]["images"]
    assert {s.image for s in plain.test} == {
        f"images/{b}_{i}.jpg" for b in ("Bengal", "British_Shorthair") for i in range(9, 13)
    }
    packed = tmp_path / "packed"
    packed.mkdir()
    for name in ("images", "annotations"):
        with tarfile.open(packed / f"{name}.tar.gz", "w:gz") as tar:
            tar.add(root / name, name)
    again = prepare(settings(tmp_path, photos=str(packed / "images.tar.gz"), data_dir=str(tmp_path / "other")))
    assert [s.id for s in again.train] == [s.id for s in plain.train]
    (root / "images" / "Bengal_1.jpg").unlink()  # other archives in the same place: their photos, not the earlier ones
    with tarfile.open(packed / "images.tar.gz", "w:gz") as tar:
        tar.add(root / "images", "images")
    other = prepare(settings(tmp_path, photos=str(packed), data_dir=str(tmp_path / "other")))
    assert other.card["missing"]["count"] == 5
    os.truncate(packed / "images.tar.gz", 2000)
    with pytest.raises(InputError, match="cannot be unpacked"):
        prepare(settings(tmp_path, photos=str(packed), data_dir=str(tmp_path / "other")))
    assert (tmp_path / "other" / "photos" / "images" / "Bengal_2.jpg").is_file(), (
        "a broken archive cost the unpacked photos"
    )


@pytest.mark.slow
def test_what_cats_csv_says_goes_into_the_samples_and_one_cat_stays_in_one_part(tmp_path):
    root = tmp_path / "pet"
    rows = ["id,url,age,gender,coat,breed"]
    for b, breed in enumerate(("Bengal", "Manx")):
        (root / "images" / breed).mkdir(parents=True)
        for cat in range(10):
            for n in range(3):
                (root / "images" / breed / f"{7000 + 10 * b + cat}_{n}.jpg").write_bytes(jpeg(500 * b + 10 * cat + n))
            rows.append(f"{7000 + 10 * b + cat},http://x,Senior,Male,,{breed}")
    (root / "images" / "7003_9.jpg").write_bytes(jpeg(8001))  # in no folder, but the table knows its breed
    (root / "images" / "stray.jpg").write_bytes(jpeg(8002))
    (root / "data").mkdir()
    (root / "data" / "cats.csv").write_text("\n".join(rows) + "\n")
    dataset = prepare(settings(tmp_path, photos=str(root)))
    samples = [(sample, part) for part in ("train", "val", "test") for sample in dataset.part(part)]
    assert len(samples) == 61 and dataset.card["left_out"] == {"no breed": 1}
    assert dataset.train[0].metadata["cat"].keys() == {"id", "age", "gender", "coat"}
    parts = {}
    for sample, part in samples:
        parts.setdefault(sample.animal, set()).add(part)
    assert len(parts) == 20 and all(len(where) == 1 for where in parts.values())
    out = tmp_path / "data" / "vlm"
    assert check(out).problems == ()
    again = prepare(settings(tmp_path, photos=str(out / "train.jsonl"), data_dir=str(tmp_path / "d2")))
    assert not {s.animal for s in again.train} & {s.animal for s in (*again.val, *again.test)}
    lines = (out / "test.jsonl").read_text().splitlines(keepends=True)
    (out / "test.jsonl").write_text("".join(lines[1:]))
    with (out / "train.jsonl").open("a") as stream:
        stream.write(lines[0])
    for name in ("dataset.json", "groups.csv"):
        (out / name).unlink()
    shutil.copytree(root / "images", tmp_path / "data" / "images")
    assert [p for p in check(out).problems if "the same cat" in p]


def test_petfinder_and_part_folders(tmp_path):
    root = fill(tmp_path / "pet" / "images", {"sphynx": 8, "Müsli Katze 猫": 8}).parent
    (root / "data").mkdir()
    (root / "data" / "cats.csv").write_text("id,breed\n000,Sphynx - Hairless Cat\n")
    pet = prepare(settings(tmp_path, photos=str(root)))
    assert pet.card["source"] == "petfinder"
    assert pet.breeds == ("Müsli Katze 猫", "Sphynx - Hairless Cat") and pet.card["unknown_breeds"] == [
        "Müsli Katze 猫"
    ]
    with pytest.raises(InputError, match="Müsli"):
        prepare(settings(tmp_path, photos=str(root), unknown_breeds="refuse"))
    parts = tmp_path / "parts"
    for n, part in enumerate(("train", "test")):
        fill(parts / part, {"Bengal": 8, "Manx": 8}, start=200 * n)
    folders = prepare(settings(tmp_path, photos=str(parts), data_dir=str(tmp_path / "d2")))
    assert {s.image.split("/")[0] for s in folders.test} == {"test"} and len(folders.test) == 16
    assert {s.image.split("/")[0] for s in (*folders.train, *folders.val)} == {"train"}


def test_jsonl_is_used_as_it_is_and_wrong_lines_are_named(tmp_path):
    fill(tmp_path / "photos", {"Bengal": 12, "Manx": 12})
    first = prepare(settings(tmp_path))
    again = prepare(settings(tmp_path, photos=str(tmp_path / "data" / "vlm"), data_dir=str(tmp_path / "d2")))
    for part in ("train", "val", "test"):
        assert [(s.id, s.conversations) for s in again.part(part)] == [
            (s.id, s.conversations) for s in first.part(part)
        ]
    row = json.loads((tmp_path / "data" / "vlm" / "train.jsonl").read_text().splitlines()[0])
    for line, culprit in (("{no json", "not JSON"), (json.dumps(row | {"image": "../../etc/passwd"}), "etc/passwd")):
        bad = tmp_path / "photos" / "train.jsonl"
        bad.write_text(json.dumps(row | {"id": "other", "image": "Bengal/000.jpg"}) + "\n" + line + "\n")
        with pytest.raises(InputError, match=culprit) as error:
            prepare(settings(tmp_path, photos=str(bad), data_dir=str(tmp_path / "d3")))
        assert "train.jsonl:2" in str(error.value)


def test_a_missing_breed_is_read_from_the_answer(tmp_path):
    fill(tmp_path / "images", {"Bengal": 12, "Manx": 12})
    (tmp_path / "vlm").mkdir()
    says = ("{}", "This is a {} cat.", "The cat is a {}. Its coat reminds of a Tabby.", "{}, it seems")
    for part, numbers in (("train", range(8)), ("val", range(8, 10)), ("test", range(10, 12))):
        lines = []
        for breed in ("Bengal", "Manx"):
            for i in numbers:
                turns = [
                    {"from": "human", "value": "<image>\nBreed?"},
                    {"from": "gpt", "value": says[i % 4].format(breed)},
                ]
                lines.append({"id": f"{breed}{i}", "image": f"images/{breed}/{i:03d}.jpg", "conversations": turns})
        (tmp_path / "vlm" / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = prepare(settings(tmp_path, photos=str(tmp_path / "vlm")))
    assert [len(dataset.part(part)) for part in ("train", "val", "test")] == [16, 4, 4]
    assert all(sample.image.split("/")[1] == sample.breed for sample in dataset.train)
    for change, culprit in (
        ({"id": "Manx0"}, "Manx0"),
        ({"conversations": [turns[0], turns[1] | {"value": "A cat"}]}, "'breed'"),
    ):
        (tmp_path / "vlm" / "val.jsonl").write_text(json.dumps(lines[0] | change) + "\n")
        with pytest.raises(InputError, match=f"val.jsonl:1.*{culprit}"):
            prepare(settings(tmp_path, photos=str(tmp_path / "vlm")))


def test_the_same_settings_give_the_same_bytes_and_added_photos_move_none(tmp_path):
    photos = fill(tmp_path / "photos", {"Bengal": 20, "Manx": 9})
    first = prepare(settings(tmp_path))
    before = {name: (tmp_path / "data" / "vlm" / name).read_bytes() for name in NAMES}
    prepare(settings(tmp_path))
    prepare(settings(tmp_path, data_dir=str(tmp_path / "fresh")))
    for folder in ("data", "fresh"):
        assert {name: (tmp_path / folder / "vlm" / name).read_bytes() for name in NAMES[:3]} == {
            n: before[n] for n in NAMES[:3]
        }
    assert (tmp_path / "data" / "vlm" / "dataset.json").read_bytes() == before["dataset.json"]
    fill(photos, {"Bengal": 15, "Manx": 4}, start=400)
    later = prepare(settings(tmp_path))
    where = {s.image: part for part in ("train", "val", "test") for s in later.part(part)}
    assert all(where[s.image] == part for part in ("train", "val", "test") for s in first.part(part))


def test_a_split_beside_its_photos_is_made_anew_and_foreign_samples_are_not_replaced(tmp_path, capsys):
    photos = fill(tmp_path / "photos", {"Bengal": 12, "Manx": 12})
    out = photos / "vlm"
    assert main(["data", str(photos), "--out", str(out)]) == 0
    before = {name: (out / name).read_bytes() for name in NAMES}
    assert main(["data", str(photos), "--out", str(out)]) == 0
    assert {name: (out / name).read_bytes() for name in NAMES} == before
    fill(photos, {"Bengal": 3}, start=300)
    dataset = prepare(settings(tmp_path), out)
    assert dataset.card["source"] == "folders" and dataset.card["files_seen"] == 27, (
        "the old split was taken for the source"
    )
    assert dataset.card["unknown_breeds"] == []
    for name in ("dataset.json", "groups.csv"):
        (out / name).unlink()
    capsys.readouterr()
    assert main(["data", str(tmp_path / "photos" / "Bengal"), "--source", "folders", "--out", str(out)]) == 2
    assert main(["data", str(photos), "--source", "folders", "--out", str(out)]) == 2
    assert "has not written" in capsys.readouterr().err and (out / "test.jsonl").read_bytes()


def test_a_run_that_was_cut_short_is_made_anew(tmp_path):
    fill(tmp_path / "photos", {"Bengal": 12, "Manx": 12})
    first = prepare(settings(tmp_path))
    out = tmp_path / "data" / "vlm"
    before = {name: (out / name).read_bytes() for name in NAMES}
    for name in ("dataset.json", "test.jsonl"):  # killed while it wrote the test part
        (out / name).unlink()
    assert prepare(settings(tmp_path)) == first
    assert {name: (out / name).read_bytes() for name in NAMES} == before


@pytest.mark.slow
def test_check_proves_the_split_and_finds_a_leak(tmp_path, capsys):
    fill(tmp_path / "photos", {"Bengal": 15, "Manx": 15})
    out = tmp_path / "data" / "vlm"
    assert main(["data", str(tmp_path / "photos"), "--out", str(out), "--min-test", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["min_test"] == 3
    assert main(["data", "check", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    dataset = load_dataset(out)
    (tmp_path / "photos" / dataset.test[0].image).write_bytes(
        (tmp_path / "photos" / dataset.train[0].image).read_bytes()
    )
    assert main(["data", "check", str(out)]) == 1
    report = capsys.readouterr().out
    assert dataset.test[0].image in report and "same bytes in train and test" in report
    lines = (out / "train.jsonl").read_text()
    (out / "train.jsonl").write_text(lines[: lines.index("\n") + 1])
    assert main(["data", "check", str(out)]) == 2
    assert "train.jsonl" in capsys.readouterr().err


@pytest.mark.slow
def test_two_runs_at_once_leave_one_split(tmp_path):
    fill(tmp_path / "photos", {"Bengal": 30, "Manx": 30})
    command = [
        sys.executable,
        "-m",
        "catlib.cli",
        "data",
        str(tmp_path / "photos"),
        "--out",
        str(tmp_path / "d" / "vlm"),
    ]
    runs = [
        subprocess.Popen([*command, "--seed", str(seed)], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        for seed in (1, 2, 3)
    ]
    for run in runs:
        assert run.wait() == 0, run.stderr.read().decode()
        run.stdout.close(), run.stderr.close()
    dataset = load_dataset(tmp_path / "d" / "vlm")  # compares every file with the card's digest
    alone = prepare(settings(tmp_path, seed=dataset.card["settings"]["seed"]))
    for part in ("train", "val", "test"):
        assert [s.id for s in dataset.part(part)] == [s.id for s in alone.part(part)]


def test_folders_that_cannot_be_read_or_written_are_named(tmp_path, capsys):
    photos = fill(tmp_path / "photos", {"Bengal": 8, "Manx": 8})
    (tmp_path / "file").touch()
    out = str(tmp_path / "d" / "vlm")
    assert main(["data", str(photos), "--out", str(tmp_path / "file" / "vlm")]) == 1
    assert main(["data", str(photos), "--out", out, "--run-dir", str(tmp_path / "file" / "run")]) == 1
    assert capsys.readouterr().err.count("cannot be written") == 2
    for folder, words in ((photos / "Manx", "Manx cannot be read"), (photos, "Permission denied")):
        folder.chmod(0)
        if os.access(folder, os.R_OK):
            pytest.skip("root reads every folder")
        assert main(["data", str(photos), "--out", out]) == 2
        folder.chmod(0o755)
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["nowhere"], "nowhere"),
        (["check"], "one folder"),
        (["fetch", "dogs"], "oxford-pets"),
        (["photos", "--val-share", "much"], "val_share"),
        (["photos", "--priority-breeds", "Korat"], "Korat"),
        (["photos", "--breeds", "Korat"], "Korat"),
        (["photos", "--breeds", "Manx"], "takes two"),
        ([".", "--source", "folders"], "takes two"),
        (["texts"], "Manx/a.jpg (not an image)"),
    ],
)
def test_wrong_input_is_one_paragraph_and_exit_code_2(tmp_path, capsys, monkeypatch, words, culprit):
    fill(tmp_path / "photos", {"Bengal": 8, "Manx": 8})
    for breed in ("Bengal", "Manx") if "texts" in words else ():
        (tmp_path / "texts" / breed).mkdir(parents=True)
        (tmp_path / "texts" / breed / "a.jpg").write_text("hello")
    monkeypatch.chdir(tmp_path)
    assert main(["data", *words, "--out", str(tmp_path / "d" / "vlm")]) == 2
    said = capsys.readouterr().err
    assert culprit in said and "Traceback" not in said


class Ranges(BaseHTTPRequestHandler):
    """Serves the folder of the test, from the byte that a Range header asks for; notes what was asked. Some answers break off."""

    asked: ClassVar[list[str | None]] = []
    broken: ClassVar[int] = 0  # so many answers end after 1,500 bytes
    spoilt: ClassVar[bool] = False  # one byte is not the published one

    def do_GET(self) -> None:
        data = (self.server.folder / self.path.strip("/")).read_bytes()
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = bytearray(data[start:])
        if self.spoilt:
            body[0] ^= 1
        if Ranges.broken:
            Ranges.broken -= 1
            body = body[:1500]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.mark.slow
def test_fetch_resumes_checks_and_says_what_to_do_without_network(tmp_path, monkeypatch):
    site = oxford(tmp_path / "site")
    published = {}
    for name in ("annotations", "images"):
        with tarfile.open(site / f"{name}.tar.gz", "w:gz") as tar:
            tar.add(site / name, name)
        published[f"{name}.tar.gz"] = hashlib.md5((site / f"{name}.tar.gz").read_bytes()).hexdigest()
    to = tmp_path / "to"
    to.mkdir()
    with pytest.raises(CatlibError, match="put both into"):
        fetch_oxford_pets(to, "http://127.0.0.1:9/", published)
    (to / "images.tar.gz.part").write_bytes((site / "images.tar.gz").read_bytes()[:1000])
    monkeypatch.setattr(Ranges, "asked", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    server.folder = site
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        folder = fetch_oxford_pets(to, f"http://127.0.0.1:{server.server_port}/", published)
        assert Ranges.asked == [None, "bytes=1000-"]
        monkeypatch.setattr(Ranges, "broken", 2)  # the connection breaks off twice: it goes on from there by itself
        Ranges.asked.clear()
        (tmp_path / "shaky").mkdir()
        shutil.copy(site / "annotations.tar.gz", tmp_path / "shaky")
        fetch_oxford_pets(tmp_path / "shaky", f"http://127.0.0.1:{server.server_port}/", published)
        assert Ranges.asked == [None, "bytes=1500-", "bytes=3000-"]
        monkeypatch.setattr(Ranges, "spoilt", True)
        with pytest.raises(CatlibError, match="damaged"):
            fetch_oxford_pets(tmp_path / "spoilt", f"http://127.0.0.1:{server.server_port}/", published)
        assert list((tmp_path / "spoilt").iterdir()) == []
    finally:
        server.shutdown()
        server.server_close()
    unpacked(folder, tmp_path / "photos")
    assert (tmp_path / "photos" / "images" / "Bengal_1.jpg").is_file()
    (to / "images.tar.gz").write_bytes(b"damaged")
    with pytest.raises(CatlibError, match="checksum"):
        fetch_oxford_pets(to, "http://127.0.0.1:9/", published)


def test_the_fields_are_those_that_llava_reads(tmp_path):
    """LLaVA's `LazySupervisedDataset` takes `image` and `conversations` with turns {from: human | gpt, value} of each entry,
    joins `image` to its `image_folder`, and expects `<image>` in the first human turn (llava/train/train.py)."""
    fill(tmp_path / "photos", {"Bengal": 12, "Manx": 12})
    dataset = prepare(settings(tmp_path))
    for line in (tmp_path / "data" / "vlm" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert {"id", "image", "conversations"} <= row.keys() and (dataset.image_root / row["image"]).is_file()
        assert [set(turn) for turn in row["conversations"]] == [{"from", "value"}] * 2
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"]
        assert (
            row["conversations"][0]["value"].startswith("<image>\n")
            and "<image>" not in row["conversations"][1]["value"]
        )


def test_the_jsonl_loads_unchanged_in_trl(tmp_path, monkeypatch):
    """Hugging Face datasets reads the file, TRL's collator takes its rows; the loss falls on the answer and its end."""
    datasets = pytest.importorskip("datasets", reason="the extra 'bench' is not installed")
    sft = pytest.importorskip("trl.trainer.sft_trainer", reason="the extra 'bench' is not installed")
    from transformers import AutoProcessor

    fill(tmp_path / "photos", {"Bengal": 12, "Manx": 12})
    dataset = prepare(settings(tmp_path))
    file = str(tmp_path / "data" / "vlm" / "train.jsonl")
    rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == len(dataset.train)
    monkeypatch.chdir(dataset.image_root)  # image paths are relative to the image root
    rows = rows.cast_column("image", datasets.Image())
    processor = AutoProcessor.from_pretrained(os.environ.get("CATLIB_SMALL_LLAVA") or LLAVA)
    batch = sft.DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)([rows[i] for i in range(4)])
    assert batch["pixel_values"].shape[0] == 4
    for i, labels in enumerate(batch["labels"]):
        answer = processor.tokenizer.decode(labels[labels != -100], skip_special_tokens=True)
        assert answer.strip() == dataset.train[i].answer
        assert dataset.train[i].question in processor.tokenizer.decode(batch["input_ids"][i])


def test_conversations_and_weights(tmp_path):
    fill(tmp_path / "photos", {"Bengal": 40, "Manx": 10})
    dataset = prepare(settings(tmp_path))
    assert {s.question for s in dataset.train} == set(PARAPHRASES) and {s.question for s in dataset.test} == {
        PARAPHRASES[0]
    }
    assert set(dataset.train[0].__dataclass_fields__) >= {"id", "image", "conversations"}
    for mode, ratio in (("none", 1.0), ("uniform", 0.0), ("sqrt", 0.5)):
        weights = balance_weights(dataset.train, mode)
        breeds = np.array([s.breed for s in dataset.train])
        n = {b: (breeds == b).sum() for b in ("Bengal", "Manx")}
        drawn = weights[breeds == "Bengal"].sum() / weights[breeds == "Manx"].sum()
        assert np.isclose(drawn, (n["Bengal"] / n["Manx"]) ** ratio) and np.isclose(weights.mean(), 1)
    reasons = answer_for("Bengal", "label+traits")
    assert (
        reasons.startswith("Bengal. ")
        and len(reasons) > 40
        and answer_for("Nobody's Cat", "label+traits") == "Nobody's Cat"
    )


def train_and_val(tmp_path, layout: str) -> str:
    """Two cats' breeds divided into train and val, and one training photo of a York Chocolate."""
    for n, (part, count) in enumerate((("train", 20), ("val", 4))):
        fill(tmp_path / "photos" / part, {"Bengal": count, "Manx": count}, start=200 * n)
    fill(tmp_path / "photos" / "train", {"York Chocolate": 1}, start=900)
    if layout == "folders":
        return str(tmp_path / "photos")
    (tmp_path / "photos" / "vlm").mkdir()
    for part in ("train", "val"):
        samples = []
        for path in sorted((tmp_path / "photos" / part).rglob("*.jpg")):
            image = path.relative_to(tmp_path / "photos").as_posix()
            about = {"breed": path.parent.name, "source": "x", "sha256": "", "split": part}
            samples.append(make_sample(image, image, "?", path.parent.name, **about))
        write_samples(tmp_path / "photos" / "vlm" / f"{part}.jsonl", samples)
    return str(tmp_path / "photos" / "vlm")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["folders", "jsonl"])
def test_files_that_are_split_into_train_and_val_only(tmp_path, capsys, layout):
    photos, out = train_and_val(tmp_path, layout), tmp_path / "data" / "vlm"
    if layout == "jsonl":
        assert check(tmp_path / "photos" / "vlm").problems == ()
    dataset = prepare(settings(tmp_path, photos=photos))
    assert [len(dataset.part(part)) for part in ("train", "val", "test")] == [41, 8, 0]
    assert not (out / "test.jsonl").exists() and "draw_test" in dataset.card["absent"]["test"]
    assert load_dataset(out) == dataset and check(out).problems == ()
    with pytest.raises(InputError, match=r"test.jsonl: there is no test part.*draw_test"):
        read_samples(out / "test.jsonl")
    findings = read_audit(tmp_path / "run" / "audit.csv")
    assert set(tables.counts(dataset).iloc[:, -1]) == {"not measurable"}
    assert "not measurable" in str(tables.conclusion(dataset, findings, check(out)).to_dict())
    drawn = prepare(settings(tmp_path, photos=photos, draw_test=True))
    assert {s.image for s in drawn.val} == {s.image for s in dataset.val}
    assert {s.breed for s in drawn.test} == {"Bengal", "Manx"} and 10 <= len(drawn.test) <= 12
    assert {s.image for s in (*drawn.train, *drawn.test)} == {s.image for s in dataset.train}
    assert "York Chocolate" in drawn.card["remarks"][0] and drawn.card["absent"] == {}
    assert "York Chocolate" in drawn.breeds and check(out).problems == ()
    prepare(settings(tmp_path, photos=photos))
    assert not (out / "test.jsonl").exists(), "the test part of an earlier split is left"


def test_a_priority_breed_without_test_photos_is_left_out_of_the_average_aloud(caplog):
    shown = Prediction("a", "a.jpg", "Burmilla", "Burmilla", None, group="a")
    known = PredictionSet("m", (shown,), {"breeds": ["Bengal", "Burmilla", "York Chocolate"]})
    assert choose_priority(None, [known]) == ("Burmilla",)
    assert "not measurable and in no average: York Chocolate" in caplog.text


def test_images_of_the_petfinder_layout_may_be_a_link_to_another_disk(tmp_path):
    disk = fill(tmp_path / "disk", {"Bengal": 12, "Manx": 12})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "images").symlink_to(disk)
    dataset = prepare(settings(tmp_path))
    assert dataset.card["source"] == "petfinder" and dataset.card["left_out"] == {}
    assert {sample.image.split("/")[0] for sample in dataset.train} == {"disk"}
