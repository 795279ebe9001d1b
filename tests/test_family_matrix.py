"""The matrix of docs/families.md: every cell passes, or is refused with a reason before any weights are loaded."""

import numpy as np
import pytest
from family_matrix import BREEDS, STEPS, Case, offline, own_inputs, run_family, table
from tiny_families import FAMILIES
from transformers.utils import is_torchvision_available

from catlib.classifiers.encoder import ClipEncoder
from catlib.data.conversations import QUESTION
from catlib.errors import CatlibError, InputError
from catlib.training.trainer import train
from catlib.vlm.checkpoint import find_checkpoint, open_vlm
from catlib.vlm.families import image_token_of
from catlib.vlm.models import load_config
from catlib.vlm.processors import limit_pixels, load_processor
from catlib.vlm.prompting import prepared
from catlib.vlm.scoring import LabelScorer

FIXED = ("LLaVA-1.5", "Gemma3", "PaliGemma", "Mllama")  # their photos have one size
NEEDS_TORCHVISION = ("LFM2-VL",)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LLaVA-1.5", "Mllama"])
def test_scores_and_losses_of_a_few_families(name, tmp_path):
    cells = run_family(name, tmp_path, ("untuned scores", "training loss"))
    assert set(cells.values()) == {"pass"}, cells


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_step_of_every_family(name, tmp_path):
    cells = run_family(name, tmp_path)
    assert set(cells) == set(STEPS) and "FAIL" not in " ".join(cells.values()), cells
    if name not in NEEDS_TORCHVISION or is_torchvision_available():
        assert set(cells.values()) == {"pass"}, cells


def test_the_table_numbers_the_reasons():
    text = table({"A": dict.fromkeys(STEPS, "pass"), "B": dict.fromkeys(STEPS, "refused: needs x")})
    assert (
        text.count("| ✓ ") == len(STEPS) and text.count("refused (1)") == len(STEPS) and "1. refused: needs x" in text
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NEEDS_TORCHVISION])
def test_max_pixels_makes_photos_smaller_or_is_refused(name, tmp_path):
    case = Case(name, tmp_path)
    with offline(tmp_path):
        processor = load_processor(case.base)
        if name in FIXED:
            with pytest.raises(InputError, match="max_pixels"):
                load_processor(case.base, 3000)
            return
        token, photo = image_token_of(load_config(case.base)), case.images[1].resize((200, 150))
        counts = [
            int((own_inputs(load_processor(case.base, most), photo, QUESTION)["input_ids"] == token).sum())
            for most in (0, 4000, 10**9)
        ]
        pixels = [
            own_inputs(load_processor(case.base, most), photo, QUESTION)["pixel_values"].numel() for most in (0, 4000)
        ]
        assert pixels[1] < pixels[0] and counts[1] <= counts[0] == counts[2], (pixels, counts)
        before = processor.image_processor.to_dict()
        limit_pixels(processor.image_processor, 0)
        assert processor.image_processor.to_dict() == before


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NEEDS_TORCHVISION])
def test_photos_prepared_one_by_one_score_as_a_batch_does(name, tmp_path):
    case = Case(name, tmp_path)
    with offline(tmp_path):
        vlm = case.open()
        photos = case.images[:4]
        assert len({photo.size for photo in photos}) == 4
        scorer = LabelScorer(vlm, BREEDS, QUESTION)
        ready = [prepared(vlm.processor, photo, QUESTION) for photo in photos]
        np.testing.assert_allclose(scorer.score(ready), scorer.score(photos), atol=1e-4)
        with pytest.raises(CatlibError, match="other questions"):
            scorer.score(ready, [QUESTION] * 3 + ["Which cat?"])


@pytest.mark.slow
def test_max_pixels_is_trained_recorded_and_used_again(tmp_path):
    case = Case("LLaVA-NeXT", tmp_path)
    with offline(tmp_path):
        result = train(case.options("small", max_pixels=4000, mode="lora", watch_photos=0))
        grid = [[56, 56]]
        for found in (find_checkpoint(result.checkpoint), find_checkpoint(result.checkpoint, tuned=False)):
            vlm = open_vlm(found, device="cpu", precision="float32")
            assert vlm.processor.image_processor.image_grid_pinpoints == vlm.base.config.image_grid_pinpoints == grid
        assert load_processor(str(result.checkpoint)).image_processor.image_grid_pinpoints == grid  # what engines read
    assert len(BREEDS) == 3


def test_a_hub_name_that_gives_nothing_has_one_message(tmp_path):
    with offline(tmp_path):
        for load in (load_config, load_processor, ClipEncoder.load, lambda name: open_vlm(name, device="cpu")):
            for name in ("tiny/misspelt", "owner with a space/model"):
                with pytest.raises(InputError, match="neither a folder here nor to be had from the hub"):
                    load(name)
