"""Tokens are those of the processor's own `apply_chat_template(tokenize=True)`; a label is the name and the end of its turn.

Templates as the hub's write them (LLaVA-1.5's is its own; the others after `hub-layouts.md`, unverified where no hub is reached).
"""

import pytest
import torch
from demo_files import LLAVA
from tiny_encoders import TEMPLATE, llava, photo
from tiny_families import save_gemma3, save_idefics3, save_mllama, save_qwen2_vl, turns
from tiny_models import BREEDS, QUESTION, write_dataset
from tokenizers import processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from catlib.breeds import BREEDS as ALL
from catlib.data.records import read_samples
from catlib.errors import CatlibError
from catlib.training.loss import AnswerLoss
from catlib.vlm.batches import IGNORED, Collator, check_batch
from catlib.vlm.checkpoint import open_vlm
from catlib.vlm.decoding import generate_constrained, generate_free
from catlib.vlm.prompting import answer_tokens, end_tokens, inference_inputs, known_ends, label_tokens, messages
from catlib.vlm.scoring import LabelScorer

# llava-hf/llava-1.5-7b-hf: an answer ends with a space, no end token
LLAVA_15 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}[/INST]{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = turns("<image>", "<|im_start|>ROLE\n", "<|im_end|>\n")
SMOL = turns("<image>", "<|im_start|>ROLE: ", "<end_of_utterance>\n", "<|im_start|>")
LAYOUTS = {  # template, special tokens beside </s>, end tokens of generation_config.json, what ends a label
    "LLaVA-1.5": (LLAVA_15, [], "</s>", "</s>"),
    "Mistral": (MISTRAL, ["[INST]", "[/INST]"], "</s>", "</s>"),
    "ChatML": (CHATML, ["<|im_start|>", "<|im_end|>"], ["<|im_end|>", "</s>"], "<|im_end|>"),
    "ChatML, generation_config.json without it": (CHATML, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
    "Idefics3": (SMOL, ["<|im_start|>", "<end_of_utterance>"], ["</s>", "<end_of_utterance>"], "<end_of_utterance>"),
    "more end tokens behind the turn's": (
        turns("<image>", "ROLE: ", "<|eot|></s>", "<s>"), ["<|eot|>"], ["<|eot|>", "</s>"], "<|eot|>"),
    "a line and another end token behind it": (
        turns("<image>", "ROLE: ", "<|eot|>\n</s>"), ["<|eot|>"], "</s>", "<|eot|>"),
    "a space before the end token": (TEMPLATE.replace("{{ eos_token }}", " {{ eos_token }}"), [], "</s>", "</s>"),
    "an end token in two parts": (
        turns("<image>", "<|CHAT|>", "<|END_RESPONSE|><|END_TURN|>"), ["<|CHAT|>", "<|END_RESPONSE|>", "<|END_TURN|>"],
        "<|END_TURN|>", "<|END_RESPONSE|><|END_TURN|>"),
}  # fmt: skip


def model(layout: str, bos: bool = True):
    """A tiny LLaVA that is asked by a family's template. The tokenizer writes <s>, as most of the real ones do."""
    template, special, ends, _ = LAYOUTS[layout]
    vlm = llava()
    words: PreTrainedTokenizerFast = vlm.processor.tokenizer
    words.add_special_tokens({"additional_special_tokens": ["<image>", *special]})
    if bos:
        words.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    vlm.base.resize_token_embeddings(len(words), mean_resizing=False)
    vlm.processor.chat_template = template
    vlm.base.generation_config = GenerationConfig(eos_token_id=ends and words.convert_tokens_to_ids(ends))
    return vlm


def own_tokens(vlm, image, answer=None):
    """What the processor itself makes of photo, question and answer, tokenized."""
    turn = messages(QUESTION, answer)
    turn[0]["content"][0] = {"type": "image", "image": image}
    return vlm.processor.apply_chat_template(
        turn, add_generation_prompt=answer is None, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.slow
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_and_labels_are_the_processors_own(layout, bos):
    vlm, end = model(layout, bos), LAYOUTS[layout][-1]
    words, prompt = vlm.processor.tokenizer, own_tokens(vlm, photo(0))["input_ids"][0].tolist()
    assert inference_inputs(vlm, [photo(0)], [QUESTION])["input_ids"][0].tolist() == prompt
    assert prompt.count(words.bos_token_id) <= 1
    for name in (*BREEDS, "Sphynx - Hairless Cat", "\tManx \n"):
        label, whole = (
            label_tokens(vlm, QUESTION, name),
            own_tokens(vlm, photo(0), name.strip())["input_ids"][0].tolist(),
        )
        assert words.decode(label).strip() == name.strip() + end
        assert not [token for token in label if not words.decode([token]).strip()]
        body = [*prompt, *label][
            : -1 if "LLaVA" in layout or "space" in layout else None
        ]  # there the template ends otherwise
        assert whole[: len(body)] == body
    assert words.decode(end_tokens(vlm)[:1]) == end.replace("<|END_RESPONSE|>", "")
    assert end_tokens(vlm)[0] == label[-1] and set(known_ends(vlm)) <= set(end_tokens(vlm))


def test_only_what_stands_behind_the_answer_ends_it():
    words = (vlm := model("ChatML")).processor.tokenizer
    assert words.decode(label_tokens(vlm, "Is it a <|im_end|>? Manx", "Manx")) == "Manx<|im_end|>"
    assert words.decode(label_tokens(vlm, "Manx", "im")) == "im<|im_end|>"


def test_a_template_that_rewrites_the_answer_is_refused():
    vlm = model("ChatML")
    vlm.processor.chat_template = CHATML.replace("part['text'] | trim", "part['text'] | upper")
    with pytest.raises(CatlibError, match="changes the answer"):
        answer_tokens(vlm.processor, QUESTION, "Manx")


@pytest.mark.parametrize("kind", ["demo", "small LLaVA"])
def test_labels_that_end_with_the_templates_own_end_token_stay(kind):
    """Name and end token as they follow the prompt: figures of models that were trained before do not move."""
    vlm = open_vlm(str(LLAVA), device="cpu", precision="float32") if kind == "demo" else llava()
    words, question = vlm.processor.tokenizer, vlm.question
    prompt = f"USER: <image>\n{question} ASSISTANT:"
    for breed in ALL:
        whole = words(f"{prompt} {breed.name}</s>")["input_ids"]
        assert words(prompt)["input_ids"] + label_tokens(vlm, question, breed.name) == whole
    assert end_tokens(vlm) == [words.eos_token_id]


@pytest.mark.slow
def test_generation_stops_at_every_end_token_and_reads_nothing_else_of_the_folder():
    vlm = model("Idefics3")
    ids = vlm.processor.tokenizer.convert_tokens_to_ids
    expected = generate_free(vlm, [photo(0), photo(1)], QUESTION, 8)
    constrained = generate_constrained(vlm, [photo(0), photo(1)], QUESTION, BREEDS)
    folder = GenerationConfig(
        eos_token_id=vlm.base.generation_config.eos_token_id, min_new_tokens=8, min_length=400, num_beams=3, do_sample=True,
        num_return_sequences=2, sequence_bias={(ids("an"),): 50.0}, stop_strings=["a", "i"], suppress_tokens=[5, 6],
        begin_suppress_tokens=[7], forced_eos_token_id=9, no_repeat_ngram_size=1, bad_words_ids=[[11]], temperature=0.3,
        repetition_penalty=3.0, encoder_no_repeat_ngram_size=1, guidance_scale=2.0, exponential_decay_length_penalty=(1, 9.0),
    )  # fmt: skip
    vlm.base.generation_config = folder
    assert generate_free(vlm, [photo(0), photo(1)], QUESTION, 8) == expected
    assert generate_constrained(vlm, [photo(0), photo(1)], QUESTION, BREEDS) == constrained
    assert vlm.base.generation_config is folder  # what is exported is the folder's own
    for end in end_tokens(vlm):
        calls = []

        def write(_, given, logits, end=end, calls=calls):
            calls.append(1)
            return torch.nn.functional.one_hot(torch.full(logits.shape[:-1], end), logits.shape[-1]) * 100.0

        handle = vlm.base.get_output_embeddings().register_forward_hook(write)
        try:
            assert generate_free(vlm, [photo(0)], QUESTION) == [""] and len(calls) == 1
        finally:
            handle.remove()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("prompting"))


@pytest.mark.slow
@pytest.mark.parametrize("save", [save_gemma3, save_mllama, save_idefics3, save_qwen2_vl])
def test_training_and_scores_equal_a_plain_pass_on_the_processors_inputs(save, data, tmp_path):
    vlm = open_vlm(str(save(tmp_path)), device="cpu", precision="float32")
    samples = read_samples(data / "train.jsonl", data.parent)[:4]
    batch = Collator(vlm, data.parent)(samples)
    check_batch(vlm, batch)
    with torch.no_grad():
        loss, count = AnswerLoss(vlm)(batch)
    from catlib.data.images import inside, open_image

    images = [open_image(inside(data.parent, sample.image)) for sample in samples]
    scorer, total = LabelScorer(vlm, BREEDS, QUESTION), 0.0
    scores = scorer.score(images)
    for row, (image, sample) in enumerate(zip(images, samples, strict=True)):
        prompt = own_tokens(vlm, image)
        start = prompt["input_ids"].shape[1]
        real = batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
        assert real[:start] == prompt["input_ids"][0].tolist()
        assert real[start:] == batch.labels[row][batch.labels[row] != IGNORED].tolist()
        for j, breed in enumerate(BREEDS):
            plain = plain_score(vlm, own_tokens(vlm, image, breed), start, scorer.labels[j])
            assert abs(scores[row, j] - plain) < 1e-3
            total += plain if breed == sample.answer else 0.0
    assert count == sum(len(scorer.labels[BREEDS.index(sample.answer)]) for sample in samples)
    assert abs(loss.item() + total) < 1e-2
    shown = [name for name in ("token_type_ids", "cross_attention_mask", "mm_token_type_ids") if name in prompt]
    assert all(batch.pixels[name].shape[:2] == batch.input_ids.shape for name in shown)


def plain_score(vlm, inputs, start, label):
    with torch.no_grad():
        steps = vlm.base(**inputs).logits[0].double().log_softmax(-1)
    assert inputs["input_ids"][0, start : start + len(label)].tolist() == label
    return sum(steps[start - 1 + i, token].item() for i, token in enumerate(label))


def test_a_tensor_that_nobody_knows_is_refused(data):
    vlm = llava()
    inner = vlm.processor.image_processor.__class__.preprocess

    class Odd(vlm.processor.image_processor.__class__):
        def preprocess(self, *args, **options):
            found = inner(self, *args, **options)
            found["depth_map"] = torch.zeros(1, 3)
            return found

    vlm.processor.image_processor.__class__ = Odd
    with pytest.raises(CatlibError, match="depth_map"):
        inference_inputs(vlm, [photo(0)], [QUESTION])
    with pytest.raises(CatlibError, match="depth_map"):
        Collator(vlm, data.parent)(read_samples(data / "train.jsonl", data.parent)[:1])
