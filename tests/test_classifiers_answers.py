"""Reading breeds off generated text: what is counted, and what is honestly None."""

import pytest
from tiny_encoders import llava, photo

from catlib.breeds import BREEDS
from catlib.data.conversations import answer_for
from catlib.parsing import BreedParser
from catlib.vlm.decoding import generate_constrained, generate_free

ALL = [breed.name for breed in BREEDS]


@pytest.mark.parametrize(
    ("answer", "breed"),
    [
        ("Siamese", "Siamese"),
        ("  siamese.\n", "Siamese"),
        ("The cat in this photo is a Maine Coon.", "Maine Coon"),
        ("MaineCoon", "Maine Coon"),
        ("maine_coon", "Maine Coon"),
        ("These are Bengals!", "Bengal"),
        ("Sphynx", "Sphynx - Hairless Cat"),
        ("It is a Hemingway polydactyl, I think", "Extra-Toes Cat - Hemingway Polydactyl"),
        ("a Dilute Calico", "Dilute Calico"),  # not "Calico", which stands inside
        ("Oriental Tabby", "Oriental Tabby"),
        ("Canadian Hairless cat", "Canadian Hairless"),
        ("This is not a Siamese but a Balinese.", "Balinese"),
        ("Siamese. Yes, Siamese.", "Siamese"),
        ("Siamese. It is not a Balinese, whose coat is longer.", "Siamese"),
        ("It is not a Siamese.", None),
        ("Siamese or Balinese", None),
        ("a lovely cat", None),
        ("Bengalese", None),
        ("", None),
    ],
)
def test_answers(answer, breed):
    assert BreedParser(ALL).parse(answer) == breed


@pytest.mark.slow
@pytest.mark.parametrize("breed", ALL)
def test_reasons_after_the_name_do_not_hide_it(breed):
    """42 of these sentences name another breed of the list as well: tabby, silver, tortoiseshell."""
    assert BreedParser(ALL).parse(answer_for(breed, "label+traits")) == breed


def test_only_breeds_of_the_list_are_read():
    assert BreedParser(["Calico", "Siamese"]).parse("a Dilute Calico") is None  # which is no Calico
    assert BreedParser(["Birman", "Siamese"]).parse("Bengal") is None


def test_a_longer_name_uses_up_its_words():
    parser = BreedParser(["Manx", "Manx Cat"])
    assert parser.parse("It is a Manx cat.") == "Manx Cat"
    assert parser.parse("It is a Manx.") == "Manx"
    assert parser.parse("A Manx cat and a Manx.") is None


def test_free_answers_hold_nothing_of_the_prompt():
    vlm = llava()
    question = "Is this a Siamese, a Bengal or a Persian?"
    answers = generate_free(vlm, [photo(0), photo(1)], question, max_new_tokens=5)
    assert len(answers) == 2 and all(len(vlm.processor.tokenizer(a)["input_ids"]) <= 12 for a in answers)
    assert not any("USER" in answer or question in answer for answer in answers)


def test_free_answers_do_not_depend_on_the_batch():
    vlm = llava()
    images = [photo(i) for i in range(3)]
    single = [generate_free(vlm, [image], "Breed?", max_new_tokens=6)[0] for image in images]
    assert generate_free(vlm, images, "Breed?", max_new_tokens=6) == single


def test_constrained_answers_are_breeds_and_greedy():
    vlm, breeds = llava(), ["Manx", "Manx Cat", "Persian", "Siamese", "Extra-Toes Cat - Hemingway Polydactyl"]
    images = [photo(i) for i in range(6)]
    together = generate_constrained(vlm, images, "Breed?", breeds)
    assert set(together) <= set(breeds)
    assert together == [generate_constrained(vlm, [image], "Breed?", breeds)[0] for image in images]
    assert together == [greedy(vlm, image, breeds) for image in images]


def test_constrained_answers_may_be_longer_than_the_name():
    vlm, spelled = llava(), {"Manx": "Manx.", "Persian": "It is a Persian."}
    answers = generate_constrained(vlm, [photo(i) for i in range(4)], "Breed?", ["Manx", "Persian"], spelled)
    assert set(answers) <= {"Manx", "Persian"}


def greedy(vlm, image, breeds) -> str:
    """Token by token: of the names that still fit, the next token with the highest logit."""
    words = vlm.processor.tokenizer
    labels = {tuple(words(f" {breed}</s>")["input_ids"]): breed for breed in breeds}
    inputs = vlm.processor(images=image, text="USER: <image>\nBreed? ASSISTANT:", return_tensors="pt")
    ids, spelled = inputs["input_ids"], ()
    while spelled not in labels:
        logits = vlm.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
        following = {label[len(spelled)] for label in labels if label[: len(spelled)] == spelled}
        best = max(following, key=lambda token: logits[token].item())
        spelled = (*spelled, best)
        ids = ids.new_tensor([[*ids[0].tolist(), best]])
    return labels[spelled]
