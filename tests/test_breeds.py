"""The list of breeds: complete, spelled once, every spelling resolvable, every breed with usable traits."""

import re

import pytest

from catlib.breeds import BREEDS, PRIORITY_BREEDS, describe, find

COAT_LENGTHS = {"hairless", "short", "medium", "long"}
PATTERNS = {
    "bicolor", "calico", "classic tabby", "colorpoint", "mackerel tabby", "marbled", "mink", "mitted", "sepia",
    "shaded", "smoke",
    "solid", "spotted", "tabby", "ticked", "tipped", "torbie", "tortoiseshell", "tuxedo", "van",
}  # fmt: skip


def test_there_are_67_breeds_and_the_plans_seven_priority_ones():
    assert len(BREEDS) == len({breed.name for breed in BREEDS}) == 67
    assert PRIORITY_BREEDS == (
        "American Wirehair", "Burmilla", "Canadian Hairless", "Chinchilla", "Cymric", "Oriental Long Hair",
        "York Chocolate",
    )  # fmt: skip


def test_no_spelling_belongs_to_two_breeds():
    owner: dict[str, str] = {}
    for breed in BREEDS:
        for spelling in {re.sub(r"\W|_", "", s.casefold()) for s in (breed.name, *breed.aliases)}:
            assert spelling not in owner, f"{spelling}: {owner.get(spelling)} and {breed.name}"
            owner[spelling] = breed.name


@pytest.mark.parametrize("breed", BREEDS, ids=lambda breed: breed.name)
def test_every_spelling_finds_its_breed(breed):
    for name in (breed.name, *breed.aliases):
        for spelling in (name, name.upper(), name.lower().replace(" ", "_"), name.replace(" ", "-")):
            assert find(spelling) is breed


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("Sphynx", "Sphynx - Hairless Cat"), ("Egyptian_Mau", "Egyptian Mau"), ("british_shorthair",
        "British Shorthair"),
        ("Maine_Coon", "Maine Coon"), ("Extra-Toes Cat - Hemingway Polydactyl",
        "Extra-Toes Cat - Hemingway Polydactyl"),
        ("DSH", "Domestic Short Hair"), ("persian_cats", "Persian"), ("Oriental Longhair", "Oriental Long Hair"), ("Pixie-Bob", "Pixiebob"),
    ],
)  # fmt: skip
def test_spellings_of_other_collections(spelling, name):
    assert find(spelling).name == name


@pytest.mark.parametrize("name", ["", "cat", "Dog", "Beagle", "Siam", "Hair"])
def test_a_name_that_is_no_breed_is_not_found(name):
    assert find(name) is None


@pytest.mark.parametrize("breed", BREEDS, ids=lambda breed: breed.name)
def test_traits_are_usable(breed):
    traits = breed.traits
    assert traits.coat_length in COAT_LENGTHS
    assert traits.patterns and set(traits.patterns) <= PATTERNS
    assert traits.colors and traits.eyes and traits.coat and traits.ears and traits.tail and traits.build


@pytest.mark.parametrize("breed", BREEDS, ids=lambda breed: breed.name)
def test_the_description_gives_reasons_without_the_name(breed):
    text = describe(breed)
    assert re.match(r"an? \S.* cat with ", text)
    named_for_its_coat = set(breed.name.casefold().split()) & set(
        " ".join((*breed.traits.patterns, *breed.traits.colors)).split()
    )
    assert named_for_its_coat or breed.name.casefold() not in text.casefold()
    assert breed.traits.eyes[0] in text and breed.traits.colors[0] in text and breed.traits.patterns[0] in text
    assert " a a" not in text and "  " not in text
    assert len(text.split()) <= 70, "longer than a CLIP prompt can be"


def test_describe_takes_names_and_refuses_unknown_ones():
    assert describe("cymric").endswith("and no tail")
    assert "bare, " in describe("Sphynx") and "coat" not in describe("Sphynx")
    with pytest.raises(KeyError, match="Beagle"):
        describe("Beagle")


def test_descriptions_tell_the_breeds_apart():
    assert len({describe(breed) for breed in BREEDS}) == 67
