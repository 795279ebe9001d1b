"""Size and reality: many files in one folder, hashes that crowd together, and the real photos from end to end."""

import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from photo_makers import fill, jpeg

from catlib.data.check import check
from catlib.data.duplicates import group_labels, near_pairs
from catlib.data.findings import read_audit
from catlib.data.prepare import prepare
from catlib.data.sources import read_source
from catlib.settings import DataSettings

PRIORITY = "Birman,Bombay,Egyptian Mau"


@pytest.mark.slow
def test_a_folder_of_many_files_is_listed_without_opening_them(tmp_path):
    folder = tmp_path / "Siamese"
    folder.mkdir()
    for i in range(20_000):
        os.close(os.open(folder / f"{i}.jpg", os.O_CREAT))
    start = time.process_time()
    source = read_source(tmp_path, "auto")
    assert len(source.findings) == 20_000
    assert time.process_time() - start < 5


@pytest.mark.slow
def test_near_pairs_of_many_hashes_are_fast_and_small():
    """80,000 hashes, half of them one bit away from another: an exhaustive search would compare 3.2 billion pairs."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**64, 40_000, dtype=np.uint64)
    hashes = np.concatenate([base, base ^ (np.uint64(1) << rng.integers(0, 64, 40_000).astype(np.uint64))])
    tracemalloc.start()
    start = time.process_time()
    pairs, gaps = near_pairs(hashes, 6)
    assert time.process_time() - start < 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 1e6 < peak < 500e6
    found = {tuple(pair) for pair, gap in zip(pairs.tolist(), gaps.tolist(), strict=True) if gap == 1}
    assert {(i, i + 40_000) for i in range(40_000)} <= found


def test_thousands_of_equal_photos_are_one_group_without_their_pairs():
    labels = group_labels(np.array([5] * 50_000 + [2**64 - 1], dtype=np.uint64), 6)
    assert len(set(labels[:50_000].tolist())) == 1 and labels[-1] != labels[0]


def test_odd_names_survive_to_the_jsonl(tmp_path):
    """Spaces, accents (composed and, as macOS writes them, not), commas, quotes, line breaks; bytes that are no text are left out."""
    photos = fill(tmp_path / "my photos", {"Siamese": 12, "Caf\u00e9 au lait": 8})
    fill(photos, {"Cafe\u0301 au lait": 4}, start=60)
    names = ('a, "b"\n\t.jpg', "-rf.jpg", "猫 Nr. 3.JPG", "x" * 240 + ".jpg")
    for i, name in enumerate(names):
        (photos / "Siamese" / name).write_bytes(jpeg(9000 + i))
    Path(os.fsdecode(os.fsencode(photos / "Siamese") + b"/\xff.jpg")).write_bytes(jpeg(9100))
    (photos / "docs").mkdir()
    (photos / "docs" / "about.txt").write_text("a folder without photos is no breed")
    dataset = prepare(DataSettings(photos=str(photos), data_dir=str(tmp_path / "out"), run_dir=str(tmp_path / "run")))
    images = {sample.image for part in ("train", "val", "test") for sample in dataset.part(part)}
    assert len(images) == 28 and {f"Siamese/{name}" for name in names} <= images
    assert dataset.breeds == ("Caf\u00e9 au lait", "Siamese") and dataset.card["unknown_breeds"] == [
        "Caf\u00e9 au lait"
    ]
    assert dataset.card["left_out"] == {"bad name": 1, "no photo ending": 1}
    assert read_audit(tmp_path / "run" / "audit.csv")[-1].image == "docs/about.txt"
    assert check(tmp_path / "out" / "vlm").problems == ()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = os.environ.get("CATLIB_PHOTOS")
    if not folder or not (Path(folder) / "annotations" / "list.txt").is_file():
        pytest.skip("CATLIB_PHOTOS names no folder in the Oxford-IIIT Pet layout")
    out = tmp_path_factory.mktemp("real")
    made = {}
    for seed in (0, 1, 2):
        settings = DataSettings(
            photos=folder,
            data_dir=str(out / str(seed)),
            run_dir=str(out / str(seed)),
            seed=seed,
            priority_breeds=PRIORITY,
        )
        made[seed] = prepare(settings)
    return out, made


@pytest.mark.slow
def test_real_photos_are_all_accounted_for(real):
    out, made = real
    findings = read_audit(out / "0" / "audit.csv")
    listed = (Path(os.environ["CATLIB_PHOTOS"]) / "annotations" / "list.txt").read_text().split("\n")
    cats = [line for line in listed if line and not line.startswith("#") and line.split()[2] == "1"]
    missing = made[0].card["missing"]
    assert len(findings) + missing["count"] == len(cats) and missing["count"] == len(missing["images"])
    assert made[0].priority_breeds == ("Birman", "Bombay", "Egyptian Mau")


@pytest.mark.slow
def test_no_group_of_real_photos_crosses_parts(real):
    out, made = real
    for seed in made:
        assert check(out / str(seed) / "vlm").problems == ()


def test_real_parts_are_blocks_of_numbers(real):
    """The given test part stays as it is; validation is the block of each breed's highest other numbers, whatever the seed."""
    out, made = real
    number = lambda image: int(Path(image).stem.rsplit("_", 1)[1])  # noqa: E731
    annotations = Path(os.environ["CATLIB_PHOTOS"]) / "annotations"
    listed = {line.split()[0] for line in (annotations / "test.txt").read_text().splitlines() if line[:1] not in "#"}
    joined = {f.image for f in read_audit(out / "0" / "audit.csv") if f.verdict.startswith("near-duplicate of")}
    for dataset in made.values():
        assert dataset.part("val") == made[0].part("val")
        assert {Path(s.image).stem for s in dataset.part("test")} <= listed
        assert not {Path(s.image).stem for p in ("train", "val") for s in dataset.part(p)} & listed
        for breed in dataset.breeds:
            train, val = (
                sorted(number(s.image) for s in dataset.part(part) if s.breed == breed) for part in ("train", "val")
            )
            assert abs(len(val) / (len(train) + len(val)) - 0.15) <= 0.05, (breed, len(train), len(val))
            # near-duplicates of a photo before the block come into it from anywhere, and nothing else does
            later = [n for n in train if n > val[len(val) // 3]]
            assert len(later) <= 0.05 * len(train), (breed, later, val)
    assert len(joined) < 20
