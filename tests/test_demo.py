"""The drawn cats: the same every time, train and test apart, valid pictures, no breed given away by its colour."""

import csv

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from catlib.breeds import BREEDS, PRIORITY_BREEDS, find
from demo.drawing import draw_cat
from demo.drawing_look import look_of, random_traits
from demo.photos import SHARES, SIZE, count, draw_breed, draw_dataset


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    return draw_dataset(tmp_path_factory.mktemp("demo"), photos=10, seed=3)


def rows_of(labels):
    with labels.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_the_same_seed_gives_the_same_bytes(small_set, tmp_path):
    again = draw_dataset(tmp_path, photos=10, seed=3)
    assert again.read_bytes() == small_set.read_bytes()
    for row in rows_of(small_set)[::9]:
        assert (small_set.parent / row["image"]).read_bytes() == (tmp_path / row["image"]).read_bytes()


def test_another_seed_gives_other_cats():
    assert draw_breed("Manx", "test", 0, seed=0).tobytes() != draw_breed("Manx", "test", 0, seed=1).tobytes()


def test_a_complete_set_is_left_alone_and_a_broken_or_other_one_is_drawn_again(tmp_path):
    labels = draw_dataset(tmp_path, photos=5, seed=0)
    picture = tmp_path / rows_of(labels)[0]["image"]
    before, drawn = picture.read_bytes(), picture.stat().st_mtime_ns
    draw_dataset(tmp_path, photos=5, seed=0)
    assert picture.stat().st_mtime_ns == drawn
    picture.unlink()
    draw_dataset(tmp_path, photos=5, seed=0)
    assert picture.read_bytes() == before
    draw_dataset(tmp_path, photos=5, seed=1)
    assert picture.read_bytes() != before


def test_the_table_lists_every_picture_once_with_its_split(small_set):
    rows = rows_of(small_set)
    listed = [row["image"] for row in rows]
    on_disk = {path.relative_to(small_set.parent).as_posix() for path in small_set.parent.rglob("*.jpg")}
    assert len(listed) == len(set(listed)) and set(listed) == on_disk
    for row in rows:
        _, breed, name = row["image"].split("/")
        assert breed == row["breed"] and name.startswith(row["split"])


def test_priority_breeds_are_rare_in_training_and_the_test_part_is_even():
    assert set(PRIORITY_BREEDS) < set(SHARES) and len(SHARES) == 20
    train = {name: count(name, "train", 120) for name in SHARES}
    assert max(train.values()) == 120
    assert max(train[name] for name in PRIORITY_BREEDS) < min(
        train[name] for name in SHARES if name not in PRIORITY_BREEDS
    )
    assert {count(name, "test", 120) for name in SHARES} == {24}


def test_no_test_picture_stands_in_training(small_set):
    pictures = {"train": set(), "test": set()}
    for row in rows_of(small_set):
        pictures[row["split"]].add(np.asarray(Image.open(small_set.parent / row["image"])).tobytes())
    assert not pictures["train"] & pictures["test"]
    streams = [draw_breed("Siamese", stream, 0, seed=0).tobytes() for stream in ("train", "test", "demo-models")]
    assert len(set(streams)) == 3


def test_pictures_are_rgb_jpegs_with_a_cat_in_front_of_a_background(small_set):
    for row in rows_of(small_set)[::5]:
        with Image.open(small_set.parent / row["image"]) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (SIZE, SIZE))
            assert np.asarray(picture).std() > 8, f"{row['image']} is all but uniform"


@pytest.mark.parametrize("breed", BREEDS, ids=lambda breed: breed.name)
def test_every_breed_can_be_drawn(breed):
    rng = np.random.default_rng(0)
    pictures = [np.asarray(draw_cat(look_of(breed.traits, rng), rng, size=48), float) for _ in range(3)]
    assert pictures[0].shape == (48, 48, 3)
    assert np.abs(pictures[0] - pictures[1]).mean() > 5, "two cats of a breed differ"


def test_cats_of_no_breed_can_be_drawn():
    rng = np.random.default_rng(0)
    looks = [look_of(random_traits(rng), rng) for _ in range(60)]
    assert len({look.pattern for look in looks}) > 8
    assert draw_cat(looks[0], rng, size=48).size == (48, 48)


def test_traits_show_in_the_drawing():
    rng = np.random.default_rng(0)

    def mean(name, measure):
        return np.mean([getattr(look_of(find(name).traits, rng), measure) for _ in range(40)])

    assert mean("Cymric", "tail") == 0 < mean("Maine Coon", "tail")
    assert mean("Siamese", "ear_size") > mean("Persian", "ear_size")
    assert mean("Chinchilla", "fur") > mean("Burmilla", "fur") > mean("Canadian Hairless", "fur") == 0
    assert mean("American Wirehair", "crimp") > 0 == mean("American Shorthair", "crimp")
    assert mean("Munchkin", "legs") < mean("Chausie", "legs")
    assert mean("Scottish Fold", "ear_bend") == -1 and mean("American Curl", "ear_bend") == 1
    assert mean("Persian", "flat") > 0.5 > mean("Oriental Long Hair", "flat")


def coarse_colours(stream, number, grid):
    """Mean colours of the cells of a grid x grid raster, for `number` pictures of every breed."""
    cell = 32 // grid
    return np.array(
        [
            np.asarray(draw_breed(name, stream, i, seed=1, size=32), float)
            .reshape(grid, cell, grid, cell, 3)
            .mean((1, 3))
            .ravel()
            for name in SHARES
            for i in range(number)
        ]
    )


@pytest.mark.parametrize(("grid", "bound"), [(1, 0.15), (4, 0.28)])
def test_colour_alone_does_not_give_the_breed_away(grid, bound):
    """Logistic regression on mean colours: measured 0.07 for the whole picture, 0.16 for a 4 x 4 raster."""
    scale = StandardScaler().fit(train := coarse_colours("train", 24, grid))
    model = LogisticRegression(max_iter=1000).fit(scale.transform(train), np.repeat(list(SHARES), 24))
    accuracy = model.score(scale.transform(coarse_colours("test", 12, grid)), np.repeat(list(SHARES), 12))
    assert accuracy < bound
