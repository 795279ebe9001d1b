"""What notebook 01 says: F1 intervals, tables and figures, on a small split with known faults."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from catlib.data import plots, tables
from catlib.data.check import check
from catlib.data.conversations import QUESTION
from catlib.data.duplicates import ALIKE, close_pairs
from catlib.data.findings import read_audit
from catlib.data.nearness import nearness
from catlib.data.prepare import prepare
from catlib.settings import DataSettings


def picture(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    field = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(field).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Siamese 40 photos (one re-encoded, one text file), Burmilla 10 (one of them twice as long as the others)."""
    root = tmp_path_factory.mktemp("inspection")
    for breed, n in (("siamese", 40), ("Burmilla", 10)):
        (root / "photos" / breed).mkdir(parents=True)
        for i in range(n):
            seed = 1000 * len(breed) + i
            picture(seed, (288, 72) if (breed, i) == ("Burmilla", 0) else (96, 72)).save(
                root / "photos" / breed / f"{i:03d}.jpg"
            )
    picture(7003).save(root / "photos" / "siamese" / "copy.jpg", quality=50)
    (root / "photos" / "siamese" / "notes.jpg").write_text("no photo")
    settings = DataSettings(photos=str(root / "photos"), data_dir=str(root / "out"), run_dir=str(root / "run"))
    dataset = prepare(settings)
    return dataset, read_audit(root / "run" / "audit.csv"), check(root / "out" / "vlm")


def test_f1_interval_narrows_with_support_and_agrees_with_theory():
    widths = [tables.f1_width(n) for n in (5, 10, 20, 50, 200, 1000)]
    assert widths == sorted(widths, reverse=True)
    # Delta method: F1 = 2T / (T + F + n), T ~ Bin(n, p), F ~ Poisson(n(1 - p)); at T + F = n the slopes are
    # dF1/dT = (2 - p) / 2n and dF1/dF = -p / 2n
    n, p = 1000, tables.SUPPOSED_F1
    variance = ((2 - p) / (2 * n)) ** 2 * n * p * (1 - p) + (p / (2 * n)) ** 2 * n * (1 - p)
    assert tables.f1_width(n) == pytest.approx(2 * 1.96 * variance**0.5, rel=0.05)
    assert tables.f1_interval(0) == (0.0, 1.0)


def test_macro_interval_is_narrower_than_that_of_its_breeds():
    alone = tables.macro_half_width([20])
    assert tables.macro_half_width([20] * 4) == pytest.approx(alone / 2)


def test_tables_name_what_is_in_the_data(case):
    dataset, findings, _ = case
    counts = tables.counts(dataset)
    assert counts.index.tolist() == ["Siamese", "★ Burmilla"] and counts["all"].tolist() == [41, 10]
    low, high = tables.f1_interval(int(counts["test"].iloc[0]))
    assert counts.iloc[0, -1] == f"{100 * low:.0f} to {100 * high:.0f} %"
    dataset = replace(dataset, card={**dataset.card, "missing": {"count": 3, "images": []}})
    left_out = tables.left_out(dataset, findings)
    assert left_out["files"].to_dict() == {"not an image": 1, "listed, but not there": 3}
    assert "notes.jpg" in left_out.loc["not an image", "for example"]
    grey = [replace(findings[0], remarks="greyscale, seen under another breed (A / B)"), findings[1]]
    assert tables.remarks(grey)["photos"].to_dict() == {"greyscale": 1, "seen under another breed": 1}
    assert tables.remarks(findings).empty
    about = tables.about(dataset, findings)[""]
    assert (
        about["layout"].startswith("folders, 52 files") and "siamese → Siamese" in about.filter(like="mapped").iloc[0]
    )
    assert about["question"] == QUESTION
    other = replace(dataset.val[0], conversations=({"from": "human", "value": "<image> Which?"}, {}))
    assert "1 of" in tables.about(replace(dataset, val=(other, *dataset.val[1:])), findings)[""]["question"]


def test_worst_files_are_those_at_the_ends_of_each_measure(case):
    _, findings, _ = case
    small = replace(findings[0], image="tiny.jpg", width=40, height=40)
    shown = {f.image: reason for f, reason in plots.worst_files([*findings, small])}
    assert shown["tiny.jpg"] == "shorter side 40" and shown["Burmilla/000.jpg"] == "longer side : shorter side 4"
    assert len(shown) <= 2 * 8 and plots.worst_files([small, small]) == []


def test_near_duplicates_are_shown_and_the_conclusion_counts(case):
    dataset, findings, checked = case
    pairs = close_pairs(findings, 6)
    assert [(a.image, b.image) for a, b, _ in pairs] == [("siamese/003.jpg", "siamese/copy.jpg")]
    caption = plots.pairs(findings, dataset.image_root, 6).caption
    assert caption.startswith("2 photos") and "6 bits" in caption and "red" not in caption
    # a placeholder saved again and again: 12 million pairs
    crowd = [replace(findings[0], image=f"{i}.jpg") for i in range(5000)]
    assert len(close_pairs(crowd, 6)) == ALIKE * (ALIKE - 1) // 2
    rows = tables.conclusion(dataset, findings, checked)
    split, files, even, priority, measured, shares = (tuple(row) for row in rows.itertuples(index=False))
    assert split[0] == "yes" and "51 photos" in split[1]
    assert files == ("1 of 52 are left out", "1 not an image")
    train = tables.by_breed(dataset)["train"]
    assert even[0] == f"{train['Siamese'] / train['Burmilla']:.1f} to 1" and "balance=sqrt" in even[1]
    assert "points" in priority[0] and "of the 1: " in priority[1]
    assert measured[0].startswith("2 of 2") and "Burmilla 4" in measured[1]
    assert "Burmilla" in shares[1]


def test_of_many_pairs_each_group_has_its_turn_and_pairs_beyond_the_limit_are_found(case):
    _, findings, _ = case
    alike = [replace(findings[0], image=f"{i}.jpg", group="g") for i in range(6)]
    other = [replace(findings[1], image=f"other{i}.jpg", group="h") for i in range(2)]
    apart = replace(findings[0], image="apart.jpg", group="i")
    joined, beyond = plots.pairs_to_show([*alike, *other, apart], 6, most=5)
    assert {pair[0].group for pair in joined} == {"g", "h"} and len(joined) == 2
    assert len(beyond) == 3 and all("apart.jpg" in (a.image, b.image) for a, b, _ in beyond)
    assert all(a.group != b.group for a, b, _ in plots.pairs_to_show(findings, 6, 12)[1])


def test_a_failed_check_is_the_first_word_of_the_conclusion(case):
    dataset, findings, checked = case
    failed = replace(checked, problems=("the same bytes in train and test: a, b",))
    first, why = tables.conclusion(dataset, findings, failed).iloc[0].tolist()
    assert first == "no" and failed.problems[0] in why


@pytest.mark.slow
def test_figures_are_drawn_with_their_photos_marks_and_captions(case):
    dataset, findings, _ = case
    counts = plots.counts(dataset)
    labels = [label.get_text() for label in counts.figure.axes[0].get_yticklabels()]
    assert labels == ["★ Burmilla", "Siamese"] and "2 breeds" in counts.caption
    train = tables.by_breed(dataset)["train"]
    assert f"{train['Siamese'] / train['Burmilla']:.1f} to 1" in counts.caption
    assert "Photos of each breed" in counts.alt and counts._repr_html_().startswith("<figure><img alt=")
    samples = plots.samples(dataset, seed=3)
    assert len(samples.figure.axes) == 2 and "2 of 2 breeds" in samples.caption
    quality = plots.quality(findings)
    assert len(quality.figure.axes) == 8 and "72 pixels" in quality.caption and "1 extreme aspect" in quality.caption
    near = nearness(findings)
    distances = plots.distances(near)
    assert len(distances.figure.axes) == 1 and distances.caption.startswith("No part")
    assert tables.nearness(near).loc["test", "nearer by perceptual hash"].endswith("%")
    pairs = plots.pairs(findings, dataset.image_root, 6).figure
    assert any("Siamese" in text.get_text() for axes in pairs.axes for text in axes.texts)
    none = plots.pairs([], dataset.image_root, 6)
    assert none.figure.axes[0].texts[0].get_text() == "nothing to show" and none.caption.startswith("No two photos")
    worst = plots.worst(findings, dataset.image_root)
    assert len(worst.figure.axes) >= 5 and "beyond a limit" in worst.caption


def test_of_many_breeds_all_priority_breeds_are_shown():
    breeds = [f"breed {i}" for i in range(67)]
    shown = plots.choose(breeds, ["breed 66", "breed 65"])
    assert len(shown) == plots.MOST_BREEDS and {"breed 66", "breed 65"} <= set(shown)
