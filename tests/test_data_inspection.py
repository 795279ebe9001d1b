"""What notebook 01 says: F1 intervals, tables, sentences and figures, on a small split with known faults."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from catlib.data import inspection, inspection_pairs, inspection_plots
from catlib.data.audit import Finding, read_audit
from catlib.data.check import Check, check
from catlib.data.duplicates import ALIKE, close_pairs
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
    widths = [inspection.f1_width(n) for n in (5, 10, 20, 50, 200, 1000)]
    assert widths == sorted(widths, reverse=True)
    # Delta method: F1 = 2T / (T + F + n), T ~ Bin(n, p), F ~ Poisson(n(1 - p)); at T + F = n the slopes are
    # dF1/dT = (2 - p) / 2n and dF1/dF = -p / 2n
    n, p = 1000, inspection.SUPPOSED_F1
    variance = ((2 - p) / (2 * n)) ** 2 * n * p * (1 - p) + (p / (2 * n)) ** 2 * n * (1 - p)
    assert inspection.f1_width(n) == pytest.approx(2 * 1.96 * variance**0.5, rel=0.05)
    assert inspection.f1_interval(0) == (0.0, 1.0)


def test_macro_interval_is_narrower_than_that_of_its_breeds():
    alone = inspection.macro_half_width([20])
    assert inspection.macro_half_width([20] * 4) == pytest.approx(alone / 2)


def test_tables_name_what_is_in_the_data(case):
    dataset, findings, _ = case
    rows = inspection.counts_rows(dataset)
    assert [row[0] for row in rows[1:]] == ["Siamese", "★ Burmilla"]
    assert [int(row[4]) for row in rows[1:]] == [41, 10]
    left_out = inspection.left_out_rows(findings, missing=3)
    assert left_out[1][:2] == ["not an image", "1"] and "notes.jpg" in left_out[1][2]
    assert left_out[2][:2] == ["listed, but not there", "3"]
    table = inspection.markdown_table(rows)
    assert table.splitlines()[1].startswith("| --- | ---: |") and "★ Burmilla" in table


def test_a_bar_in_a_name_does_not_break_the_table():
    assert inspection.markdown_table([["a", "b"], ["x|y", "1"]]).splitlines()[2] == "| x\\|y | 1 |"


def test_worst_files_are_the_small_and_the_long_ones(case):
    _, findings, _ = case
    small = Finding("tiny.jpg", "Siamese", width=40, height=40)
    shown = [(f.image, reason) for f, reason in inspection.worst_files([*findings, small])]
    assert shown == [("tiny.jpg", "40 × 40 pixels"), ("Burmilla/000.jpg", "sides 4.0 : 1")]
    assert inspection.worst_files([small, small]) == []


def test_near_duplicates_are_shown_and_the_conclusion_counts(case):
    dataset, findings, checked = case
    pairs = close_pairs(findings, 6)
    assert [(a.image, b.image) for a, b, _ in pairs] == [("siamese/003.jpg", "siamese/copy.jpg")]
    assert "2 photos are alike (hashes at most 6 bits apart): 1 group" in inspection_pairs.pairs_sentence(
        pairs, findings, checked
    )
    crowd = [
        replace(findings[0], image=f"{i}.jpg") for i in range(5000)
    ]  # a placeholder saved again and again: 12 million pairs
    assert len(close_pairs(crowd, 6)) == ALIKE * (ALIKE - 1) // 2
    text = inspection.conclusion(dataset, findings, checked)
    assert "can be trusted" in text and "51 photos" in text
    assert "1 of 52 files are left out" in text and "1 not an image" in text
    assert "Burmilla" in text and "too small to measure" in text


def test_of_many_pairs_each_group_has_its_turn_and_pairs_beyond_the_limit_are_found(case):
    _, findings, _ = case
    one, two = Finding("1.jpg", "A", group="g"), Finding("2.jpg", "A", group="h")
    pairs = [(one, one, 0), (one, one, 1), (two, two, 5)]
    assert inspection_pairs.one_of_each_group(pairs) == [pairs[0], pairs[2], pairs[1]]
    bits = close_pairs(findings, 6)[0][2]
    beyond = inspection_pairs.not_joined(findings, bits - 1)
    assert [(a.image, b.image, n) for a, b, n in beyond][:1] == [("siamese/003.jpg", "siamese/copy.jpg", bits)]
    assert all(n > 6 for _, _, n in inspection_pairs.not_joined(findings, 6))


def test_a_failed_check_is_the_first_word_of_the_conclusion(case):
    dataset, findings, checked = case
    failed = Check(
        checked.photos, checked.groups, checked.bits, checked.counts, ("the same bytes in train and test: a, b",)
    )
    assert "cannot be trusted" in inspection.conclusion(dataset, findings, failed).splitlines()[0]


def test_figures_are_drawn_with_their_photos_and_marks(case):
    dataset, findings, _ = case
    assert inspection_plots.counts_figure(dataset).axes[0].get_yticklabels()[1].get_text() == "★ Burmilla"
    assert len(inspection_plots.samples_figure(dataset).axes) == 2
    assert len(inspection_plots.sizes_figure(findings).axes) == 2
    assert len(inspection_plots.widths_figure(dataset).axes[0].collections) >= 2
    pairs = close_pairs(findings, 6)
    assert any(
        "Siamese" in text.get_text()
        for axes in inspection_plots.pairs_figure(pairs, dataset.image_root).axes
        for text in axes.texts
    )
    assert inspection_plots.pairs_figure([], dataset.image_root).axes[0].texts[0].get_text() == "nothing to show"
    assert len(inspection_plots.worst_figure(inspection.worst_files(findings), dataset.image_root).axes) == 4


def test_of_many_breeds_all_priority_breeds_are_shown():
    breeds = [f"breed {i}" for i in range(67)]
    shown = inspection_plots._choose(breeds, ["breed 66", "breed 65"])
    assert len(shown) == inspection_plots.MOST_BREEDS and {"breed 66", "breed 65"} <= set(shown)
