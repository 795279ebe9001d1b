"""One question from the samples to the last step: trained, evaluated, measured, predicted, exported and served with it."""

import json
import shutil
from pathlib import Path

import pytest
from test_classifiers_endpoint import served
from test_notebooks import SMALL, text_of

from catlib.cli import main
from catlib.reports.pipeline import run_profile
from catlib.serving.service import VLMService
from catlib.vlm import decoding
from catlib.vlm.checkpoint import find_checkpoint
from demo.photos import draw_photos

ROOT = Path(__file__).resolve().parents[1]
OWN = "Tell me the breed."


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A project whose JSONL samples ask a question of their own, and the run of all notebooks on them."""
    root = tmp_path_factory.mktemp("project")
    for folder in ("notebooks", "demo"):
        (root / folder).symlink_to(ROOT / folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CATLIB_ROOT", str(root))
        patch.setenv("OMP_NUM_THREADS", "1")
        draw_photos(root / "drawn", photos=12)
        assert main(["data", str(root / "drawn"), "--out", str(root / "mine")]) == 0
        files = sorted((root / "mine").glob("*.jsonl"))
        assert len(files) == 3
        for path in files:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for row in rows:
                row["conversations"][0]["value"] = f"<image>\n{OWN}"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        values = {**SMALL, "data_dir": "data/asked", "photos": str(root / "mine"), "epochs": 2}
        state = run_profile(ROOT / "notebooks/profiles/demo.yaml", values, "asked")
        assert state["status"] == "done", state["stages"]
        yield root


@pytest.mark.long
@pytest.mark.slow
def test_every_step_asks_what_was_trained(asked, monkeypatch, capsys):
    checkpoint = asked / "outputs/vlm_checkpoints/asked"
    photo = next((asked / "drawn").rglob("*.jpg"))
    assert find_checkpoint(checkpoint).question == OWN

    predictions = asked / "outputs/runs/asked/predictions"
    sidecars = {path.name: json.loads(path.read_text()) for path in predictions.glob("vlm-*.meta.json")}
    assert len(sidecars) >= 2 and {meta["question"] for meta in sidecars.values()} == {OWN}
    assert OWN in text_of((asked / "reports/asked/05_serving.html").read_text(encoding="utf-8"))
    for name in ("03_evaluation", "04_clip_comparison", "05_serving"):
        assert "What breed is the cat" not in text_of((asked / f"reports/asked/{name}.html").read_text("utf-8")), name

    out = asked / "one.jsonl"
    assert main(["predict", "--checkpoint", str(checkpoint), str(photo), "--out", str(out)]) == 0
    assert json.loads(out.with_suffix(".meta.json").read_text())["question"] == OWN

    with served(asked / "requests") as (url, _):
        client = ["predict", "--model", f"endpoint:{url}#cats", "--checkpoint", str(checkpoint), str(photo)]
        assert main([*client, "--out", str(asked / "served.jsonl")]) == 0
    assert json.loads((asked / "requests").read_text())["question"] == OWN

    merged = asked / "merged"
    assert main(["export", "merge", "--checkpoint", str(checkpoint), "--out", str(merged), "--photos", str(photo)]) == 0
    shutil.move(checkpoint, asked / "gone")  # the merged folder stands for itself
    assert find_checkpoint(merged).question == OWN

    questions = []
    plain = decoding.inference_inputs
    monkeypatch.setattr(
        decoding, "inference_inputs", lambda vlm, photos, asks: questions.extend(asks) or plain(vlm, photos, asks)
    )
    service = VLMService(decoding="free")
    service.load(merged)
    service.predict_finetuned(str(photo))
    service.close()
    assert questions == [OWN]
