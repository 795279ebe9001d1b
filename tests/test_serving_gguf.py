"""`catlib export gguf` short of the engine: template, tokenizer, mmproj, and what is said when something is missing."""

import json
import shutil

import jinja2
import numpy as np
import pytest
import torch
from demo_files import LLAVA
from tiny_encoders import photo
from tiny_models import save_llava, save_pixtral

from catlib.breeds import BREEDS
from catlib.cli import main
from catlib.errors import CatlibError, InputError, MissingExtra
from catlib.gguf import export as export_gguf
from catlib.gguf.export import find_converter, prepare, verify
from catlib.gguf.mmproj import write_clip_mmproj
from catlib.gguf.parity import Parity, Spoken, class_token_last, compare_spoken, speak_here
from catlib.gguf.tokenizer import is_sentencepiece, string_template
from catlib.serving.export import choose_photos, find_mergeable, merge
from catlib.vlm.checkpoint import open_vlm
from catlib.vlm.decoding import generate_free
from catlib.vlm.models import Checkpoint
from catlib.vlm.processors import load_processor
from catlib.vlm.prompting import prompt_text


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The shipped LLaVA, written anew."""
    source = find_mergeable(LLAVA)
    return merge(source, tmp_path_factory.mktemp("gguf") / "plain", dtype="float32", count=1).folder


def rendered(template, content, answer=None):
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return jinja2.Template(template).render(messages=messages, add_generation_prompt=answer is None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "server", ["<__media_x7__>What?", "<__media_x7__>\nWhat?"], ids=["joined", "joined by a line break"]
)
def test_the_template_for_texts_writes_what_the_models_own_writes(plain, server):
    processor = load_processor(str(plain))
    own = prompt_text(processor, "What?").replace(processor.image_token, "<__media_x7__>")
    assert rendered(string_template(processor), server) == own
    assert rendered(string_template(processor, " "), server) == " " + own
    assert rendered(string_template(processor), server, "Manx") == own + " Manx</s>"


def test_a_template_without_the_photos_place_is_refused(plain):
    processor = load_processor(str(plain))
    processor.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(CatlibError, match="cannot be written for llama.cpp"):
        string_template(processor)


def test_pixtrals_template_keeps_photo_and_question_together(tmp_path):
    processor = load_processor(str(save_pixtral(tmp_path)))
    own = prompt_text(processor, "What?").replace("[IMG]", "<__media__>")
    assert rendered(string_template(processor), "<__media__>What?") == own


def test_the_rebuilt_sentencepiece_model_cuts_texts_as_the_tokenizer_does(plain, tmp_path):
    import sentencepiece as spm

    stage = prepare(plain, tmp_path / "stage")
    pieces = spm.SentencePieceProcessor(model_file=str(stage / "tokenizer.model"))
    tokenizer = load_processor(str(plain)).tokenizer
    texts = [f"USER: \nWhat breed is this cat? {breed.name}, 12 kg – née {breed.name.upper()}" for breed in BREEDS]
    assert [pieces.encode(f" {t}") for t in texts] == [
        tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts
    ]
    config = json.loads((stage / "tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is False and config["added_tokens_decoder"]["2"] == {
        "content": "</s>",
        "special": True,
    }
    assert pieces.is_control(tokenizer.convert_tokens_to_ids("<image>")) and pieces.is_byte(
        tokenizer.convert_tokens_to_ids("<0x0A>")
    )


@pytest.mark.slow
def test_only_a_sentencepiece_tokenizer_is_rebuilt(plain, tmp_path):
    assert is_sentencepiece(json.loads((plain / "tokenizer.json").read_text()))
    model = merge(find_mergeable(save_llava(tmp_path / "model")), tmp_path / "plain", count=1).folder
    assert not is_sentencepiece(json.loads((model / "tokenizer.json").read_text()))
    stage = prepare(model, tmp_path / "stage")
    assert not (stage / "tokenizer.model").exists() and (stage / "model.safetensors").is_symlink()
    assert not rendered((stage / "chat_template.jinja").read_text(), "x").startswith(" ")


def test_the_mmproj_holds_the_layers_that_are_read(plain, tmp_path):
    gguf = pytest.importorskip("gguf", reason="catlib[gguf] is not installed")
    out = tmp_path / "mmproj.gguf"
    write_clip_mmproj(plain, out, half=False)
    reader = gguf.GGUFReader(out)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert {
        "v.class_embd",
        "v.patch_embd.weight",
        "v.position_embd.weight",
        "v.pre_ln.bias",
        "mm.0.weight",
        "mm.2.bias",
    } <= tensors.keys()
    assert "mm.1.weight" not in tensors and "v.post_ln.weight" not in tensors
    assert (
        max(int(name.split(".")[2]) for name in tensors if name.startswith("v.blk.")) == 3
    )  # the fifth layer is not read
    assert reader.get_field("clip.vision.block_count").contents() == 4
    assert list(reader.get_field("clip.vision.feature_layer").contents()) == [4]
    weight = open_vlm(plain, precision="float32").projector.linear_2.weight
    assert np.array_equal(tensors["mm.2.weight"].data, weight.numpy())
    config = json.loads((plain / "config.json").read_text())
    config["vision_feature_select_strategy"] = "full"
    odd = tmp_path / "odd"
    shutil.copytree(plain, odd)
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="without its class token"):
        write_clip_mmproj(odd, tmp_path / "odd.gguf")


def test_a_missing_converter_is_explained(plain, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(export_gguf.LLAMA_CPP, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["export", "gguf", "--checkpoint", str(plain), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "--llama-cpp" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="which is not in"):
        find_converter(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == set()


def test_a_converter_that_fails_is_quoted_and_nothing_stays(plain, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text("raise SystemExit('unknown pre-tokenizer')")
    assert (
        main(["export", "gguf", "--checkpoint", str(plain), "--out", str(tmp_path / "out"), "--llama-cpp", str(folder)])
        == 1
    )
    assert "unknown pre-tokenizer" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["llama.cpp"]


def test_an_answer_with_its_probabilities_is_the_one_that_generation_gives(plain):
    vlm = open_vlm(plain, precision="float32")
    image = photo(3, side=120)
    spoken = speak_here(vlm, image, "What breed is the cat in this photo?")
    assert spoken.text == generate_free(vlm, [image], "What breed is the cat in this photo?")[0]
    assert len(spoken.logprobs) >= 2 and max(spoken.logprobs) <= 0 <= spoken.lead


def test_the_class_token_defect_is_what_the_issue_says(plain):
    vlm = open_vlm(plain, precision="float32")
    tower, pixels = vlm.base.model.vision_tower, torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        right = tower.embeddings(pixels)
        with class_token_last(vlm):
            wrong = tower.embeddings(pixels)
    positions = tower.embeddings.position_embedding.weight
    assert torch.allclose(
        wrong[0, -1] - positions[-1], right[0, 0] - positions[0], atol=1e-5
    )  # the class token comes last
    assert torch.allclose(
        wrong[0, 5] - positions[5], right[0, 6] - positions[6], atol=1e-5
    )  # a patch at its neighbour's place
    assert torch.equal(tower.embeddings(pixels), right)


def test_parity_counts_answers_and_measures_the_rest():
    here = [Spoken("Manx", (-0.1, -0.2), 0.5), Spoken("Siamese", (-0.3,), 0.01)]
    there = [Spoken("Manx", (-0.15, -0.2)), Spoken("Bombay", (-0.9,))]
    parity = compare_spoken(here, there, ["a", "b"])
    assert (parity.same, parity.photos, parity.largest_lead) == (1, 2, 0.01)
    assert parity.largest_difference == pytest.approx(0.05)
    assert parity.within(0.06) and not parity.within(0.04)
    assert "b: 'Siamese' against 'Bombay', the first leading by 0.01 nats" in str(parity)
    with pytest.raises(InputError):
        compare_spoken(here, there[:1], ["a", "b"])


def test_without_an_engine_an_export_is_not_called_verified(plain, monkeypatch, caplog):
    def missing(binary):
        raise MissingExtra("xllamacpp", "llama", "serving by llama.cpp")

    monkeypatch.setattr(export_gguf, "find_llama_server", missing)
    found = verify(plain, plain, find_mergeable(plain), choose_photos([], Checkpoint("x", "x"), 1), "", "cpu", 0.1)
    assert found == ("", None, None) and "NOT verified" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("faulty", [False, True], ids=["right", "with the defect"])
def test_an_engines_answers_decide(plain, monkeypatch, faulty):
    """An engine played by this process itself, with and without the defect, and one that is wrong in another way."""
    from contextlib import contextmanager, nullcontext

    source, shown = find_mergeable(plain), choose_photos([], Checkpoint("x", "x"), 2)
    vlm = open_vlm(plain, precision="float32")

    class Engine:
        def __init__(self, *_, **__):
            self.question = source.question

        def speak(self, image):
            with class_token_last(vlm) if faulty else nullcontext():
                return speak_here(vlm, image, self.question)

        def close(self):
            pass

    @contextmanager
    def nothing(*_):
        yield

    for name, stand_in in (
        ("Speaker", Engine),
        ("running", nothing),
        ("find_llama_server", lambda b: ["server"]),
        ("llama_command", lambda *_, **__: type("C", (), {"url": ""})),
    ):
        monkeypatch.setattr(export_gguf, name, stand_in)
    program, parity, defect = verify(plain, plain, source, shown, "", "cpu", 0.05)
    assert program == "server" and isinstance(parity, Parity)
    assert (defect is not None) == faulty and (defect or parity).same == 2
    monkeypatch.setattr(Engine, "speak", lambda self, image: Spoken("a dog", (-5.0,)))
    with pytest.raises(CatlibError, match="verification failed"):
        verify(plain, plain, source, shown, "", "cpu", 0.05)
