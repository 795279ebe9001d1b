"""Train or skip: the same rules as the verdict's, over what can be known before a training."""

from dataclasses import replace

import pytest
import torch
from evaluation_cases import BREEDS, RARE, scored_set, truth
from PIL import Image
from tiny_encoders import save_llava

from catlib.cli import main
from catlib.data.conversations import gives_reasons
from catlib.data.records import make_sample, write_samples
from catlib.evaluation.gate import training_need
from catlib.evaluation.metrics import evaluate
from catlib.evaluation.verdict import judge
from catlib.files import read_json
from catlib.settings import ComparisonSettings, TrainSettings

NEED = {"obstacle": "", "text": "It takes 20 GB and 6 hours on a GPU.", "device": "cuda", "reasons": False}
WEAK = {breed: 0.3 if breed in RARE else 0.7 for breed in BREEDS}
STRONG = dict.fromkeys(BREEDS, 0.97)


def answer(clip=WEAK, want=None, **need):
    true = truth(60)
    sets = [scored_set("clip-zero-shot", true, clip, seed=1), scored_set("clip-probe", true, 0.8, seed=2)]
    models = {s.name: evaluate(s, RARE, bootstrap=200) for s in sets}
    return judge(models, [], want or ComparisonSettings(), None, need=NEED | need)


def test_nothing_against_it():
    verdict = answer()
    met = {c["key"]: c["met"] for c in verdict.criteria}
    assert (verdict.decision, verdict.use) == ("train", "clip-probe") and "6 hours" in verdict.reasons[0]
    assert met == {
        "skip": False,
        "budget": False,
        "no-gpu": False,
        "do": True,
        "explanations": False,
        "accuracy-first": False,
    }
    assert any("120" in reason for reason in verdict.reasons)  # right of total on the priority breeds


def test_clip_that_is_good_on_the_priority_breeds():
    verdict = answer(clip=STRONG)
    assert verdict.decision == "skip" and "80%" in verdict.reasons[0]
    assert answer(clip=STRONG, want=ComparisonSettings(accuracy_first=True)).decision == "train"


def test_reasons_that_are_wanted_count_where_the_training_gives_them():
    wanted = ComparisonSettings(explanations_wanted=True, latency_budget_ms=100.0)
    for clip in (WEAK, STRONG):
        assert answer(clip=clip, want=wanted).decision == "skip"
        assert answer(clip=clip, want=wanted, reasons=True).decision == "train"


def test_a_budget_under_the_plan_s():
    verdict = answer(want=ComparisonSettings(latency_budget_ms=100.0))
    assert verdict.decision == "skip" and "100 ms" in verdict.reasons[0]
    assert answer(want=ComparisonSettings(latency_budget_ms=150.0)).decision == "train"


def test_what_cannot_be_trained_here_is_not_trained_whatever_is_wanted():
    for want in (ComparisonSettings(), ComparisonSettings(accuracy_first=True)):
        verdict = answer(want=want, obstacle="There is no GPU.", reasons=True)
        assert verdict.decision == "skip" and verdict.reasons[0] == "There is no GPU."


def test_without_figures_the_obstacle_decides_alone():
    verdict = judge({}, [], ComparisonSettings(), None, need=NEED | {"obstacle": "too large"})
    assert (verdict.decision, verdict.use) == ("skip", "") and "Too large" in verdict.text


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_hours_and_memory_of_this_machine(tmp_path):
    rows = [
        make_sample(f"{i}", "a.jpg", "Which?", "Manx", breed="Manx", source="s", sha256=f"{i}", split="train")
        for i in range(3000)
    ]
    write_samples(tmp_path / "train.jsonl", rows)
    settings = TrainSettings(train_data=str(tmp_path / "train.jsonl"))
    need = training_need(settings)
    assert need["obstacle"] and need["hours"] > 24 and need["peak_gb"] > 14 and need["device"] == "cpu"
    assert "GPU" in training_need(replace(settings, device="cuda"))["obstacle"]
    small = replace(settings, base_model=str(save_llava(tmp_path / "base")), batch_size=1)
    need = training_need(small)
    assert need["obstacle"] == "" and 0 < need["hours"] < 1
    assert "may take" in training_need(small, budget_hours=need["hours"] / 1000)["obstacle"]


def test_answers_that_go_on_after_the_breed_are_reasons():
    def sample(text):
        return make_sample("1", "a.jpg", "Which?", text, breed="Manx", source="s", sha256="1", split="train")

    assert gives_reasons([sample("Manx. It shows in the photo as a round cat without a tail.")])
    assert not gives_reasons([sample("Manx"), sample("This is a Manx cat."), sample("Manx. It has no tail at all.")])
    assert not gives_reasons([])


@pytest.mark.slow
def test_the_command_measures_answers_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CATLIB_ROOT", str(tmp_path))
    base = save_llava(tmp_path / "base")
    (tmp_path / "images").mkdir()
    for part, each in (("train", 3), ("val", 2), ("test", 1)):
        rows = []
        for breed in ("Bengal", "Burmilla", "Manx"):
            for i in range(each):
                image = f"images/{part}-{breed}-{i}.jpg"
                Image.new("RGB", (8, 8), (50 * i, 99, 30)).save(tmp_path / image)
                rows.append(
                    make_sample(image, image, "Which?", breed, breed=breed, source="s", sha256=image, split=part)
                )
        write_samples(tmp_path / "vlm" / f"{part}.jsonl", rows)
    profile = tmp_path / "mine.yaml"
    facts = {
        "data_dir": tmp_path,
        "run_dir": tmp_path / "run",
        "base_model": base,
        "dtype": "float32",
        "bootstrap": 100,
    }
    facts |= {"clip_model": "''", "opponents": "linear", "priority_breeds": "Burmilla", "batch_size": 1}
    profile.write_text("".join(f"{key}: {value}\n" for key, value in facts.items()))
    assert main(["gate", str(profile), "--json"]) == 0
    stored = read_json(tmp_path / "run" / "gate.json")
    assert '"decision": "train"' in capsys.readouterr().out and stored["recommendation"]["use"] == "tower-probe"
    assert stored["models"]["tower-probe"]["n"] == 6 and stored["need"]["hours"] > 0
    assert not list((tmp_path / "run").glob("pr*"))  # neither predictions nor probes of a run are touched
    page = tmp_path / "reports/mine/gate.html"
    assert f"answered in {stored['seconds']} s" in page.read_text() and "tower" in page.read_text()
    assert 'href="mine/gate.html"' in (tmp_path / "reports/index.html").read_text()
    assert main(["gate", str(profile), "-p", "latency_budget_ms=100"]) == 0
    assert "skip" in capsys.readouterr().out and "<b>skip</b>" in page.read_text()
    assert main(["gate", str(profile), "-p", "nonsense=1"]) == 2
