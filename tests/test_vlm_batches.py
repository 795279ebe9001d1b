"""What is supervised: the answer and its end token, nothing else; nothing truncated; the cache changes nothing."""

import gc
import weakref

import pytest
import torch
from tiny_models import BREEDS, QUESTION, save_llava, save_pixtral, write_dataset
from torch.nn.functional import cross_entropy

from catlib.data.records import make_sample, read_samples
from catlib.errors import CatlibError
from catlib.settings import TrainSettings
from catlib.training.lora import add_lora
from catlib.training.loss import AnswerLoss
from catlib.vlm.batches import IGNORED, Collator, check_batch, segments
from catlib.vlm.checkpoint import open_vlm
from catlib.vlm.families import image_token_of
from catlib.vlm.features import FrozenFeatures
from catlib.vlm.prompting import messages


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("batches"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture
def vlm(model):
    return open_vlm(str(model), device="cpu", precision="float32")


@pytest.fixture
def samples(data):
    return read_samples(data / "train.jsonl", data.parent)


def test_only_the_answer_and_its_end_token_are_supervised(vlm, data, samples):
    batch = Collator(vlm, data.parent)(samples[:4])
    for row, sample in enumerate(samples[:4]):
        supervised = batch.labels[row][batch.labels[row] != IGNORED]
        assert vlm.processor.tokenizer.decode(supervised).strip() == f"{sample.answer}</s>"
        # What stands at a supervised position is what is read there; the loss shifts by one.
        where = (batch.labels[row] != IGNORED).nonzero()[:, 0]
        assert torch.equal(batch.input_ids[row, where], supervised)
    assert (batch.labels == IGNORED).sum() > batch.labels.numel() / 2


def test_tokens_are_those_of_the_processor_and_the_chat_template(vlm, data, samples):
    from catlib.data.images import inside, open_image

    sample = samples[0]
    text = vlm.processor.apply_chat_template(messages(sample.question, sample.answer))
    image = open_image(inside(data.parent, sample.image))
    expected = vlm.processor(images=[image], text=text, return_tensors="pt")
    batch = Collator(vlm, data.parent)([sample])
    assert torch.equal(batch.input_ids, expected["input_ids"])
    assert torch.equal(batch.pixels["pixel_values"], expected["pixel_values"])


def test_end_token_is_added_where_the_template_writes_none(vlm, data, samples):
    template = vlm.processor.chat_template
    vlm.processor.chat_template = template.replace("{{ eos_token }}", "")
    batch = Collator(vlm, data.parent)(samples[:1])
    assert batch.input_ids[0, -1] == vlm.processor.tokenizer.eos_token_id == batch.labels[0, -1]


def test_padding_stands_on_the_right_and_is_masked(vlm, data, samples):
    batch = Collator(vlm, data.parent)(
        [samples[0], samples[3]]
    )  # Manx is shorter than Extra-Toes Cat - Hemingway Polydactyl
    short = int(batch.attention_mask[0].sum())
    assert short < batch.input_ids.shape[1]
    assert (batch.labels[0, short:] == IGNORED).all()
    assert batch.attention_mask[0, :short].all()
    assert int(batch.attention_mask.sum(1).max()) == batch.input_ids.shape[1]  # as long as the longest, and no longer


def test_a_long_text_is_not_truncated(vlm, data):
    long = "Describe the cat in every detail. " * 30
    samples = read_samples(data / "train.jsonl")
    sample = make_sample("x", samples[0].image, long, "Manx", breed="Manx", source="t", sha256="x", split="train")
    batch = Collator(vlm, data.parent)([sample])
    assert batch.input_ids.shape[1] > 256
    assert (batch.labels[0] != IGNORED).sum() > 1


def test_padding_does_not_change_the_loss(vlm, data, samples):
    collate, loss = Collator(vlm, data.parent, _cache(vlm, data)), AnswerLoss(vlm)
    with torch.no_grad():
        together, n = loss(collate([samples[0], samples[3]]))
        alone = [loss(collate([s])) for s in (samples[0], samples[3])]
    assert n == sum(m for _, m in alone)
    assert torch.allclose(together, sum(value for value, _ in alone), rtol=1e-5)


def _cache(vlm, data):
    cache = FrozenFeatures(vlm, data.parent / "cache", 1.0)
    samples = read_samples(data / "train.jsonl")
    cache.fill([(data.parent / s.image, s.metadata["sha256"]) for s in samples], 1)
    return cache


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llava", "pixtral"])
@pytest.mark.parametrize("projector", ["none", "full", "lora"])
def test_cached_and_uncached_full_and_answer_logits_give_the_same_gradients(
    kind, projector, model, data, samples, tmp_path
):
    folder = model if kind == "llava" else save_pixtral(tmp_path / "pixtral")
    gradients = []
    for cached, full in ((False, True), (False, False), (True, False)):
        torch.manual_seed(0)
        vlm = open_vlm(str(folder), device="cpu", precision="float32")
        add_lora(vlm, TrainSettings(lora_r=4, lora_dropout=0.0, train_projector=projector))
        for name, parameter in vlm.model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide the gradient of lora_A
                torch.nn.init.normal_(parameter, std=0.2)
        collate = Collator(vlm, data.parent, _cache(vlm, data) if cached else None)
        batch = collate([samples[0], samples[3], samples[2]])
        assert (batch.features is not None) == cached
        if full:
            logits = vlm.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.pixels).logits
            n = int((batch.labels != IGNORED).sum())
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
        else:
            loss, n = AnswerLoss(vlm)(batch)
        (loss / n).backward()
        gradients.append({k: p.grad for k, p in vlm.model.named_parameters() if p.requires_grad})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert (gradient - other[name]).abs().max() <= 1e-5 * max(1.0, float(gradient.abs().max())), name
    assert max(float(g.abs().max()) for g in gradients[0].values()) > 1e-3


def test_check_refuses_a_batch_without_supervision(vlm, data, samples):
    from dataclasses import replace

    batch = Collator(vlm, data.parent, _cache(vlm, data))(samples[:2])
    check_batch(vlm, batch)
    with pytest.raises(CatlibError, match="train-1.*not supervised"):
        masked = batch.labels.clone()
        masked[1] = IGNORED
        check_batch(vlm, replace(batch, labels=masked))
    with pytest.raises(CatlibError, match="image tokens"):
        fewer = batch.input_ids.clone()
        fewer[0, (fewer[0] == image_token_of(vlm.base.config)).nonzero()[0]] = 7
        check_batch(vlm, replace(batch, input_ids=fewer))


def test_segments_show_what_is_supervised(vlm, data, samples):
    parts = segments(Collator(vlm, data.parent)(samples[:1]), 0, vlm.processor, image_token_of(vlm.base.config))
    assert [role for _, role in parts] == ["prompt", "image", "prompt", "answer"]
    assert QUESTION in parts[2][0]
    assert parts[3][0].strip() == f"{BREEDS[0]}</s>"
    assert parts[1][0] == "[16 image tokens]"


@pytest.mark.slow
def test_a_model_is_free_when_its_collator_is(model, data, samples):
    """Else a training that is run again in a notebook would hold both models on the GPU."""
    vlm = open_vlm(str(model), device="cpu", precision="float32")
    collate, held = Collator(vlm, data.parent, workers=2), weakref.ref(vlm.model)
    collate.prefetch(samples[:4])
    collate(samples[:4])
    del vlm, collate
    gc.collect()
    assert held() is None
