"""Labels that lie: ranked by confident learning, decided by a person, applied and recorded by the next split."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from photo_makers import fill

from catlib.cli import main
from catlib.data.audit import audit, quality_limits
from catlib.data.check import check
from catlib.data.corrections import COLUMNS, read_corrections, write_suspects
from catlib.data.dataset import load_dataset
from catlib.data.export import export_hf
from catlib.data.findings import Finding, read_audit
from catlib.data.prepare import prepare
from catlib.data.records import make_sample
from catlib.data.suspects import find_suspects, out_of_fold, similar_pairs
from catlib.errors import InputError
from catlib.settings import DataSettings

BREEDS = ("Bengal", "Korat", "Manx", "Ragdoll")


def settings(tmp_path, **more) -> DataSettings:
    values = {"photos": str(tmp_path / "photos"), "data_dir": str(tmp_path / "data"), "run_dir": str(tmp_path / "run")}
    return DataSettings(**{**values, **more})


def labelled(flip: float, seed: int = 0, each: int = 60):
    """Samples of four breeds, two of each cat, with features that tell the breeds apart; some labels flipped to the next breed."""
    rng = np.random.default_rng(seed)
    centres = 3 * rng.normal(size=(4, 24))
    samples, features, wrong = [], [], []
    for i in range(4 * each):
        true = i % 4
        flipped = rng.random() < flip
        breed = BREEDS[(true + flipped) % 4]
        about = {"breed": breed, "source": "x", "sha256": f"{i:064x}", "split": "train", "group": f"{true} {i // 8}"}
        samples.append(make_sample(str(i), f"{i}.jpg", "?", breed, **about))
        features.append(centres[true] + 1.5 * rng.normal(size=24))
        wrong.append(flipped)
    return samples, np.array(features), {sample.image for sample, flip in zip(samples, wrong, strict=True) if flip}


@pytest.mark.slow
def test_flipped_labels_come_first_with_the_breed_that_they_had_and_the_rate():
    samples, features, wrong = labelled(0.1)
    found = find_suspects(samples, features)
    first = found.table.head(len(wrong))
    assert first["image"].isin(wrong).mean() > 0.9 and first["image"].isin(wrong).sum() >= 0.75 * len(wrong)
    true = {sample.image: BREEDS[int(sample.image[:-4]) % 4] for sample in samples}
    assert (first["likely"] == first["image"].map(true)).mean() > 0.9
    assert abs(found.noise - len(wrong) / len(samples)) < 0.05 < found.noise_at_most and found.judged == 240
    assert found.by_breed["photos"].sum() == 240 and set(found.by_breed.index) == set(BREEDS)
    top = {(row["label"], row["likely"]) for row in found.confusion.head(4).to_dict("records")}
    assert top == {(BREEDS[(i + 1) % 4], BREEDS[i]) for i in range(4)}
    assert len(find_suspects(*labelled(0.0)[:2]).table) <= 5


@pytest.mark.slow
def test_no_fold_splits_a_group_and_a_breed_of_one_group_is_not_judged():
    rng = np.random.default_rng(1)
    groups = [str(i // 2) for i in range(80)]
    features = np.repeat(
        rng.normal(size=(40, 64)), 2, axis=0
    )  # both photos of a group are one: memory would give 100 %
    labels = np.repeat(rng.integers(0, 2, 40), 2)
    assert (out_of_fold(features, labels, groups).argmax(1) == labels).mean() < 0.75
    samples, features, _ = labelled(0.1)
    one = [
        make_sample(
            f"s{i}", f"s{i}.jpg", "?", "Sokoke", breed="Sokoke", source="x", sha256=f"s{i}", split="test", group="s"
        )
        for i in (1, 2)
    ]
    found = find_suspects([*samples, *one], np.concatenate([features, features[:2]]))
    assert found.judged == 240 and "Sokoke" not in found.by_breed.index
    with pytest.raises(InputError, match="two groups"):
        find_suspects(one, features[:2])


def test_similar_photos_of_other_groups_are_listed():
    samples, features, _ = labelled(0.0)
    features[5], features[7] = features[100] + 0.01, features[3] + 0.01
    pairs = similar_pairs(samples, features, 0.99)
    assert {tuple(sorted(pair)) for pair in pairs[["image", "other"]].to_numpy().tolist()} == {("100.jpg", "5.jpg")}
    assert pairs["cosine"].iloc[0] > 0.99, "photos 3 and 7 are of one group"


def edit(path: Path, actions: dict[str, tuple[str, str]], delimiter: str = ",") -> None:
    """Fill in the table as a person does, whose spreadsheet may save it with another delimiter."""
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row["action"], row["to"] = actions.get(row["image"], ("", ""))
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def suspected(tmp_path, dataset, images: dict[str, str]) -> Path:
    """suspects.csv with these photos and their likely breed."""
    import pandas as pd

    samples = {s.image: s for part in ("train", "val", "test") for s in dataset.part(part)}
    rows = [
        (samples[image].metadata["sha256"], image, samples[image].breed, likely) for image, likely in images.items()
    ]
    table = pd.DataFrame(rows, columns=["sha256", "image", "breed", "likely"])
    return write_suspects(tmp_path / "data" / "vlm", table, pd.DataFrame({"cosine": []}))


@pytest.mark.slow
@pytest.mark.parametrize("delimiter", [",", ";"])
def test_decisions_are_applied_recorded_and_not_asked_again(tmp_path, delimiter):
    fill(tmp_path / "photos", {"Bengal": 15, "Manx": 15, "Korat": 15})
    before = prepare(settings(tmp_path))
    names = [sample.image for sample in before.train if sample.breed == "Bengal"][:5]
    path = suspected(tmp_path, before, dict.fromkeys(names, "Manx"))
    edit(
        path,
        {names[0]: ("relabel", ""), names[1]: ("Relabel", "korat"), names[2]: ("drop", ""), names[3]: ("keep", "")},
        delimiter,
    )
    dataset = prepare(settings(tmp_path))
    samples = {s.image: s for part in ("train", "val", "test") for s in dataset.part(part)}
    assert samples[names[0]].breed == samples[names[0]].answer == "Manx" and samples[names[1]].breed == "Korat"
    assert names[2] not in samples and samples[names[3]].breed == samples[names[4]].breed == "Bengal"
    assert dataset.card["left_out"] == {"dropped": 1}
    assert "corrections: keep 1, relabel 2, drop 1 photos" in dataset.card["notes"]
    table = {f.image: f for f in read_audit(tmp_path / "run" / "audit.csv")}
    assert "was Bengal" in table[names[0]].remarks and check(tmp_path / "data" / "vlm").problems == ()
    record = tmp_path / "data" / "vlm" / "corrections.csv"
    first = record.read_bytes()
    assert first.decode().splitlines()[0] == ",".join(COLUMNS) and len(first.splitlines()) == 5
    path.unlink()  # the record alone gives the same split
    assert prepare(settings(tmp_path)).train == dataset.train and record.read_bytes() == first
    again = suspected(tmp_path, dataset, {names[3]: "Manx", names[4]: "Manx"})
    assert names[3] not in again.read_text() and names[4] in again.read_text()
    edit(again, {names[4]: ("drop", "")})
    assert len(prepare(settings(tmp_path)).part("train")) == len(dataset.train) - 1
    assert len(read_corrections(record.parent)) == 5


@pytest.mark.slow
def test_a_record_by_hand_may_name_photos_by_their_path(tmp_path):
    fill(tmp_path / "photos", {"Bengal": 15, "Manx": 15})
    dataset = prepare(settings(tmp_path))
    name = dataset.train[0].image
    (tmp_path / "data" / "vlm" / "corrections.csv").write_text(f"Image;Action\n{name};drop\n")
    again = prepare(settings(tmp_path))
    assert again.card["left_out"] == {"dropped": 1} and name not in {sample.image for sample in again.train}
    assert prepare(settings(tmp_path)).train == again.train


@pytest.mark.parametrize(
    ("action", "words"),
    [(("delete", ""), "suspects.csv:2.*delete"), (("relabel", "Poodle"), "Poodle"), (("relabel", " "), "Manx")],
)
def test_a_wrong_decision_is_named(tmp_path, action, words):
    fill(tmp_path / "photos", {"Bengal": 15, "Manx": 15})
    dataset = prepare(settings(tmp_path))
    name = dataset.train[0].image
    path = suspected(tmp_path, dataset, {name: "Manx"})
    edit(path, {name: action})
    if words == "Manx":  # an empty cell means the likely breed
        assert next(s for s in prepare(settings(tmp_path)).train if s.image == name).breed == "Manx"
        return
    with pytest.raises(InputError, match=words):
        prepare(settings(tmp_path))


@pytest.mark.slow
def test_similar_photos_are_joined_only_when_asked(tmp_path):
    import pandas as pd

    fill(tmp_path / "photos", {"Bengal": 20, "Manx": 20})
    dataset = prepare(settings(tmp_path))
    with pytest.raises(InputError, match=r"similar.csv.*catlib data suspects"):
        prepare(settings(tmp_path, join_similar=0.9))
    pair = [next(s for s in dataset.part(part) if s.breed == "Manx") for part in ("train", "test")]
    row = (0.95, *(s.metadata["sha256"] for s in pair))
    similar = pd.DataFrame([row], columns=["cosine", "sha256", "other_sha256"])
    write_suspects(tmp_path / "data" / "vlm", pd.DataFrame({"sha256": []}), similar)
    assert prepare(settings(tmp_path, join_similar=0.96)).train == dataset.train
    groups = {
        s.image: s.group
        for part in ("train", "val", "test")
        for s in prepare(settings(tmp_path, join_similar=0.9)).part(part)
    }
    assert groups[pair[0].image] == groups[pair[1].image] and len(set(groups.values())) == 39


@pytest.mark.slow
def test_an_interrupted_audit_goes_on_where_it_was(tmp_path, monkeypatch):
    from catlib.data import audit as module

    photos = fill(tmp_path / "photos", {"Bengal": 150, "Manx": 50})
    opened: list[str] = []
    inspect = module.inspect

    def counted(root, finding, *rest):
        opened.append(finding.image)
        if stop and len(opened) > 130:
            raise KeyboardInterrupt
        return inspect(root, finding, *rest)

    monkeypatch.setattr(module, "inspect", counted)
    monkeypatch.setattr(module, "WORKERS", 1)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        prepare(settings(tmp_path))
    stop, first = False, Counter(opened)
    unfinished = tmp_path / "run" / ".audit.unfinished"
    kept = sum(len(json.loads(line)) for line in unfinished.read_text().splitlines()[1:])
    assert kept >= 64 and kept % 8 == 0
    with unfinished.open("a") as stream:
        stream.write('{"cut off')
    changed = next(iter(json.loads(unfinished.read_text().splitlines()[1]))).split(" ")[0]
    (photos / changed).write_bytes((photos / "Manx" / "000.jpg").read_bytes() + b"\0")
    opened.clear()
    prepare(settings(tmp_path))
    assert len(opened) == 200 - kept + 1 and changed in opened and not unfinished.exists()
    assert sum(first.values()) >= 130
    resumed = (tmp_path / "run" / "audit.csv").read_bytes()
    prepare(settings(tmp_path, data_dir=str(tmp_path / "other"), run_dir=str(tmp_path / "whole")))
    assert (tmp_path / "whole" / "audit.csv").read_bytes() == resumed


def test_what_a_photo_is_like_is_remarked_by_limits_that_are_settings(tmp_path):
    from photo_makers import picture
    from PIL import Image, ImageFilter, ImageOps

    plain = picture(3, (300, 240)).filter(ImageFilter.SHARPEN)
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 255, (240, 300, 3), dtype=np.uint8))
    plain = Image.blend(plain, noisy, 0.4)
    files = {
        "plain": plain,
        "dark": plain.point(lambda v: v // 6),
        "light": plain.point(lambda v: 225 + v // 9),
        "blurred": plain.filter(ImageFilter.GaussianBlur(30)),
        "extreme aspect": ImageOps.fit(plain, (300, 90)),
        "border": ImageOps.expand(plain, 60, "black"),
        "low contrast": plain.point(lambda v: 110 + v // 20),
        "little information": ImageOps.expand(Image.new("RGB", (60, 60), "white"), 90, "gray"),
    }
    for name, image in files.items():
        image.save(tmp_path / f"{name}.png")
    quality = DataSettings().quality
    found = {f.image[:-4]: f for f in audit(tmp_path, [Finding(f"{name}.png", "cat") for name in files], 32, quality)}
    assert found["plain"].quality == "" and 60 < found["plain"].brightness < 200
    for name in set(files) - {"plain"}:
        assert name in found[name].quality.split(", "), found[name]
    assert audit(tmp_path, [Finding("dark.png", "cat")], 32)[0].quality == ""
    strict = audit(tmp_path, [Finding("plain.png", "cat")], 32, "contrast<200, entropy < 7.99")[0]
    assert strict.quality == "low contrast, little information"
    for wrong in ("contrast", "contrast<", "hue<3", "contrast>3", "contrast<-1", "contrast<nan"):
        with pytest.raises(InputError, match="quality"):
            quality_limits(wrong)


def test_the_export_is_read_by_datasets_with_its_parts_classes_and_photos(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")
    fill(tmp_path / "photos", {"Bengal": 20, "Manx": 20})
    dataset = prepare(settings(tmp_path))
    to = export_hf(tmp_path / "data" / "vlm", tmp_path / "hf")
    read = datasets.load_dataset(str(to), cache_dir=str(tmp_path / "cache"))
    assert {part: len(read[part]) for part in read} == {p: len(dataset.part(p)) for p in ("train", "val", "test")}
    read = {part: read[part] for part in read}
    row, sample = read["val"][0], dataset.val[0]
    assert row["id"] == sample.id and row["group"] == sample.group and row["answer"] == sample.answer
    assert read["val"].features["breed"].int2str(row["breed"]) == sample.breed and row["image"].size == (64, 48)
    with pytest.raises(InputError, match="exists"):
        export_hf(tmp_path / "data" / "vlm", to)
    again = prepare(settings(tmp_path, photos=str(to), data_dir=str(tmp_path / "d2")))
    for part in ("train", "val", "test"):
        assert [
            (s.breed, s.group, s.metadata["sha256"])
            for s in sorted(again.part(part), key=lambda s: s.metadata["sha256"])
        ] == [
            (s.breed, s.group, s.metadata["sha256"])
            for s in sorted(dataset.part(part), key=lambda s: s.metadata["sha256"])
        ]


def test_the_commands_say_what_is_missing(tmp_path, capsys):
    fill(tmp_path / "photos", {"Bengal": 12, "Manx": 12})
    prepare(settings(tmp_path))
    vlm = str(tmp_path / "data" / "vlm")
    assert load_dataset(Path(vlm)).breeds == ("Bengal", "Manx")
    for words, culprit in (
        (["suspects", vlm], "--encoder"),
        (["export", "csv", vlm], "export hf"),
        (["suspects"], "one folder"),
    ):
        assert main(["data", *words]) == 2
        assert culprit in capsys.readouterr().err
