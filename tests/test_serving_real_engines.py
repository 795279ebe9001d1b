"""vLLM and llama.cpp themselves, where they are installed: the same answers as transformers, to the token.

CATLIB_VLLM_PYTHON=… CATLIB_LLAMA_CPP=… CATLIB_LLAMA_SERVER=… pytest -m engine
"""

import json
from contextlib import nullcontext

import pytest
import torch
from demo_files import LLAVA

from catlib.classifiers.endpoint import EndpointClassifier, crop_side
from catlib.classifiers.vlm import VLMClassifier
from catlib.errors import CatlibError
from catlib.gguf.engines import find_llama_server, find_vllm, llama_command, vllm_command
from catlib.gguf.export import export_gguf, find_converter
from catlib.gguf.parity import Speaker, class_token_last, compare_spoken, speak_here
from catlib.serving.engine_process import Where, free_port, running
from catlib.serving.export import Photos, find_mergeable, merge
from catlib.settings import TrainSettings
from catlib.training.lora import add_lora
from catlib.vlm.adapters import save_adapter
from catlib.vlm.checkpoint import open_vlm
from demo.photos import SHARES, draw_breed

pytestmark = pytest.mark.engine
CATS = tuple(SHARES)[:8]
PHOTOS = Photos(CATS, tuple(draw_breed(breed, "test", 0, seed=0) for breed in CATS), "drawn cats")


def needed(*finders):
    """A mark that skips a test, with the reason, where one of the finders raises."""
    for find in finders:
        try:
            find()
        except CatlibError as error:
            return pytest.mark.skip(reason=str(error))
    return lambda test: test


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


def make_adapter(place, train_projector):
    """An adapter of the shipped LLaVA that changes its answers."""
    folder = place / train_projector
    vlm = open_vlm(LLAVA, precision="float32")
    add_lora(vlm, TrainSettings(lora_r=4, lora_alpha=8, train_projector=train_projector))
    torch.manual_seed(2)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(vlm, folder)
    (folder / "training.json").write_text(json.dumps({"base_model": LLAVA}))
    return folder


def spoken_here(source):
    vlm = open_vlm(source, device="cpu", precision="float32")
    return [speak_here(vlm, image, source.question) for image in PHOTOS.images], held_here(vlm)


def held_here(vlm):
    return VLMClassifier(vlm, decoding="constrained").classify(PHOTOS.images).predicted


def spoken_there(command, source, crop, log):
    """What the engine says freely, and the breeds that it names when it is held to the list."""
    with running(command, 600, log):
        about = (f"{command.url}/v1#{command.model}", source.breeds, source.question)
        speaker = Speaker(*about, crop=crop)
        spoken = [speaker.speak(image) for image in PHOTOS.images]
        held = EndpointClassifier(*about, crop=crop, decoding="").classify(PHOTOS.images)
        assert held.answers == held.predicted
        return spoken, held.predicted


@needed(find_vllm)
@pytest.mark.parametrize("train_projector", ["none", "lora"])
def test_vllm_says_the_same_with_an_adapter_unmerged(place, train_projector):
    base = place / "base"
    if not base.exists():
        merge(find_mergeable(LLAVA), base, dtype="float32", count=1)
    source = find_mergeable(make_adapter(place, train_projector), str(base))
    command = vllm_command(
        str(base), Where(port=free_port()), adapter=source.adapter, dtype="float32", max_model_len=256
    )
    there, held_there = spoken_there(command, source, crop_side(base), place / "log")
    here, held = spoken_here(source)
    parity = compare_spoken(here, there, PHOTOS.names)
    assert parity.within(0.01), parity
    assert held_there == held and len(set(held)) > 1


@needed(find_vllm)
def test_vllm_says_the_same_with_a_merged_model(place):
    adapter = make_adapter(place, "full")
    merged = merge(find_mergeable(adapter), place / "merged", dtype="float32", count=1).folder
    source = find_mergeable(adapter)
    command = vllm_command(str(merged), Where(port=free_port()), dtype="float32", max_model_len=256)
    there, held_there = spoken_there(command, source, crop_side(merged), place / "log")
    here, held = spoken_here(source)
    parity = compare_spoken(here, there, PHOTOS.names)
    assert parity.within(0.01), parity
    assert held_there == held


@needed(find_llama_server, find_converter)
def test_llama_cpp_says_the_same_or_shows_the_known_defect(place):
    pytest.importorskip("gguf", reason="catlib[gguf] is not installed")
    photos = [place / f"{name}.png" for name in PHOTOS.names]
    for path, image in zip(photos, PHOTOS.images, strict=True):
        image.save(path)
    source = find_mergeable(make_adapter(place, "lora"))
    result = export_gguf(source, place / "gguf", device="cpu", photos=photos)
    parity = result.with_defect or result.verified
    assert parity.within(0.1) and parity.photos == 8, parity
    command = llama_command(result.folder, Where(port=free_port()))
    _, held_there = spoken_there(command, source, crop_side(result.folder), place / "log")
    vlm = open_vlm(source, device="cpu", precision="float32")
    with class_token_last(vlm) if result.with_defect else nullcontext():
        assert held_there == held_here(vlm)
