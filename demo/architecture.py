"""The demo models before training: tiny CLIP and LLaVA of the real classes, with their tokenizers and processors.

As in LLaVA-1.5, LLaVA's tower is CLIP's vision model, read at its last layer but one without the class token,
followed by
a two-layer projector and a Llama decoder.
"""

import json
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

SIDE = 96  # pixels
PATCH = 16  # pixels; 36 image tokens
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
CLIP_MERGES, LLAMA_MERGES = 500, 420
Model = TypeVar("Model", bound=PreTrainedModel)
CHAT_TEMPLATE = (  # LLaVA-1.5's, with the end token after an answer
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ ' ' }}"
    "{% else %}ASSISTANT: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_clip(texts: Iterable[str]) -> tuple[CLIPModel, CLIPProcessor]:
    """An untrained CLIP whose tokenizer is made from `texts`. Draws its weights from torch's global generator."""
    tokenizer = _clip_tokenizer(texts)
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "projection_dim": 128,
        **ends,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "projection_dim": 128,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    return model, CLIPProcessor(image_processor=_image_processor(), tokenizer=tokenizer)


def make_llava(clip: CLIPModel, texts: Iterable[str]) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA with the trained tower of `clip` and an untrained projector and decoder."""
    tokenizer = _llama_tokenizer(texts)
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    decoder = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **ends,
    )
    config = LlavaConfig(
        vision_config=clip.config.vision_config,
        text_config=decoder,
        image_token_index=tokenizer.get_vocab()[IMAGE_TOKEN],
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    tower = {k.removeprefix("vision_model."): v for k, v in clip.state_dict().items() if k.startswith("vision_model.")}
    own = model.model.vision_tower
    own.load_state_dict({name: tower[name.removeprefix("vision_model.")] for name in own.state_dict()})
    for key, value in ends.items():
        setattr(model.generation_config, key, value)
    processor = LlavaProcessor(
        image_processor=_image_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


def set_dtype(model: Model, dtype: torch.dtype) -> Model:
    """Weights in the type they are shipped in; the config says so, too."""
    model.config.dtype = dtype
    torch.nn.Module.to(model, dtype)
    return model


def _image_processor() -> CLIPImageProcessor:
    half = [0.5, 0.5, 0.5]
    crop = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop, image_mean=half, image_std=half)


def _clip_tokenizer(texts: Iterable[str]) -> CLIPTokenizer:
    """Byte-level BPE, lower case, words closed by </w>, as CLIP's.

    The end token's id must not be 2, which CLIP's code takes for a mark of old files.
    """
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    reference = CLIPTokenizer().backend_tokenizer
    bpe.pre_tokenizer = reference.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + CLIP_MERGES,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    merges = _merges(bpe)
    tokens = [
        *alphabet,
        *(letter + "</w>" for letter in alphabet),
        *(a + b for a, b in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _llama_tokenizer(texts: Iterable[str]) -> LlamaTokenizer:
    """BPE with "▁" for spaces and single bytes for what it has not seen, as Llama's; <image> and <pad> at the end."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=LLAMA_MERGES + 80, show_progress=False))
    merges = _merges(bpe)
    letters = sorted(token for token in bpe.get_vocab() if len(token) == 1)
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *letters,
        *(a + b for a, b in merges),
    ]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = LlamaTokenizer(
        vocab=vocab, merges=merges, add_bos_token=True, pad_token=PAD_TOKEN, model_max_length=512
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _merges(bpe: Tokenizer) -> list[Any]:
    pairs = json.loads(bpe.to_str())["model"]["merges"]
    split = (pair.split(" ") if isinstance(pair, str) else pair for pair in pairs)
    return [(left, right) for left, right in split]
