"""The shipped demo models: they load as any checkpoint, are small, know common breeds and no priority one."""

import json

import numpy as np
import pytest
import torch
from demo_files import LLAVA
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    CLIPProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from catlib.breeds import BREEDS, PRIORITY_BREEDS
from catlib.classifiers.encoder import ClipEncoder
from catlib.errors import InputError
from catlib.settings import TrainSettings
from catlib.training.lora import add_lora
from catlib.vlm.adapters import save_adapter
from catlib.vlm.checkpoint import find_checkpoint, open_vlm
from demo.corpus import COMMON, OTHERS, QUESTIONS, draw_corpus, sketch
from demo.photos import draw_breed
from demo.tiny_models import MODELS, build, size_mb

KNOWN = ("Abyssinian", "Bengal", "Calico", "Russian Blue", "Siamese")  # the common breeds that differ most


@pytest.fixture(scope="module")
def clip():
    folder = MODELS / "clip"
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), CLIPProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def llava():
    folder = MODELS / "llava"
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, LlavaProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def cats():
    """Six drawn cats each of the well-known and of the priority breeds, with their names."""
    names = [name for name in (*KNOWN, *PRIORITY_BREEDS) for _ in range(6)]
    return names, [draw_breed(name, "test", i % 6, seed=11) for i, name in enumerate(names)]


def recall(names, predicted, among):
    return np.mean([p == n for n, p in zip(names, predicted, strict=True) if n in among])


def test_the_shipped_models_are_small():
    assert size_mb(MODELS) <= 8
    assert {path.name for path in (MODELS / "llava").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
    }


def test_the_tower_of_llava_is_clips(clip, llava):
    ours, clips = llava[0].model.vision_tower.state_dict(), clip[0].vision_model.state_dict()
    assert len(ours) == len(clips)
    for name, weight in ours.items():
        assert torch.equal(weight, clips[name.removeprefix("vision_model.")])
    config = llava[0].config
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")


def test_tokenizers_fit_their_models_and_spell_every_breed(clip, llava):
    for model, processor, reader in ((*clip, clip[0].text_model), (*llava, llava[0])):
        tokenizer = processor.tokenizer
        vocabulary = model.config.text_config.vocab_size
        assert vocabulary == len(tokenizer) == reader.get_input_embeddings().weight.shape[0]
        assert None not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    tokenizer = llava[1].tokenizer
    for breed in BREEDS:
        ids = tokenizer(breed.name)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == breed.name
    config = clip[0].config.text_config
    assert config.eos_token_id == clip[1].tokenizer.eos_token_id != 2


def test_auto_classes_load_them_too(llava):
    folder = MODELS / "llava"
    text = "What breed is the cat in this photo?"
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == llava[1].tokenizer(text)["input_ids"]
    assert type(AutoProcessor.from_pretrained(folder)) is LlavaProcessor
    assert type(AutoProcessor.from_pretrained(MODELS / "clip")) is CLIPProcessor


def test_the_chat_template_round_trip(llava):
    processor = llava[1]
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": "York Chocolate"}]}
    prompt = processor.apply_chat_template([user], add_generation_prompt=True)
    text = processor.apply_chat_template([user, reply])
    assert prompt == f"USER: <image>\n{QUESTIONS[0]} ASSISTANT:"
    assert text == f"{prompt} York Chocolate</s>"
    picture = draw_breed("York Chocolate", "test", 0, seed=0)
    before, whole = (
        processor(images=picture, text=t, return_tensors="pt")["input_ids"][0].tolist() for t in (prompt, text)
    )
    assert whole[: len(before)] == before, "the answer leaves the prompt's tokens as they are"
    assert whole[0] == processor.tokenizer.bos_token_id and whole[-1] == processor.tokenizer.eos_token_id
    assert whole.count(processor.image_token_id) == llava[0].config.image_seq_length
    assert processor.tokenizer.decode(whole[len(before) :], skip_special_tokens=True).strip() == "York Chocolate"


@pytest.mark.slow
def test_llava_names_common_breeds_and_no_priority_one(llava, cats):
    model, processor = llava
    names, pictures = cats
    prompt = f"USER: <image>\n{QUESTIONS[0]} ASSISTANT:"
    inputs = processor(images=pictures, text=[prompt] * len(pictures), return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answers = processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    predicted = [answer.strip() for answer in answers]
    assert {breed.name for breed in BREEDS} >= set(predicted), "every answer is a breed's name and stops"
    assert recall(names, predicted, KNOWN) >= 0.6
    assert recall(names, predicted, PRIORITY_BREEDS) <= 0.1


@pytest.mark.slow
def test_clip_recognises_common_breeds_and_hardly_any_priority_one(clip, cats):
    model, processor = clip
    names, pictures = cats
    breeds = sorted(set(COMMON) | set(PRIORITY_BREEDS))
    inputs = processor(
        images=pictures, text=[f"a photo of a {breed}." for breed in breeds], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        predicted = [breeds[i] for i in model(**inputs).logits_per_image.argmax(1)]
    assert recall(names, predicted, KNOWN) >= 0.6
    assert recall(names, predicted, PRIORITY_BREEDS) <= 0.25


@pytest.mark.long
@pytest.mark.slow
def test_the_corpus_shows_no_priority_breed(tmp_path):
    corpus, again = draw_corpus(60, seed=5, workers=1), draw_corpus(60, seed=5, workers=2)
    assert torch.equal(corpus.pixels, again.pixels) and corpus.breeds == again.breeds
    assert not set(corpus.breeds) & set(PRIORITY_BREEDS)
    assert not (set(COMMON) | set(OTHERS)) & set(PRIORITY_BREEDS)
    assert corpus.labels().shape == (60, 9)
    rng = np.random.default_rng(0)
    assert all(
        sketch(look) in corpus.caption(i, rng) for i, look in enumerate(corpus.looks) if corpus.breeds[i] is None
    )


def share_that_differs(some, others):
    """Share of the weights, of the matrices that are as large in both, that lie further apart than bf16 rounds."""
    assert some.keys() == others.keys()
    pairs = [(a, others[name]) for name, a in some.items() if a.shape == others[name].shape]
    assert len(pairs) > 0.9 * len(some)  # the vocabulary grows with the breeds' texts
    apart = [((a - b).abs() > 1e-3 + 0.01 * a.abs()).flatten() for a, b in pairs]
    return torch.cat(apart).float().mean().item()


@pytest.mark.long
@pytest.mark.slow
def test_the_command_makes_the_same_models_again(tmp_path):
    threads = torch.get_num_threads()
    made = [build(tmp_path / str(i), pictures=64, clip_epochs=1, llava_epochs=1, seed=2) for i in range(2)]
    assert torch.get_num_threads() == threads
    for kind in ("clip", "llava"):
        first, second, shipped = (load_file(place / kind / "model.safetensors") for place in (*made, MODELS))
        # The order in which a sum is added may depend on where memory lies, and Adam's first steps are as long for a tiny
        # gradient as for a large one: where a gradient is nothing but rounding, a weight may go the other way.
        assert share_that_differs(first, second) < 0.02 < 0.5 < share_that_differs(first, shipped)
        shapes = {p.name for p in (made[0] / kind).iterdir()}
        assert shapes == {p.name for p in (MODELS / kind).iterdir()}


def test_models_are_found_by_their_path_below_the_project_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_checkpoint("demo/models/llava")
    assert found.base == LLAVA and found.folder == MODELS / "llava" and found.adapter is None
    assert ClipEncoder.load("demo/models/clip").name == "demo/models/clip"
    assert find_checkpoint(LLAVA).base == LLAVA
    assert find_checkpoint("llava-hf/llava-1.5-7b-hf").base == "llava-hf/llava-1.5-7b-hf"
    for wrong in (str(tmp_path / "nothing"), "./nothing", "models/of/mine"):
        with pytest.raises(InputError, match="no such folder"):
            find_checkpoint(wrong)
    with pytest.raises(InputError, match="no model is named"):
        find_checkpoint("")


@pytest.mark.slow
def test_an_adapter_records_its_base_as_it_was_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vlm = open_vlm("demo/models/llava", precision="float32")
    add_lora(vlm, TrainSettings(lora_r=4, lora_alpha=8))
    save_adapter(vlm, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "demo/models/llava"
    again = find_checkpoint(tmp_path / "adapter")
    assert again.base == LLAVA and open_vlm(again, precision="float32").name == "demo/models/llava"
