"""The one opener with its list of formats, the one walk over folders, and the groups that go with every photo."""

import hashlib
import io
import json
import os
import struct
import time
import zlib
from dataclasses import replace

import pytest
from photo_makers import encoded, fill, jpeg, picture
from PIL import EpsImagePlugin, Image

from catlib.data import images
from catlib.data.archives import ORIGIN
from catlib.data.audit import audit
from catlib.data.check import check
from catlib.data.conversations import QUESTION, questions_of
from catlib.data.findings import Finding
from catlib.data.images import FORMATS, MAX_ASPECT, ImageError, open_image
from catlib.data.prepare import prepare
from catlib.data.records import (
    Prediction,
    make_sample,
    prediction_line,
    read_predictions,
    read_samples,
    write_samples,
)
from catlib.data.sources import read_source
from catlib.data.walk import photo_files
from catlib.errors import InputError
from catlib.settings import DataSettings

BREEDS = ("Bengal", "Manx")


def settings(tmp_path, **more) -> DataSettings:
    values = {"photos": str(tmp_path / "photos"), "data_dir": str(tmp_path / "data"), "run_dir": str(tmp_path / "run")}
    return DataSettings(**{**values, **more})


def verdict(path) -> Finding:
    return audit(path.parent, [Finding(path.name, "cat")], 8)[0]


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_every_format_of_the_list_opens_whatever_its_ending(tmp_path, kind):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(picture(1), kind))
    assert open_image(path).size == picture(1).size and images.size_of(path) == picture(1).size
    assert verdict(path).kept


@pytest.mark.parametrize("kind", ["EPS", "PPM", "TGA", "ICO", "PCX", "JPEG2000", "DDS", "SGI"])
def test_no_other_format_reaches_its_decoder(tmp_path, monkeypatch, kind):
    def ghostscript(*_: object, **__: object) -> None:
        raise AssertionError("an EPS file was handed to Ghostscript")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(picture(1), kind))
    Image.open(path).close()  # Pillow knows it
    for opened in (path, io.BytesIO(path.read_bytes())):
        with pytest.raises(ImageError, match="not a photo") as error:
            open_image(opened)
        assert error.value.verdict == "not an image"
    finding = verdict(path)
    assert finding.verdict == "not an image" and finding.detail.startswith("begins with b'")


def test_audit_and_opener_agree_on_size_orientation_and_whatever_a_decoder_raises(tmp_path, monkeypatch):
    path = tmp_path / "photo.png"
    strange = Image.Exif()
    strange[274] = 65535
    path.write_bytes(encoded(picture(1, (96, 64)), "PNG", exif=strange))
    assert open_image(path).size == (verdict(path).width, verdict(path).height) == (96, 64)
    lab = tmp_path / "lab.tif"
    lab.write_bytes(encoded(Image.new("LAB", (64, 48), (120, 9, 80)), "TIFF"))
    assert open_image(lab).mode == "RGB" and verdict(lab).kept
    with monkeypatch.context() as patched:
        patched.setattr(images, "MAX_PIXELS", 96 * 64 - 1)
        with pytest.raises(ImageError, match="96 x 64 pixels"):
            open_image(path)
        assert verdict(path).verdict == "too large"
    for error, name in (
        (RuntimeError("bad tile"), "broken"),
        (ZeroDivisionError(), "broken"),
        (EOFError(), "truncated"),
    ):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
        with pytest.raises(ImageError, match="photo.png: broken image") as raised:
            open_image(path)
        found = verdict(path)
        assert found.verdict == raised.value.verdict == name and found.detail == raised.value.detail != ""


def test_one_walk_for_the_split_and_for_predict(tmp_path):
    photos = fill(tmp_path / "photos", {"Bengal": 2, "Manx": 1})
    (photos / "Manx" / "modern.AVIF").write_bytes(encoded(picture(5), "AVIF"))
    for name in (".ipynb_checkpoints/x.jpg", "@eaDir/x.jpg", "__MACOSX/x.jpg"):
        (photos / "Bengal" / name).parent.mkdir()
        (photos / "Bengal" / name).write_bytes(jpeg(6))
    (photos / "Bengal" / "._x.jpg").write_bytes(b"\0\5\26\7")
    (photos / "Bengal" / "Thumbs.db").write_bytes(b"x")
    (photos / "Bengal" / "notes.txt").write_text("x")
    (photos / "Bengal" / "back").symlink_to(photos)
    (photos / "Bengal" / "gone.jpg").symlink_to(photos / "nothing.jpg")
    (photos / "vlm").mkdir()
    for name in ("dataset.json", "train.jsonl", "x.jpg"):
        (photos / "vlm" / name).write_text("{}")
    found, skipped = photo_files(photos)
    names = [path.relative_to(photos).as_posix() for path in found]
    assert names == ["Bengal/000.jpg", "Bengal/001.jpg", "Manx/000.jpg", "Manx/modern.AVIF"]
    assert skipped == {
        "hidden or a system's": 5,
        "no photo ending": 1,
        "not a file": 1,
        "a split": 1,
        "a link to a folder above": 1,
    }
    source = audit(photos, read_source(photos, "auto").findings, 8)
    assert [finding.image for finding in source if finding.kept] == names


def test_every_sample_has_a_group_and_no_group_is_in_two_parts(tmp_path):
    photos = fill(tmp_path / "photos", {"Bengal": 14, "Manx": 14})
    with Image.open(photos / "Bengal" / "000.jpg") as photo:
        (photos / "Bengal" / "again.jpg").write_bytes(encoded(photo, "JPEG", quality=40))
    dataset = prepare(settings(tmp_path))
    samples = {s.image: s for part in ("train", "val", "test") for s in dataset.part(part)}
    assert (
        samples["Bengal/again.jpg"].group
        == samples["Bengal/000.jpg"].group
        == samples["Bengal/000.jpg"].metadata["group"]
    )
    assert len({sample.group for sample in samples.values()}) == len(samples) - 1
    where: dict[str, set[str]] = {}
    for sample in samples.values():
        where.setdefault(sample.group, set()).add(sample.metadata["split"])
    assert all(len(parts) == 1 for parts in where.values())


def test_a_group_that_samples_state_is_kept_together_and_checked(tmp_path):
    photos = fill(tmp_path / "photos", {"Bengal": 24, "Manx": 24})
    lines = []
    for breed in BREEDS:
        for i in range(24):
            upload = f"{breed} {i // 3}"
            image = f"{breed}/{i:03d}.jpg"
            lines.append(
                make_sample(image, image, "?", breed, breed=breed, source="x", sha256="", split="", group=upload)
            )
    write_samples(photos / "train.jsonl", lines)
    dataset = prepare(settings(tmp_path, photos=str(photos / "train.jsonl")))
    parts: dict[str, set[str]] = {}
    for part in ("train", "val", "test"):
        for sample in dataset.part(part):
            place = int(sample.image[-7:-4]) // 3
            parts.setdefault(f"{sample.breed} {place}", set()).add(f"{part} {sample.group}")
    assert len(parts) == 16 and all(len(where) == 1 for where in parts.values())
    out = tmp_path / "data" / "vlm"
    assert check(out).problems == ()
    for name in ("dataset.json", "groups.csv"):  # anybody's files, with a group that crosses
        (out / name).unlink()
    for breed in BREEDS:
        (photos / breed).rename(tmp_path / "data" / breed)
    tested = dataset.test[0]
    moved = replace(tested, metadata={**tested.metadata, "group": dataset.train[0].group})
    write_samples(out / "test.jsonl", [moved, *dataset.test[1:]])
    assert any("one group" in problem and tested.image in problem for problem in check(out).problems)


def test_a_sample_without_a_group_is_alone():
    sample = make_sample("a", "a.jpg", "?", "Manx", breed="Manx", source="x", sha256="ab12", split="test")
    assert sample.group == "ab12"
    assert replace(sample, metadata={"breed": "Manx"}).group == "a"
    assert replace(sample, metadata={"breed": "Manx", "group": 17}).group == "17"


def test_predictions_carry_the_group_and_files_without_are_read_with_a_remark(tmp_path):
    path = tmp_path / "m.jsonl"
    (tmp_path / "m.meta.json").write_text(json.dumps({"name": "m", "breeds": list(BREEDS)}))
    with path.open("w") as stream:
        for id, group in (("a", "g"), ("b", "g")):
            stream.write(prediction_line(Prediction(id, f"{id}.jpg", "Manx", "Manx", (-1.0, -0.5), group=group)))
    read = read_predictions(path)
    assert [prediction.group for prediction in read.predictions] == ["g", "g"] and read.remarks == ()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[1]["group"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_predictions(path)
    assert [prediction.group for prediction in read.predictions] == ["g", None]
    assert len(read.remarks) == 1 and "1 of 2" in read.remarks[0]


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"group": 3}, "group"),
        ({"scores": [-1.0, float("nan")]}, "NaN"),
        ({"scores": [-1.0, True]}, "scores"),
        ({"scores": [-1.0, 10**400]}, "scores"),
        ({"latency_ms": "fast"}, "latency_ms"),
        ({"predicted": "Korat"}, "Korat"),
    ],
)
def test_a_wrong_prediction_is_named_with_its_line(tmp_path, change, culprit):
    row = {"id": "a", "image": "a.jpg", "breed": "Manx", "predicted": "Manx", "scores": [-1.0, -0.5]}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "id": "b", **change}) + "\n")
    (tmp_path / "m.meta.json").write_text(json.dumps({"breeds": list(BREEDS)}))
    with pytest.raises(InputError, match=rf"m.jsonl:2.*{culprit}"):
        read_predictions(tmp_path / "m.jsonl")


def test_the_question_of_samples_is_the_most_frequent_one(tmp_path):
    asked = ["Which?", "Which?", "What?", QUESTION]
    rows = [
        make_sample(str(i), f"{i}.jpg", question, "Manx", breed="Manx", source="x", sha256="", split="val")
        for i, question in enumerate(asked)
    ]
    write_samples(tmp_path / "val.jsonl", rows)
    assert questions_of(read_samples(tmp_path / "val.jsonl")) == ("Which?", 2)
    assert questions_of(rows[2:]) == (min("What?", QUESTION), 1)
    assert questions_of([]) == (QUESTION, 0)


def test_missing_photos_quote_the_hint_of_the_profile(tmp_path):
    for photos in ("", str(tmp_path / "nowhere")):
        with pytest.raises(InputError, match="photos") as error:
            prepare(settings(tmp_path, photos=photos))
        assert photos in str(error.value)
        with pytest.raises(InputError, match="run make cats"):
            prepare(settings(tmp_path, photos=photos, hint="run make cats"))


@pytest.mark.parametrize("size", [(2_700_000, 33), (33, 2_700_000), (51, 1)])
def test_one_limit_of_the_aspect_ratio_for_audit_and_opener(tmp_path, size):
    header = struct.pack(">IIBBBBB", *size, 1, 0, 0, 0, 0)
    pixels = zlib.compress((b"\0" * ((size[0] + 7) // 8 + 1)) * size[1])
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in
              ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))]  # fmt: skip
    path = tmp_path / "photo.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    start = time.perf_counter()
    found = verdict(path)
    for use in (open_image, images.size_of):
        with pytest.raises(ImageError, match="one side over 50 times the other") as error:
            use(path)
        assert (error.value.verdict, error.value.detail) == (found.verdict, found.detail)
    assert found.verdict == "too long" and time.perf_counter() - start < 5


def test_a_panorama_within_the_limit_is_a_photo_for_audit_and_opener(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(picture(1, (MAX_ASPECT * 8, 8)), "PNG"))
    assert open_image(path).size == (400, 8) and verdict(path).kept


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["files", "folders", "a hub's cache"])
@pytest.mark.parametrize("layout", ["folders", "petfinder"])
def test_a_folder_of_links_is_a_folder_of_photos(tmp_path, kind, layout):
    disk, photos = fill(tmp_path / "disk", {"Bengal": 12, "Manx": 12}), tmp_path / "photos"
    below = photos / "images" if layout == "petfinder" else photos
    below.mkdir(parents=True)
    for breed in BREEDS:
        if kind == "folders":
            (below / breed).symlink_to(disk / breed)
            continue
        (below / breed).mkdir()
        for i, file in enumerate(sorted((disk / breed).iterdir())):
            if kind == "a hub's cache":  # blobs without an ending, named by their digest
                file = file.rename(tmp_path / "disk" / hashlib.sha256(file.read_bytes()).hexdigest())
            (below / breed / f"{i // 2 + 70 + 10 * len(breed)}_{i % 2}.jpg").symlink_to(file)
    dataset = prepare(settings(tmp_path))
    samples = [sample for part in ("train", "val", "test") for sample in dataset.part(part)]
    assert len(samples) == 24 and dataset.image_root == tmp_path
    assert all(open_image(images.inside(dataset.image_root, sample.image)) for sample in samples)
    assert "24 of 24 files are links that lead out of" in dataset.card["notes"][-1]
    out = tmp_path / "data" / "vlm"
    assert check(out).problems == ()
    beside = photos / "vlm"
    prepare(settings(tmp_path), beside)
    assert prepare(settings(tmp_path), beside).card["source"] == layout, "the split was taken for the source"
    if kind != "folders":
        assert len({sample.group for sample in samples}) == len({sample.animal for sample in samples}) == 12
    again = prepare(settings(tmp_path, photos=str(out), data_dir=str(tmp_path / "d2")))
    assert {sample.image for sample in again.train} == {sample.image for sample in dataset.train}
    if kind == "files":  # but never on the way of a path in a file
        os.rename(disk / "Bengal", tmp_path / "moved")
        (disk / "Bengal").symlink_to("/usr")
        with pytest.raises(InputError, match="by the link disk/Bengal"):
            prepare(settings(tmp_path, photos=str(out), data_dir=str(tmp_path / "d3")))


def test_links_to_one_another_end_the_walk_and_links_in_an_unpacked_archive_stay_outside(tmp_path):
    photos = fill(tmp_path / "photos", {"Bengal": 12, "Manx": 12})
    elsewhere = fill(tmp_path / "elsewhere", {"x": 1}, start=500)
    (photos / "Bengal" / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(photos)
    found, skipped = photo_files(photos)
    assert len(found) == 25 and skipped == {"a link to a folder above": 1}
    assert len(prepare(settings(tmp_path)).card["left_out"]) == 0
    (photos / ORIGIN).write_text("archives")
    assert prepare(settings(tmp_path)).card["left_out"] == {"outside the root": 1}
