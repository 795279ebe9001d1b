"""Reasons: drawn in several wordings, long enough to be whole, and held against the table of breeds."""

import json
from dataclasses import replace

import pytest
from evaluation_cases import make_set
from serving_cases import one_thread, save_tuned  # noqa: F401
from tiny_models import photo

from catlib.breeds import BREEDS, describe, find
from catlib.data.conversations import answer_for, gives_reasons, longest_answer, spelled_answers
from catlib.data.records import make_sample
from catlib.evaluation.metrics import evaluate
from catlib.evaluation.results import reason_figures
from catlib.evaluation.tables import reasons_table
from catlib.parsing import BreedParser
from catlib.vlm.checkpoint import find_checkpoint, open_vlm
from catlib.vlm.decoding import MAX_NEW_TOKENS, answer_limit, generate_free


def sample(breed, number, style="label+traits"):
    answer = answer_for(breed, style, f"{breed}/{number}.jpg")
    return make_sample(f"{number}", "a.jpg", "?", answer, breed=breed, source="s", sha256=str(number), split="train")


def test_wordings_are_drawn_by_the_sample_and_the_breed_stays_readable():
    names = [breed.name for breed in BREEDS]
    parser = BreedParser(names)
    for name in names:
        answers = {answer_for(name, "label+traits", f"{name}/{n}.jpg") for n in range(40)}
        assert len(answers) > 8 and answer_for(name, "label+traits", "x") == answer_for(name, "label+traits", "x")
        for answer in answers:
            assert (
                answer.startswith(f"{name}. ") and answer.endswith(".") and parser.parse(answer.split(".")[0]) == name
            )
        assert answer_for(name, "label", "x") == name
    samples = [sample(name, n) for name in names[:5] for n in range(20)]
    assert spelled_answers(samples) == {name: f"{name}." for name in sorted(names[:5])} and gives_reasons(samples)
    assert answer_for("Unheard Of", "label+traits", "x") == "Unheard Of"
    with pytest.raises(KeyError):
        describe("Unheard Of")
    assert sorted(describe("Manx", 1).replace(",", " ").split()) == sorted(
        describe("Manx", 1 + 6).replace(",", " ").split()
    )


def predictions(rows):
    """A set of (true breed, answer), the breed read from the first sentence."""
    base = make_set("vlm-tuned-free", [true for true, _ in rows], [answer.split(".")[0] for _, answer in rows])
    return replace(
        base,
        predictions=tuple(replace(p, answer=answer) for p, (_, answer) in zip(base.predictions, rows, strict=True)),
    )


def test_reasons_are_held_against_the_table():
    right = [("Manx", answer_for("Manx", "label+traits", str(n))) for n in range(4)]
    figures = reason_figures(predictions(right))
    assert figures["given"] == figures["complete"] == figures["of_breed_named"] == figures["of_true_breed"] == 1
    assert figures["traits"] >= 5 and figures["breeds_with_several"] == 1
    wrong = [("Bengal", answer_for("Manx", "label+traits", "1"))] * 2  # the breed named, not the true one, and one text
    figures = reason_figures(predictions(right + wrong))
    assert figures["of_breed_named"] == 1 and figures["of_true_breed"] < 1
    assert reason_figures(predictions(wrong))["breeds_with_several"] == 0
    traits = answer_for("Siamese", "label+traits", "1").partition(". ")[2]
    mixed = reason_figures(predictions([("Manx", f"Manx. {traits}")]))  # another breed's traits
    assert mixed["of_breed_named"] < 0.5 and mixed["breeds_with_several"] is None
    cut = reason_figures(
        predictions([(breed, answer[:-9]) for breed, answer in right] + [("Manx", "Manx"), ("Manx", "Manx.")])
    )
    assert cut["complete"] == 0 and cut["given"] == pytest.approx(4 / 6)
    assert reason_figures(predictions([("Manx", "Manx"), ("Manx", "Manx. Yes")])) is None
    vague = reason_figures(predictions([("Manx", "Manx. I just think so.")]))
    assert vague["traits"] == 0 and vague["of_true_breed"] is None
    models = {"vlm-tuned-free": evaluate(predictions(right), bootstrap=100) | {"reason_figures": figures}}
    table = reasons_table(
        models
        | {
            "vlm-tuned": evaluate(predictions(right), bootstrap=100),
            "clip-probe": models["vlm-tuned-free"] | {"reason_figures": None},
        }
    )
    assert list(table.index) == ["VLM, tuned", "VLM, tuned, in its own words"]  # without words, and with them
    assert list(table["of these whole"]) == ["-", "100.0"] and find("Manx") is not None
    assert list(table["traits of the true breed"]) == ["-", f"{100 * figures['of_true_breed']:.1f}"]
    assert reasons_table({"clip-probe": {"reason_figures": None}, "vlm-tuned": {}}) is None


def words_of(text, **_):
    return {"input_ids": text.split()}


@pytest.mark.slow
def test_the_limit_on_tokens_follows_from_the_training_answers(tmp_path):
    samples = [sample("Manx", n) for n in range(5)]
    assert longest_answer(words_of, samples) == max(len(s.answer.split()) for s in samples) + 1
    assert longest_answer(words_of, []) == 0
    folder = save_tuned(tmp_path)
    record = json.loads((folder / "training.json").read_text())
    for told, limit in ((None, 50), (7, 50), (77, 77), (10**9, 512), ("90", 50), (True, 50), (-3, 50)):
        (folder / "training.json").write_text(json.dumps(record | ({} if told is None else {"answer_tokens": told})))
        assert answer_limit(find_checkpoint(folder)) == limit >= MAX_NEW_TOKENS
    (folder / "training.json").write_text(json.dumps(record | {"answer_tokens": 60}))
    vlm = open_vlm(find_checkpoint(folder), precision="float32", device="cpu")
    limits = []
    generate = type(vlm.base).generate

    def watched(self, **options):
        limits.append(options["generation_config"].max_new_tokens)
        return generate(self, **options)

    type(vlm.base).generate = watched
    try:
        generate_free(vlm, [photo(0)], "?")
        generate_free(vlm, [photo(0)], "?", 9)
    finally:
        type(vlm.base).generate = generate
    assert limits == [60, 9]
