"""The split deserves trust: groups stay whole, photos keep their part, floors hold or the reason is said."""

import dataclasses
import hashlib

import pytest

from catlib.data.findings import Finding
from catlib.data.splits import split
from catlib.errors import InputError
from catlib.settings import DataSettings


def photos(breed: str, count: int, start: int = 0, group_of: int = 1, **more: str) -> list[Finding]:
    """Audited photos, `group_of` near-duplicates in each group."""
    sha = [hashlib.sha256(f"{breed} {start + i}".encode()).hexdigest() for i in range(count)]
    return [
        Finding(f"{breed}/{start + i}.jpg", breed, sha256=sha[i], group=sha[i - i % group_of][:16], **more)
        for i in range(count)
    ]


def parts(findings: list[Finding]) -> dict[str, str]:
    return {finding.sha256: finding.part for finding in findings if finding.kept}


def shares(findings: list[Finding], breed: str) -> dict[str, float]:
    mine = [finding.part for finding in findings if finding.breed == breed]
    return {part: mine.count(part) / len(mine) for part in ("train", "val", "test")}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shares_are_stable_over_seeds_and_groups_whole(seed):
    everything = [p for breed in "ABCDEFGH" for p in photos(breed, 100, group_of=1 + "ABCDEFGH".index(breed) // 3)]
    settings = DataSettings(seed=seed)
    done, remarks = split(everything, settings)
    assert remarks == []
    for breed in "ABCDEFGH":
        assert abs(shares(done, breed)["test"] - 0.2) <= 0.05 and abs(shares(done, breed)["val"] - 0.15) <= 0.05
    assert all(len({f.part for f in done if f.group == group}) == 1 for group in {f.group for f in done})


def test_order_does_not_matter_and_the_seed_does():
    everything = photos("A", 60) + photos("B", 30)
    first = parts(split(everything, DataSettings())[0])
    assert parts(split(everything[::-1], DataSettings())[0]) == first
    assert parts(split(everything, DataSettings(seed=1))[0]) != first


def test_photos_of_an_earlier_split_keep_their_part_when_more_come():
    old = photos("A", 60) + photos("B", 9)
    first = parts(split(old, DataSettings())[0])
    for added in (1, 5, 40):
        later = split(old + photos("A", added, 1000) + photos("B", added, 1000), DataSettings(), earlier=first)[0]
        assert {sha: parts(later)[sha] for sha in first} == first
        assert abs(shares(later, "A")["test"] - 0.2) <= 0.06


def test_without_the_earlier_split_next_to_nothing_moves():
    moved = total = 0
    for k in range(20):
        old = photos(f"breed {k}", 100)
        first = parts(split(old, DataSettings())[0])
        later = parts(split(old + photos(f"breed {k}", 10, 1000), DataSettings())[0])
        moved += sum(later[sha] != part for sha, part in first.items())
        total += len(first)
    assert moved / total < 0.01


def test_an_added_photo_that_joins_two_parts_moves_its_group_towards_training():
    old = photos("A", 40)
    first = parts(split(old, DataSettings())[0])
    tested = next(f for f in old if first[f.sha256] == "test")
    trained = next(f for f in old if first[f.sha256] == "train")
    joined = [dataclasses.replace(f, group="joined") if f in (tested, trained) else f for f in old]
    later = parts(split(joined, DataSettings(), earlier=first)[0])
    assert later[tested.sha256] == later[trained.sha256] == "train"


def test_floors_and_clear_words_for_small_breeds():
    done, remarks = split(photos("Rare", 14) + photos("Tiny", 5), DataSettings())
    count = {breed: [f.part for f in done if f.breed == breed] for breed in ("Rare", "Tiny")}
    assert count["Rare"].count("test") == 5 and count["Rare"].count("val") == 2
    assert all(count["Tiny"].count(part) >= 1 for part in ("train", "val", "test"))
    assert len(remarks) == 1 and remarks[0].startswith("Tiny (5 photos)") and "instead of 5" in remarks[0]
    with pytest.raises(InputError, match="Single has 1 usable photo, no test and val part"):
        split(photos("Big", 30) + photos("Single", 1), DataSettings(small_breeds="refuse"))
    with pytest.raises(InputError, match="Twin has 4 usable photos .1 when near-duplicates count once"):
        split(photos("Big", 30) + photos("Twin", 4, group_of=4), DataSettings(small_breeds="refuse"))
    done, remarks = split(photos("Big", 30) + photos("Single", 1), DataSettings(small_breeds="leave-out"))
    assert [f.verdict for f in done if f.breed == "Single"] == ["breed too small"] and "Single" in remarks[0]


def test_an_official_test_part_is_kept_whole_and_nothing_else_is_tested():
    done, _ = split(photos("A", 20, official="test") + photos("A", 40, 500), DataSettings())
    assert {f.image for f in done if f.part == "test"} == {f"A/{i}.jpg" for i in range(20)}
    assert {f.part for f in done[20:]} == {"train", "val"}


def test_the_limit_of_training_photos_leaves_test_and_validation_alone():
    everything = photos("A", 100)
    free, limited = split(everything, DataSettings())[0], split(everything, DataSettings(photos_per_breed=7))[0]
    assert sum(f.kept and f.part == "train" for f in limited) == 7
    assert [f.part for f in limited] == [f.part for f in free]


@pytest.mark.parametrize(
    "wrong", [{"val_share": 0.0}, {"test_share": 0.9}, {"min_val": -1}, {"near_duplicate_bits": 40}]
)
def test_shares_out_of_range_are_named(wrong):
    from catlib.data.splits import check_shares

    with pytest.raises(InputError, match=next(iter(wrong))):
        check_shares(DataSettings(**wrong))


def test_a_rare_breed_without_test_photos_stays_in_training():
    for rare in (photos("Rare", 1), photos("Rare", 4, group_of=4)):
        done, remarks = split(photos("Big", 30) + rare, DataSettings())
        assert {f.part for f in done if f.breed == "Rare"} == {"train"} and all(f.kept for f in done)
        assert len(remarks) == 1 and "Rare" in remarks[0] and "not measurable in the test" in remarks[0]
    given = [f for part in ("train", "val", "test") for f in photos("Big", 10, 100 * len(part), official=part)]
    done, remarks = split(given + photos("Rare", 3, official="train"), DataSettings())
    assert {f.part for f in done if f.breed == "Rare"} == {"train"} and "not measurable" in remarks[0]
    done, remarks = split(
        given + photos("Rare", 3, official="train") + photos("Rare", 1, 9, official="val"), DataSettings()
    )
    assert [f.part for f in done if f.breed == "Rare"] == ["train"] * 3 + ["val"]
    with pytest.raises(InputError, match="Rare has 3 usable photos, no train"):
        split(given + photos("Rare", 3, official="test"), DataSettings())


def test_train_and_val_only_have_no_test_part_unless_it_is_asked_for():
    given = [
        *photos("A", 40, official="train", group_of=2),
        *photos("A", 6, 500, official="val"),
        *photos("Rare", 1, official="train"),
    ]
    done, remarks = split(given, DataSettings())
    assert [f.part for f in done] == [f.official for f in given] and "draw_test" in remarks[-1]
    done, remarks = split(given, DataSettings(draw_test=True))
    assert {f.part for f in done if f.official == "val"} == {"val"}
    assert 6 <= sum(f.part == "test" for f in done) <= 12 and {f.part for f in done if f.breed == "Rare"} == {"train"}
    assert all(len({f.part for f in done if f.group == group}) == 1 for group in {f.group for f in done})
    assert len(remarks) == 1 and "Rare" in remarks[0]
