"""Untrained models of the real classes, small enough for a test: a LLaVA, a CLIP and a SigLIP with their processors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)

from catlib.breeds import BREEDS
from catlib.data.records import Sample
from catlib.files import read_json, write_json
from catlib.settings import TrainSettings
from catlib.training.lora import add_lora
from catlib.vlm.adapters import save_adapter
from catlib.vlm.checkpoint import open_vlm
from catlib.vlm.families import family_of
from catlib.vlm.models import VLM, Checkpoint

SIZE, PATCH = 28, 7  # 16 patches
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ ' ' }}{% else %}ASSISTANT: "
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer(end: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE that has read the breeds' names; with `end` it adds the end token, as CLIP's does."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    texts = [f"USER: What breed is this cat? ASSISTANT: {breed.name}" for breed in BREEDS]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(texts, trainer)
    if end:
        raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        model_max_length=77,
    )


def image_processor(kind: type = CLIPImageProcessor):
    crop = {"crop_size": {"height": SIZE, "width": SIZE}} if kind is CLIPImageProcessor else {}
    size = {"shortest_edge": SIZE} if kind is CLIPImageProcessor else {"height": SIZE, "width": SIZE}
    return kind(size=size, **crop)


def llava(
    text: str = "llama", attention: str = "sdpa", seed: int = 0, question: str = Checkpoint.question, window: int = 64
) -> VLM:
    """A float32 LLaVA as `open_vlm` would return it. Weights are spread wide, so that scores differ visibly."""
    words = tokenizer()
    shape = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    language = LlamaConfig(**shape) if text == "llama" else MistralConfig(**shape, sliding_window=window)
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(SIZE // PATCH) ** 2,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).float().eval()
    processor = LlavaProcessor(
        image_processor(),
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return VLM(model, processor, Checkpoint("tiny", "tiny", question=question), family_of(model))


def save_llava(folder: Path) -> Path:
    """Save the LLaVA with its processor; the folder."""
    vlm = llava()
    vlm.base.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


TEXT = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 77,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": PATCH,
    "initializer_range": 0.2,
}  # fmt: skip
PROJECTION = {"projection_dim": 16}
NAFLEX = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": PATCH, "max_num_patches": 16}
BERT = {"type_vocab_size": 2, "max_position_embeddings": 130}
ENCODERS: dict[str, tuple[str, dict, dict, dict, str, dict | None]] = {
    # model type, more of text, of vision, of both; the processor, the image processor where it is not CLIP's
    "clip": ("clip", {}, {"image_size": SIZE}, PROJECTION, "CLIPProcessor", None),
    "siglip": ("siglip", {}, {"image_size": SIZE}, {}, "SiglipProcessor", None),
    "siglip2 naflex": ("siglip2", {"projection_size": 24}, {"num_patches": 16}, {}, "Siglip2Processor", NAFLEX),
    "altclip": ("altclip", {**BERT, "project_dim": 16}, {"image_size": SIZE}, PROJECTION, "AltCLIPProcessor", None),
    "chinese_clip": ("chinese_clip", BERT, {"image_size": SIZE}, PROJECTION, "ChineseCLIPProcessor",
                     {"image_processor_type": "ChineseCLIPImageProcessor", "size": {"height": SIZE, "width": SIZE},
                      "do_center_crop": False}),
    "metaclip_2": ("metaclip_2", PROJECTION, {"image_size": SIZE, **PROJECTION}, PROJECTION, "CLIPProcessor", None),
}  # fmt: skip


def clip(folder: Path, kind: str = "clip") -> Path:
    """Save a dual encoder of ENCODERS with its processor; the folder. Its tokenizer tells capitals apart."""
    words = tokenizer(end=True)
    model_type, text, vision, both, processor, images = ENCODERS[kind]
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        model_type, text_config={**TEXT, "vocab_size": len(words), **text}, vision_config={**VISION, **vision}, **both
    )
    AutoModel.from_config(config).eval().save_pretrained(folder)
    if images is None:
        image_processor(SiglipImageProcessor if model_type == "siglip" else CLIPImageProcessor).save_pretrained(folder)
        images = read_json(folder / "preprocessor_config.json")
    write_json(folder / "preprocessor_config.json", {**images, "processor_class": processor})
    words.save_pretrained(folder)
    if model_type == "siglip2":  # its tokenizer class wants a token for what it does not know
        for path in folder.glob("tokenizer*.json"):
            path.write_text(path.read_text(encoding="utf-8").replace("<image>", "<unk>"), encoding="utf-8")
    return folder


def tuned(folder: Path, base: Path, breeds: Sequence[str], question: str) -> Path:
    """Save a LoRA adapter of the model in `base` that changes its answers, with the record of its training; the folder."""
    vlm = open_vlm(base, precision="float32")
    add_lora(vlm, TrainSettings(lora_r=4, lora_alpha=8))
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)  # fresh LoRA changes nothing
    save_adapter(vlm, folder)
    write_json(folder / "training.json", {"base_model": str(base), "breeds": list(breeds), "question": question})
    return folder


def photo(seed: int, side: int = 40) -> Image.Image:
    """A photo of smooth random colours."""
    low = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(low).resize((side + seed % 7, side), Image.Resampling.BICUBIC)


def write_photos(folder: Path, breeds: list[str]) -> list[Sample]:
    """One JPEG for each entry of `breeds`, and the samples that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for i, breed in enumerate(breeds):
        photo(i).save(folder / f"{i:03}.jpg")
        samples.append(Sample(f"photo-{i}", f"{i:03}.jpg", (), {"breed": breed}))
    return samples
