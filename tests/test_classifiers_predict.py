"""`catlib predict` from the command line: photos in, JSON lines out, and what it says when something is wrong."""

import json

import numpy as np
import pytest
from tiny_encoders import clip, save_llava, tuned, write_photos

from catlib.breeds import BREEDS as ALL
from catlib.classifiers.base import Batch, Classifier
from catlib.classifiers.encoder import ClipEncoder, TowerEncoder
from catlib.classifiers.probe import Probe
from catlib.cli import main
from catlib.commands.predict import find_photos
from catlib.data.images import open_image
from catlib.data.records import read_predictions
from catlib.vlm.checkpoint import open_vlm

BREEDS = "Manx,Persian,Siamese"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a tiny CLIP and of a tiny LLaVA."""
    folder = tmp_path_factory.mktemp("models")
    return clip(folder / "clip"), save_llava(folder / "llava")


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "photos", ["Manx"] * 3)
    write_photos(tmp_path / "photos" / "more", ["Manx"] * 2)
    (tmp_path / "photos" / "notes.txt").write_text("no photo")
    return tmp_path / "photos"


def test_json_lines_on_standard_output(models, photos, capsys):
    assert main(["predict", "--model", f"clip:{models[0]}", "--breeds", BREEDS, str(photos)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == ["000.jpg", "001.jpg", "002.jpg", "more/000.jpg", "more/001.jpg"]
    for row in rows:
        assert row["breed"] is None and row["latency_ms"] > 0
        assert list(row["scores"]) == BREEDS.split(",") and row["predicted"] == max(
            row["scores"], key=row["scores"].get
        )
        assert abs(sum(np.exp(list(row["scores"].values()))) - 1) < 1e-4


@pytest.mark.parametrize("decoding", ["score", "constrained", "free"])
def test_predictions_file_of_a_vlm(models, photos, tmp_path, capsys, decoding):
    out = tmp_path / "vlm-base.jsonl"
    command = ["predict", "--model", "base", "--base-model", str(models[1]), "--breeds", BREEDS, "--decoding", decoding]
    assert main([*command, "--dtype", "float32", "--out", str(out), str(photos / "000.jpg"), str(photos / "more")]) == 0
    result = read_predictions(out)
    assert [p.image for p in result.predictions] == ["000.jpg", "more/000.jpg", "more/001.jpg"]
    assert result.meta["decoding"] == decoding and result.meta["base_model"] == str(models[1])
    assert capsys.readouterr().out == ""
    assert all((p.scores is not None) == (decoding == "score") for p in result.predictions)
    if decoding == "constrained":
        assert all(p.predicted in BREEDS.split(",") for p in result.predictions)


def test_an_unreadable_photo_does_not_stop_the_others(models, photos, capsys):
    (photos / "001.jpg").write_text("a text file named .jpg")
    assert main(["predict", "--model", f"clip:{models[0]}", "--breeds", BREEDS, str(photos)]) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 4
    assert "001.jpg" in captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.jpg"], "no such photo or folder"),
        (["EMPTY"], "no photos in"),
        (["PHOTOS", "--model", "sorcery"], "tuned, base, clip:REF, probe:FILE or endpoint:URL"),
        (["PHOTOS", "--model", "tuned:"], "tuned, base, clip:REF"),
        (["PHOTOS", "--model", "clip:"], "tuned, base, clip:REF"),
        (["PHOTOS", "--model", "probe:nowhere.npz"], "not a saved linear probe"),
        (["PHOTOS"], "which model"),
        (["PHOTOS", "--checkpoint", "nowhere"], "no such folder"),
        (["PHOTOS", "--checkpoint", "EMPTY"], "adapter"),
        (["PHOTOS", "--model", "clip:CLIP", "--breeds", "Manx"], "at least two"),
        (["PHOTOS", "--model", "clip:CLIP", "--batch-size", "0"], "batch-size"),
        (["PHOTOS", "--model", "clip:EMPTY"], "cannot be loaded"),
    ],
)
def test_wrong_input_is_named_and_exits_with_2(models, photos, tmp_path, capsys, arguments, words):
    (tmp_path / "empty").mkdir()
    names = {"PHOTOS": photos, "EMPTY": tmp_path / "empty", "CLIP": models[0]}
    for key, path in names.items():
        arguments = [argument.replace(key, str(path)) for argument in arguments]
    assert main(["predict", *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and "Traceback" not in captured.err and captured.out == ""


@pytest.mark.slow
def test_a_checkpoint_knows_its_base_its_breeds_and_its_question(models, photos, tmp_path):
    checkpoint = tuned(tmp_path / "checkpoint", models[1], BREEDS.split(","), "Which breed?")
    found = {}
    for model in ("tuned", "base"):
        command = ["predict", "--checkpoint", str(checkpoint), "--model", model, "--dtype", "float32"]
        assert main([*command, "--out", str(tmp_path / f"{model}.jsonl"), str(photos)]) == 0
        found[model] = read_predictions(tmp_path / f"{model}.jsonl")
        assert found[model].meta["question"] == "Which breed?" and found[model].meta["breeds"] == BREEDS.split(",")
    assert found["tuned"].meta["adapter"] == str(checkpoint) and found["base"].meta["adapter"] is None
    scores = [np.array([p.scores for p in found[model].predictions]) for model in ("tuned", "base")]
    assert np.abs(scores[0] - scores[1]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "tower"])
def test_a_saved_probe_predicts_as_the_fitted_one(models, photos, tmp_path, capsys, kind):
    samples = write_photos(tmp_path / "train", BREEDS.split(",") * 3)
    encoder = (
        ClipEncoder.load(str(models[0]))
        if kind == "clip"
        else TowerEncoder(open_vlm(str(models[1]), precision="float32"))
    )
    probe = Probe.fit(encoder, BREEDS.split(","), samples, tmp_path / "train", f"{kind}-probe")
    probe.save(tmp_path / "probe.npz")
    command = ["predict", "--model", f"probe:{tmp_path / 'probe.npz'}", "--dtype", "float32"]
    assert main([*command, str(photos / "more")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = probe.classify([open_image(photos / "more" / f"{i:03}.jpg") for i in range(2)]).log_probs
    assert np.abs(np.array([list(row["scores"].values()) for row in rows]) - expected).max() < 1e-4
    assert main([*command, "--breeds", "Manx,Persian", str(photos)]) == 2
    assert "trained on" in capsys.readouterr().err


def test_a_long_list_of_breeds_is_no_file_name(models, photos, capsys):
    everything = ",".join(breed.name for breed in ALL)
    assert main(["predict", "--model", f"clip:{models[0]}", "--breeds", everything, str(photos / "000.jpg")]) == 0
    assert len(json.loads(capsys.readouterr().out)["scores"]) == len(ALL)


def test_breeds_from_a_file_with_one_a_line(models, photos, tmp_path, capsys):
    (tmp_path / "breeds.txt").write_text("Manx\nPersian\n\nSiamese\n")
    assert (
        main(
            [
                "predict",
                "--model",
                f"clip:{models[0]}",
                "--breeds",
                str(tmp_path / "breeds.txt"),
                str(photos / "000.jpg"),
            ]
        )
        == 0
    )
    assert list(json.loads(capsys.readouterr().out)["scores"]) == BREEDS.split(",")


def test_paths_are_relative_to_the_working_directory_where_photos_lie_in_it(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    root, samples = find_photos([photos / "more", photos / "000.jpg", photos / "more" / "000.jpg"])
    assert root == photos.parent
    assert [s.image for s in samples] == ["photos/more/000.jpg", "photos/more/001.jpg", "photos/000.jpg"]


def test_a_folder_is_searched_as_the_audit_searches_it(photos, caplog):
    for name in ("._x.jpg", ".ipynb_checkpoints/x.jpg", "x.avif"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes((photos / "000.jpg").read_bytes())
    found = [sample.image for sample in find_photos([photos])[1]]
    assert found == ["000.jpg", "001.jpg", "002.jpg", "more/000.jpg", "more/001.jpg", "x.avif"]
    assert "notes.txt" not in found and "1 no photo ending" in caplog.text


def test_a_link_that_the_user_put_into_the_folder_is_followed_and_said(models, photos, tmp_path, capsys):
    secret = write_photos(tmp_path / "secret", ["Manx"])[0]
    (photos / "link.jpg").symlink_to(tmp_path / "secret" / secret.image)
    assert main(["predict", "--model", f"clip:{models[0]}", "--breeds", BREEDS, str(photos)]) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert len(rows) == 6 and "1 of 6 photos are links" in captured.err
    assert [row["image"] for row in rows if row["id"] == "link.jpg"] == [f"secret/{secret.image}"]


@pytest.mark.parametrize("scored", [True, False])
def test_a_device_that_is_full_gets_fewer_photos_at_a_time(scored, caplog):
    class Narrow(Classifier):
        name, breeds, asked = "narrow", ("Manx", "Persian"), []

        def classify(self, images, ids=None):
            self.asked.append(len(images))
            if len(images) > 3:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            scores = np.log([[image, 1 - image] for image in images]) if scored else None
            return Batch([ids[i] for i in range(len(images))], scores, [str(image) for image in images])

        def describe(self):
            return {}

    images = [i / 10 for i in range(1, 9)]
    classifier = Narrow()
    Narrow.asked.clear()
    found = classifier.classify_in_memory(images, list("abcdefgh"))
    assert list(found.predicted) == list("abcdefgh") and found.answers == [str(image) for image in images]
    assert found.log_probs is None if not scored else np.allclose(np.exp(found.log_probs[:, 0]), images)
    assert Narrow.asked == [8, 4, 2, 2, 2, 2] and caplog.text.count("out of memory") == 2
    classifier.classify_in_memory(images[:4], list("abcd"))
    assert Narrow.asked[6:] == [2, 2], "it is not tried again"
    classifier.classify = lambda images, ids=None: 1 / 0
    with pytest.raises(ZeroDivisionError):
        classifier.classify_in_memory(images)
