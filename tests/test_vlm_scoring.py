"""Closed-set scores equal plain forward passes, whatever the batch, the padding and the order of breeds."""

import numpy as np
import pytest
import torch
from tiny_encoders import llava, photo

from catlib.breeds import BREEDS
from catlib.errors import CatlibError, InputError
from catlib.vlm import scoring
from catlib.vlm.prompting import answer_tokens, prompt_text
from catlib.vlm.scoring import LabelScorer, build_trie, split_labels

QUESTION = "What breed is this cat?"
LONG_QUESTION = "Look at the ears, the coat and the tail. What breed is the cat in this photo?"
# Unequal lengths, and names that begin with a whole other name.
LABELS = [
    "Manx",
    "Manx Cat",
    "Abyssinian",
    "Extra-Toes Cat - Hemingway Polydactyl",
    "Silver",
    "Siamese",
    "Oriental Long Hair",
    "Oriental Tabby",
]


def plain_scores(vlm, images, questions, breeds) -> np.ndarray:
    """One forward pass for each photo and label, no cache, no batch, no padding: what the fast way has to equal."""
    scores = np.empty((len(images), len(breeds)))
    for i, (image, question) in enumerate(zip(images, questions, strict=True)):
        for j, breed in enumerate(breeds):
            prompt = f"USER: <image>\n{question} ASSISTANT:"
            inputs = vlm.processor(images=image, text=f"{prompt} {breed}</s>", return_tensors="pt")
            start = vlm.processor(images=image, text=prompt, return_tensors="pt")["input_ids"].shape[1]
            with torch.no_grad():
                logits = vlm.model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits[0]
            steps = logits.double().log_softmax(-1)[start - 1 : -1]
            scores[i, j] = steps.gather(1, inputs["input_ids"][0, start:, None]).sum()
    return scores


@pytest.fixture(scope="module")
def vlm():
    return llava()


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["tree", "plain"])
def test_scores_equal_plain_forward_passes(mode, attention):
    vlm = llava(attention=attention)
    images, questions = [photo(i) for i in range(3)], [QUESTION, LONG_QUESTION, "Breed?"]
    scorer = LabelScorer(vlm, LABELS, QUESTION, mode)
    assert len(set(scorer.counts)) > 2
    scores = scorer.score(images, questions)  # unequal prompts: two of the three rows are padded on the left
    expected = plain_scores(vlm, images, questions, LABELS)
    assert np.abs(scores - expected).max() < 1e-4
    assert np.ptp(expected, axis=0).max() > 0.1  # the photos do make a difference


def test_the_output_layer_is_not_copied_for_each_photo(vlm):
    shapes = []
    handle = vlm.base.get_output_embeddings().register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    try:
        LabelScorer(vlm, LABELS, QUESTION).score([photo(0), photo(1), photo(2)])
    finally:
        handle.remove()
    assert len(shapes[0]) == 2 and shapes[0][0] == 3, (
        "one row a photo: slices of three dimensions are multiplied with copies"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("window", "room"), [(256, True), (64, True), (40, False)])
def test_in_a_sliding_window_the_tree_is_cut_to_the_room_or_left(window, room, monkeypatch):
    vlm = llava(text="mistral", window=window)
    scorer, trees = LabelScorer(vlm, LABELS, QUESTION), []
    monkeypatch.setattr(scorer, "_tree", lambda *given, own=scorer._tree: trees.append(given) or own(*given))
    images = [photo(i) for i in range(2)]
    assert np.abs(scorer.score(images) - plain_scores(vlm, images, [QUESTION] * 2, LABELS)).max() < 1e-4
    assert bool(trees) == room and (window != 64 or len(trees) > 1)


@pytest.mark.slow
def test_another_attention_kernel_gives_way_to_one_that_takes_a_mask():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("no_masks", lambda *given, **more: sdpa_attention_forward(*given[:4], None, **more))
    vlm, plain = llava(), plain_scores(llava(), [photo(0)], [QUESTION], LABELS)
    vlm.base.config.get_text_config()._attn_implementation = "no_masks"
    assert np.abs(LabelScorer(vlm, LABELS, QUESTION).score([photo(0)]) - plain).max() < 1e-4
    assert vlm.base.config.get_text_config()._attn_implementation == "no_masks"


def test_scores_that_are_no_numbers_are_an_error_that_names_the_photo():
    vlm = llava()
    own = vlm.base.model.get_image_features

    def broken(pixel_values, *given, **more):
        pixel_values[1] = float("nan")
        return own(pixel_values, *given, **more)

    vlm.base.model.get_image_features = broken
    with pytest.raises(CatlibError, match="photo 2 of the batch"):
        LabelScorer(vlm, LABELS, QUESTION).score([photo(0), photo(1), photo(2)])


@pytest.mark.slow
def test_all_67_breeds(vlm):
    breeds = [breed.name for breed in BREEDS]
    scores = LabelScorer(vlm, breeds, QUESTION).score([photo(5)])
    assert np.abs(scores - plain_scores(vlm, [photo(5)], [QUESTION], breeds)).max() < 1e-4


def test_batch_size_and_order_of_breeds_do_not_matter(vlm):
    images = [photo(i) for i in range(5)]
    whole = LabelScorer(vlm, LABELS, QUESTION).score(images)
    single = np.concatenate([LabelScorer(vlm, LABELS, QUESTION).score([image]) for image in images])
    turned = LabelScorer(vlm, LABELS[::-1], QUESTION).score(images)[:, ::-1]
    assert np.abs(whole - single).max() < 1e-4
    assert np.abs(whole - turned).max() < 1e-4


@pytest.mark.parametrize("mode", ["tree", "plain"])
def test_groups_of_labels_give_the_same_scores(vlm, monkeypatch, mode):
    whole = LabelScorer(vlm, LABELS, QUESTION, mode).score([photo(0), photo(1)])
    monkeypatch.setattr(scoring, "LOGITS_LIMIT", 2 * vlm.model.config.text_config.vocab_size * 6)
    assert np.abs(LabelScorer(vlm, LABELS, QUESTION, mode).score([photo(0), photo(1)]) - whole).max() < 1e-4


def test_answers_longer_than_the_name_are_scored_as_they_were_taught(vlm):
    """`Manx.` is scored up to its full stop: whether the answer ends there is not asked of a model that gives reasons."""
    spelled = {"Manx": "Manx.", "Siamese": "It is a Siamese cat"}
    scores = LabelScorer(vlm, ["Manx", "Siamese", "Silver"], QUESTION, spelled=spelled).score([photo(0), photo(1)])
    words, prompt = vlm.processor.tokenizer, f"USER: <image>\n{QUESTION} ASSISTANT:"
    for i in range(2):
        start = vlm.processor(images=photo(i), text=prompt, return_tensors="pt")["input_ids"].shape[1]
        for j, answer in enumerate((" Manx.", " It is a Siamese cat</s>", " Silver</s>")):
            inputs = vlm.processor(images=photo(i), text=prompt + answer, return_tensors="pt")
            assert inputs["input_ids"].shape[1] - start == len(words(answer)["input_ids"])
            with torch.no_grad():
                steps = vlm.model(**inputs).logits[0].double().log_softmax(-1)[start - 1 : -1]
            expected = steps.gather(1, inputs["input_ids"][0, start:, None]).sum().item()
            assert abs(scores[i, j] - expected) < 1e-4


def test_mean_divides_by_the_tokens_of_the_training_text(vlm):
    scorer = LabelScorer(vlm, ["Manx", LABELS[3]], QUESTION)
    lengths = [len(vlm.processor.tokenizer(f" {breed}</s>")["input_ids"]) for breed in scorer.breeds]
    assert scorer.counts.tolist() == lengths and lengths[0] < lengths[1]
    assert np.allclose(scorer.mean(np.array([[-6.0, -6.0]])), [[-6 / lengths[0], -6 / lengths[1]]])


def test_prior_is_the_prompt_without_its_photo(vlm):
    scorer = LabelScorer(vlm, LABELS[:3], QUESTION)
    for score, breed in zip(scorer.prior(), LABELS, strict=False):
        ids = vlm.processor.tokenizer(f"USER: {QUESTION} ASSISTANT: {breed}</s>", return_tensors="pt")["input_ids"]
        start = len(vlm.processor.tokenizer(f"USER: {QUESTION} ASSISTANT:")["input_ids"])
        with torch.no_grad():
            steps = vlm.model(input_ids=ids).logits[0].double().log_softmax(-1)[start - 1 : -1]
        assert abs(steps.gather(1, ids[0, start:, None]).sum().item() - score) < 1e-4


def test_answers_are_tokenized_as_in_the_training_text(vlm):
    words = vlm.processor.tokenizer
    text = f"{prompt_text(vlm.processor, QUESTION)} Manx</s>"
    assert (
        answer_tokens(vlm.processor, QUESTION, "Manx")
        == words(text)["input_ids"][-len(words(" Manx</s>")["input_ids"]) :]
    )
    assert answer_tokens(vlm.processor, QUESTION, "Manx")[-1] == words.eos_token_id


def test_an_answer_that_melts_into_the_prompt_is_refused():
    vlm = llava()
    vlm.processor.chat_template = vlm.processor.chat_template.replace(
        "}ASSISTANT:{%", "}ASSISTANT: {%"
    )  # ends in a space
    with pytest.raises(CatlibError, match="changes the prompt's last token"):
        answer_tokens(vlm.processor, QUESTION, "Manx")


def test_a_breed_twice_is_refused(vlm):
    with pytest.raises(InputError, match="same tokens"):
        LabelScorer(vlm, ["Manx", "Manx"], QUESTION)


def test_trie_shares_prefixes_and_marks_ancestors():
    trie = build_trie([[1, 2, 0], [1, 2, 3, 0], [4, 0], [1, 5, 0]])
    assert trie.tokens.tolist() == [1, 2, 3, 4, 5]
    assert trie.depths.tolist() == [1, 2, 3, 1, 2]
    assert trie.paths == ((0, 1), (0, 1, 2), (3,), (0, 4))
    assert trie.ancestors[2].tolist() == [True, True, True, False, False]
    assert trie.ancestors[4].tolist() == [True, False, False, False, True]


def test_label_groups_respect_the_limit_and_lose_no_label():
    labels = [[i % 3, i, i + 1, 0] for i in range(20)]
    groups = split_labels(labels, 10)
    assert sorted(i for group in groups for i in group) == list(range(20))
    assert all(len(build_trie([labels[i] for i in group]).tokens) <= 10 for group in groups)
    assert len(groups) > 3
