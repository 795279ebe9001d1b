"""`predict` launched with several processes: each takes its share, and one file holds all, in order, none twice."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_encoders import clip, write_photos

from catlib.cli import main
from catlib.data.records import read_predictions

BREEDS = "Manx,Persian,Siamese"


def launch(*arguments, processes=2):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    command += ["-m", "catlib.cli", "predict", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_predict_what_one_does_each_its_share(tmp_path, capfd):
    photos, model = tmp_path / "photos", clip(tmp_path / "clip")
    write_photos(photos, ["Manx"] * 7)
    (photos / "004.jpg").write_text("a text file named .jpg")
    options = ["--model", f"clip:{model}", "--breeds", BREEDS, "--batch-size", "2", photos, "--out"]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert main(["predict", *map(str, options), str(one)]) == 1
    done = launch(*options, two)
    assert done.returncode == 1 and done.stderr.count("004.jpg: ") == 1, done.stderr[-3000:]
    assert "1 of 7 photos could not be read" in done.stderr
    alone, merged = read_predictions(one), read_predictions(two)
    assert [p.id for p in merged.predictions] == [p.id for p in alone.predictions] and len(merged.predictions) == 6
    for ours, theirs in zip(merged.predictions, alone.predictions, strict=True):
        assert (ours.predicted, ours.scores) == (theirs.predicted, pytest.approx(theirs.scores, abs=1e-5))
    changing = ("name", "images_per_second")
    assert {k: v for k, v in merged.meta.items() if k not in changing} == {
        k: v for k, v in alone.meta.items() if k not in changing
    }
    assert merged.meta["name"] == "two" and merged.meta["images_per_second"] > 0
    assert sorted(path.name for path in tmp_path.iterdir() if "-of-" in path.name and path.suffix != ".lock") == []
    assert launch(*options[:-1]).returncode != 0, "without --out"


def test_shares_are_whole_batches_and_what_one_has_found_is_kept(tmp_path, monkeypatch):
    """Both processes one after the other in this one: the second merges."""
    from catlib.classifiers import predict as module

    photos, model = tmp_path / "photos", clip(tmp_path / "clip")
    write_photos(photos, ["Manx"] * 5)
    from catlib.classifiers.clip import ClipZeroShot
    from catlib.classifiers.encoder import ClipEncoder
    from catlib.commands.predict import find_photos

    root, samples = find_photos([photos])
    classifier, seen = ClipZeroShot(ClipEncoder.load(str(model), "cpu"), BREEDS.split(",")), []
    plain = classifier.classify
    monkeypatch.setattr(classifier, "classify", lambda images, ids=None: seen.append(len(images)) or plain(images, ids))
    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module.dist, "barrier", lambda: None)
    out = tmp_path / "all.jsonl"

    def run(rank):
        monkeypatch.setattr(module.dist, "get_rank", lambda: rank)
        return module.predict(classifier, samples, root, out, batch_size=2, processes=2)

    with pytest.raises(Exception, match="all.jsonl"):
        run(1)  # the first one has not merged yet
    assert seen == [2]
    part = tmp_path / ".all.2-of-2.jsonl"
    assert [json.loads(line)["id"] for line in part.read_text().splitlines()] == [s.id for s in samples[2:4]]
    assert [p.id for p in run(0).predictions] == [s.id for s in samples]
    assert seen == [2, 2, 1] and not part.exists()
    run(0)
    assert seen == [2, 2, 1], "nothing is left to do"
    assert Path(out).is_file()
