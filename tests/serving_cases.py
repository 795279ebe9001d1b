"""What the serving tests share: a tiny LLaVA with an adapter whose answers differ from the base's, and photos as bytes."""

import io
import json
from pathlib import Path

import pytest
import torch
from tiny_encoders import photo
from tiny_models import BREEDS, save_llava

from catlib.settings import TrainSettings
from catlib.training.lora import add_lora
from catlib.vlm.adapters import save_adapter
from catlib.vlm.checkpoint import open_vlm

QUESTION = "Tell me the breed."  # what the checkpoint was trained with: not the standard question
BROKEN = b"\xff\xd8\xff\xe0 this is no JPEG"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads of tiny models wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_tuned(folder: Path) -> Path:
    """A checkpoint of a tiny LLaVA: adapter, training record, base beside it."""
    base = save_llava(folder / "base")
    vlm = open_vlm(base, precision="float32", device="cpu")
    add_lora(vlm, TrainSettings(lora_r=4, lora_alpha=8))
    torch.manual_seed(3)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)  # fresh LoRA changes nothing
    save_adapter(vlm, folder / "tuned")
    record = {"base_model": str(base), "breeds": list(BREEDS), "question": QUESTION}
    (folder / "tuned" / "training.json").write_text(json.dumps(record))
    return folder / "tuned"


def jpeg(number: int) -> bytes:
    """A photo of its own for each number, as the bytes of a file."""
    stream = io.BytesIO()
    photo(number).save(stream, "JPEG")
    return stream.getvalue()
