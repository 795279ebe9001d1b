"""Photos that are not independent stay together, and a test that is nearer to training than a new cat's photo is called so."""

import os
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from photo_makers import encoded, jpeg, picture
from PIL import Image

from catlib.data.cats import kin_of, rules_of, run_of
from catlib.data.check import check
from catlib.data.findings import Finding, read_audit
from catlib.data.nearness import UNRELATED, by_part, nearness, warnings_of
from catlib.data.prepare import prepare
from catlib.errors import InputError
from catlib.settings import DataSettings

OXFORD = Path(os.environ.get("CATLIB_PHOTOS") or "not there")  # as in the other tests on real photos


def settings(tmp_path, **more) -> DataSettings:
    values = {"photos": str(tmp_path / "photos"), "data_dir": str(tmp_path / "data"), "run_dir": str(tmp_path / "run")}
    return DataSettings(**{**values, **more})


def numbered(tmp_path, n: int = 60, name: str = "{breed}_{i}.jpg") -> None:
    for b, breed in enumerate(("Bengal", "Manx")):
        (tmp_path / "photos" / breed).mkdir(parents=True)
        for i in range(n):
            path = tmp_path / "photos" / breed / name.format(breed=breed, i=i)
            path.write_bytes(jpeg(1000 * b + i))


def parts_by_number(dataset) -> dict[str, list[str]]:
    placed = {s.image: part for part in ("train", "val", "test") for s in dataset.part(part)}
    number = {image: int(Path(image).stem.rsplit("_")[-1]) for image in placed}
    return {
        breed: [placed[image] for image in sorted(placed, key=number.get) if image.startswith(breed)]
        for breed in ("Bengal", "Manx")
    }


def changes(parts: list[str]) -> int:
    return sum(a != b for a, b in pairwise(parts))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "group_by"), [("{breed}_{i}.jpg", "auto"), ("IMG_{i:04d}.jpg", "numbers,id"), ("{i:03d}.jpg", "numbers")]
)
def test_blocks_of_near_numbers_go_whole_into_one_part(tmp_path, name, group_by):
    numbered(tmp_path, name=name)
    dataset = prepare(settings(tmp_path, group_by=group_by))
    for parts in parts_by_number(dataset).values():
        assert changes(parts) == 2 and 10 <= parts.count("test") <= 15 and 6 <= parts.count("val") <= 12
    where = defaultdict(set)
    for part in ("train", "val", "test"):
        for sample in dataset.part(part):
            where[sample.group].add(part)
    assert all(len(parts) == 1 for parts in where.values()) and len(where) == 40
    assert any("numbered names" in line for line in dataset.card["cats"]["said"])
    checked = check(tmp_path / "data" / "vlm")
    assert checked.problems == () and not any("stand beside" in remark for remark in checked.remarks)


@pytest.mark.slow
def test_without_the_rule_the_draw_is_random_and_the_warning_comes(tmp_path):
    numbered(tmp_path)
    dataset = prepare(settings(tmp_path, group_by="none"))
    assert all(changes(parts) > 8 for parts in parts_by_number(dataset).values())
    said = [remark for remark in check(tmp_path / "data" / "vlm").remarks if "stand beside a training photo" in remark]
    assert len(said) == 2 and "test photos" in said[0] and "group_by=numbers" in said[0]


def test_numbers_without_a_text_are_no_runs_unless_asked_for():
    assert run_of("x/Bengal_012.jpg") == ("Bengal_", 12) and run_of("IMG_20200101_7.jpg") == ("IMG_20200101_", 7)
    assert run_of("x/0012.jpg") is None and run_of("x/0012.jpg", any_text=True) == ("", 12)
    assert run_of("7003_1.jpg") is None and run_of("7003_1.jpg", any_text=True) is None and run_of("a.jpg") is None


@pytest.mark.parametrize("wrong", ["", "color", "none,id", "id;numbers"])
def test_a_rule_that_does_not_exist_is_named(wrong):
    with pytest.raises(InputError, match="group_by"):
        rules_of(wrong)
    assert rules_of("id, folder") == ("id", "folder") and rules_of("none") == ()


def test_a_small_breed_is_split_all_the_same(tmp_path):
    numbered(tmp_path, n=9)
    dataset = prepare(settings(tmp_path))
    assert all(set(parts) == {"train", "val", "test"} for parts in parts_by_number(dataset).values())


@pytest.mark.slow
def test_added_photos_move_no_numbered_one(tmp_path):
    numbered(tmp_path)
    before = {s.image: part for part in ("train", "val", "test") for s in prepare(settings(tmp_path)).part(part)}
    for i in (*range(60, 75), 100):
        (tmp_path / "photos" / "Manx" / f"Manx_{i}.jpg").write_bytes(jpeg(5000 + i))
    dataset = prepare(settings(tmp_path))
    after = {s.image: part for part in ("train", "val", "test") for s in dataset.part(part)}
    assert len(after) == len(before) + 16 and {image: after[image] for image in before} == before


def with_time(n: int, camera: str, time: str) -> bytes:
    exif = Image.Exif()
    exif[271], exif[272] = camera, "X"
    exif.get_ifd(0x8769)[36867] = time
    return encoded(picture(n), "JPEG", exif=exif)


def test_one_camera_within_minutes_is_one_group(tmp_path):
    for b, breed in enumerate(("Bengal", "Manx")):
        (tmp_path / "photos" / breed).mkdir(parents=True)
        for i in range(24):  # every third photo half an hour later
            time = f"2024:05:01 {10 + i // 6:02d}:{30 * (i // 3 % 2) + 3 * (i % 3):02d}:00"
            data = with_time(1000 * b + i, "A" if i < 21 else "B", time if i != 23 else "0000:00:00 00:00:00")
            (tmp_path / "photos" / breed / f"{'xyz'[i % 3]}{chr(97 + i)}.jpg").write_bytes(data)
    sizes = sorted(len(photos) for photos in _groups(prepare(settings(tmp_path))).values())
    assert sizes == [1] * 2 + [2] * 2 + [3] * 14
    assert len(_groups(prepare(settings(tmp_path, group_by="id,numbers")))) == 48
    assert {f.taken for f in read_audit(tmp_path / "run" / "audit.csv") if f.image == "Bengal/xa.jpg"} == {
        "A X|2024-05-01T10:00:00"
    }


def test_folders_below_the_breeds_are_groups_only_when_asked_for(tmp_path):
    for b, breed in enumerate(("Bengal", "Manx")):
        for cat in range(8):
            (tmp_path / "photos" / breed / f"cat {cat}").mkdir(parents=True)
            for n in range(3):
                (tmp_path / "photos" / breed / f"cat {cat}" / f"{'abc'[n]}.jpg").write_bytes(
                    jpeg(1000 * b + 10 * cat + n)
                )
        (tmp_path / "photos" / breed / "alone.jpg").write_bytes(jpeg(1000 * b + 500))
    assert len(_groups(prepare(settings(tmp_path)))) == 50
    groups = _groups(prepare(settings(tmp_path, group_by="folder")))
    assert len(groups) == 18 and {len(photos) for photos in groups.values()} == {1, 3}


def _groups(dataset) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for part in ("train", "val", "test"):
        for sample in dataset.part(part):
            groups[sample.group].append(sample.image)
    return groups


def test_ids_are_left_alone_where_they_are_not_asked_for():
    photos = [Finding(f"Bengal/700{i // 2}_{i % 2}.jpg", "Bengal") for i in range(8)]
    assert [len(keys) for keys in kin_of(photos, "auto").keys] == [1] * 8 and len(set(kin_of(photos, "id").ids)) == 4
    assert kin_of(photos, "numbers").keys == [set()] * 8 and set(kin_of(photos, "none").ids) == {""}


def test_a_test_that_is_nearer_than_unrelated_photos_is_found_by_its_features():
    rng = np.random.default_rng(0)
    features, findings = {}, []
    for cat in range(120):
        centre = rng.normal(size=16)
        for n, part in enumerate(("train", "train", "test" if cat % 2 else "val")):
            key = f"{cat} {n}"
            features[key] = centre + 0.2 * rng.normal(size=16) if part != "val" else rng.normal(size=16)
            findings.append(
                Finding(f"{cat}-{'abc'[n]}.jpg", "Manx", part=part, sha256=key, group=str(cat) if n < 2 else key)
            )
    near = nearness(findings, features)
    said = warnings_of(near)
    assert len(said) == 1 and "test" in said[0] and "features" in said[0]
    table = by_part(near)
    assert table.loc["test", "nearer by features"] > 0.9 and abs(table.loc["val", "nearer by features"] - 0.5) < 0.1
    assert table.loc[UNRELATED, "photos"] == 240 and warnings_of(nearness(findings)) == []


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(not OXFORD.is_dir(), reason="CATLIB_PHOTOS names no folder in the Oxford-IIIT Pet layout")
def test_the_warning_comes_for_a_random_split_of_real_photos_and_not_for_the_given_one(tmp_path):
    prepare(settings(tmp_path, photos=str(OXFORD)))
    given = check(tmp_path / "data" / "vlm")
    assert given.problems == () and not [remark for remark in given.remarks if "beside" in remark or "nearer" in remark]
    plain = tmp_path / "photos"
    for path in (OXFORD / "images").glob("*.jpg"):
        breed = plain / path.stem.rsplit("_", 1)[0]
        breed.mkdir(parents=True, exist_ok=True)
        os.link(path, breed / path.name) if path.stat().st_dev == tmp_path.stat().st_dev else (
            breed / path.name
        ).write_bytes(path.read_bytes())
    for group_by, warned in (("none", True), ("auto", False)):
        prepare(settings(tmp_path, data_dir=str(tmp_path / group_by), group_by=group_by))
        remarks = check(tmp_path / group_by / "vlm").remarks
        assert any("test photos stand beside a training photo" in remark for remark in remarks) == warned, remarks
