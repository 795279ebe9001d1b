"""Adapters and bases of others: names of transformers 4, expressions that do not end, ranks and weights that are not as said."""

import json
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_encoders import photo
from tiny_families import save
from tiny_models import BREEDS, QUESTION
from transformers import AutoModelForImageTextToText

from catlib.errors import InputError
from catlib.files import read_json, write_json
from catlib.vlm.adapters import SCHEME, _first_fingerprint, fingerprint
from catlib.vlm.checkpoint import open_vlm
from catlib.vlm.scoring import LabelScorer

NAMES = ["q_proj", "k_proj", "up_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save("LLaVA-1.5", tmp_path_factory.mktemp("base") / "model")


def adapter(folder, base, **options):
    """As TRL and others write one with plain peft, on last names: the tower's layers of these names get it, too."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": NAMES, **options})
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    facts = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", {**facts, "base_model_name_or_path": str(base)})
    return folder


def scores(folder, precision="float32"):
    vlm = open_vlm(folder, device="cpu", precision=precision)
    return LabelScorer(vlm, BREEDS, QUESTION).score([photo(0), photo(1)])


def rename(folder, old, new):
    """Write the weights under other names, as another version of transformers did."""
    path = folder / "adapter_model.safetensors"
    save_file({re.sub(old, new, name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def edit(folder, **facts):
    write_json(folder / "adapter_config.json", {**read_json(folder / "adapter_config.json"), **facts})


@pytest.mark.slow
def test_adapters_of_transformers_4_answer_as_plain_peft_loads_them(base, tmp_path):
    own = scores(adapter(tmp_path / "new", base))
    old = adapter(tmp_path / "old", base)
    rename(old, r"^base_model\.model\.model\.language_model\.", "base_model.model.language_model.model.")
    rename(old, r"^base_model\.model\.model\.vision_tower\.", "base_model.model.vision_tower.vision_model.")
    assert any(
        name.startswith("base_model.model.language_model.model")
        for name in load_file(old / "adapter_model.safetensors")
    )
    assert np.allclose(scores(old), own, atol=1e-5) and not np.allclose(scores(base), own, atol=0.1)
    model = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), str(old)
    ).eval()
    vlm = open_vlm(base, device="cpu", precision="float32")
    vlm.model = model
    assert np.allclose(LabelScorer(vlm, BREEDS, QUESTION).score([photo(0), photo(1)]), own, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"k_proj": 2}}])
def test_merging_for_inference_changes_nothing_but_rounding(base, tmp_path, options):
    folder = adapter(tmp_path, base, target_modules=r".*language_model.*\.(q|k|up)_proj", **options)
    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    opened = open_vlm(folder, device="cpu", precision="float32")
    assert not [name for name, _ in opened.model.named_parameters() if "lora_" in name] and opened.adapter == folder
    opened.model = PeftModel.from_pretrained(plain, str(folder)).eval()
    unmerged = LabelScorer(opened, BREEDS, QUESTION).score([photo(0), photo(1)])
    assert np.abs(scores(folder) - unmerged).max() < 1e-4
    # In bf16 the merged weights are rounded once: as far from the exact scores as adapters in bf16 are, not farther.
    half = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16), str(folder)
    )
    opened.model = half.to(torch.bfloat16).eval()
    apart = np.abs(LabelScorer(opened, BREEDS, QUESTION).score([photo(0), photo(1)]) - unmerged).max()
    assert np.abs(scores(folder, "bfloat16") - unmerged).max() < max(2.5 * apart, 0.1)


def test_an_expression_is_not_run_and_wrong_ranks_are_refused_before_the_base_is_loaded(base, tmp_path, monkeypatch):
    folder = adapter(tmp_path, base)
    edit(folder, target_modules="(?:(?:[a-z_.0-9]+)+)+!$", exclude_modules="(.*)*!")
    assert np.isfinite(scores(folder)).all()
    monkeypatch.setattr("catlib.vlm.checkpoint.load_base", lambda *_: pytest.fail("the base was loaded"))
    for facts, said in (
        ({"r": 10**9}, r"\(4, \d+\) in place of"),
        ({"r": 8}, r"\(4, \d+\) in place of"),
        ({"r": None}, r"\(4, \d+\) in place of"),
        ({"alpha_pattern": {"(a+)+$": 4}}, "repeats"),
        ({"rank_pattern": {".*q_proj": 4}}, "repeats"),
        ({"rank_pattern": [4]}, "objects"),
    ):
        before = read_json(folder / "adapter_config.json")
        edit(folder, **facts)
        with pytest.raises(InputError, match=said):
            open_vlm(folder, device="cpu", precision="float32")
        write_json(folder / "adapter_config.json", before)


def test_matrices_that_do_not_fit_each_other_are_refused_before_the_base_is_loaded(base, tmp_path, monkeypatch):
    folder = adapter(tmp_path, base)
    whole = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in whole if ".lora_B." in name)
    monkeypatch.setattr("catlib.vlm.checkpoint.load_base", lambda *_: pytest.fail("the base was loaded"))
    for changed in (
        {name: whole[name][:, :2].contiguous()},
        {name: whole[name].flatten().contiguous()},
        {name.replace("lora_B", "lora_A"): torch.zeros(3, 16)},
    ):
        save_file({**whole, **changed}, folder / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=r"in place of the rank"):
            open_vlm(folder, device="cpu", precision="float32")
    save_file({n: t for n, t in whole.items() if n != name}, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lora_B is missing"):
        open_vlm(folder, device="cpu", precision="float32")


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"trainable_token_indices": [[1, 2], [3]]}, "does not fit"),
        ({"trainable_token_indices": [10**9]}, "does not fit"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"peft_type": "IA3"}, "does not fit"),
        ({"use_dora": True}, "missing"),
    ],
)
def test_what_peft_cannot_build_is_refused(base, tmp_path, facts, said):
    folder = adapter(tmp_path, base)
    edit(folder, **facts)
    with pytest.raises(InputError, match=said):
        open_vlm(folder, device="cpu", precision="float32")


def test_tensors_without_their_place_are_refused(base, tmp_path):
    folder = adapter(tmp_path, base)
    rename(folder, r"layers\.0", "layers.7")
    with pytest.raises(InputError, match="does not fit"):
        scores(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(InputError, match="broken"):
        scores(folder)


@pytest.mark.slow
def test_the_fingerprint_sees_every_tensor_and_no_precision(base, tmp_path):
    own = fingerprint(open_vlm(base, device="cpu", precision="float32"))
    assert own.startswith(SCHEME)
    for precision in ("bfloat16", "4-bit"):
        assert fingerprint(open_vlm(base, device="cpu", precision=precision)) == own
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half", max_shard_size="100kB")
    copy_rest(base, tmp_path / "half")
    weights = load_file(base / "model.safetensors")
    vlm = open_vlm(base, device="cpu", precision="float32")

    def of(folder):
        vlm.checkpoint = open_vlm(folder, device="cpu", precision="float32").checkpoint
        return fingerprint(vlm)

    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1 and of(tmp_path / "half") == own
    for part in ("q_proj.weight", "mlp.fc1.weight", "multi_modal_projector.linear_1.weight", "lm_head.weight"):
        name = next(name for name in weights if name.endswith(part))
        changed = tmp_path / part
        changed.mkdir()
        copy_rest(base, changed)
        save_file({**weights, name: torch.randn_like(weights[name])}, changed / "model.safetensors", {"format": "pt"})
        assert of(changed) != own, part


@pytest.mark.slow
def test_an_adapter_is_not_applied_to_its_own_merged_model_and_old_records_are_read(base, tmp_path, caplog):
    folder = adapter(tmp_path / "adapter", base)
    plain = open_vlm(base, device="cpu", precision="float32")
    write_json(folder / "training.json", {"base_model": str(base), "base_fingerprint": fingerprint(plain)})
    merged = open_vlm(folder, device="cpu", precision="float32")
    merged.model.save_pretrained(tmp_path / "merged")
    copy_rest(base, tmp_path / "merged")
    from catlib.vlm.checkpoint import find_checkpoint

    with pytest.raises(InputError, match="was trained on"):
        open_vlm(find_checkpoint(folder, base_model=str(tmp_path / "merged")), device="cpu", precision="float32")
    write_json(folder / "training.json", {"base_model": str(base), "base_fingerprint": _first_fingerprint(plain)})
    assert np.isfinite(scores(folder)).all() and "first scheme" in caplog.text
    write_json(folder / "training.json", {"base_model": str(base), "base_fingerprint": "0" * 16})
    with pytest.raises(InputError, match="was trained on"):
        scores(folder)


def test_a_base_whose_weights_are_not_all_there_is_refused(base, tmp_path):
    copy_rest(base, tmp_path)
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    less = {key: tensor for key, tensor in weights.items() if key != name}
    for found, said in (
        (less, "1 missing"),
        ({**weights, "model.extra.weight": torch.ones(2)}, "1 unexpected"),
        ({**weights, name: torch.ones(3, 3)}, "shapes|mismatched"),
    ):
        save_file(found, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=said):
            open_vlm(tmp_path, device="cpu", precision="float32")
    config = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "text_config": {**config["text_config"], "num_hidden_layers": 10**8}})
    )
    with pytest.raises(InputError, match="layers"):
        open_vlm(tmp_path, device="cpu", precision="float32")


def copy_rest(base, folder):
    """Everything of a model but its weights."""
    folder.mkdir(exist_ok=True)
    for path in base.iterdir():
        if path.suffix != ".safetensors" and not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
