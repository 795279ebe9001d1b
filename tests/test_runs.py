"""What an earlier attempt has left is kept, and the commit that a file names."""

import subprocess
from pathlib import Path

from catlib.provenance import git_commit
from catlib.runs import set_aside


def test_an_earlier_attempt_is_set_aside_with_its_checkpoint(tmp_path):
    run, checkpoint = tmp_path / "runs" / "demo", tmp_path / "checkpoints" / "cats"
    assert set_aside(run, checkpoint) == ""
    for attempt in ("first", "second"):
        (run / "predictions").mkdir(parents=True)
        checkpoint.mkdir(parents=True)
        (checkpoint / "adapter").write_text(attempt)
        (run / "predictions" / "vlm.jsonl").write_text(attempt)
        (run / "audit.csv").write_text("data")
        (run / ".lock").touch()
        said = set_aside(run, checkpoint)
        number = {"first": 1, "second": 2}[attempt]
        kept = [tmp_path / "checkpoints" / f"cats~{number}", tmp_path / "runs" / f"demo~{number}"]
        assert all(str(folder) in said for folder in kept)
        assert (kept[0] / "adapter").read_text() == (kept[1] / "predictions" / "vlm.jsonl").read_text() == attempt
        assert (kept[1] / "audit.csv").read_text() == "data"
        assert sorted(path.name for path in run.iterdir()) == [".lock", "audit.csv"] and not checkpoint.exists()


def test_a_checkpoint_without_a_run_takes_a_name_that_both_have_free(tmp_path):
    (tmp_path / "runs" / "demo~1").mkdir(parents=True)
    (tmp_path / "cats").mkdir()
    assert set_aside(tmp_path / "runs" / "demo", tmp_path / "cats") == str(tmp_path / "cats~2")


def test_the_commit_is_that_of_the_code_whatever_folder_is_worked_in(tmp_path, monkeypatch):
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    known = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    (tmp_path / "other").mkdir()
    subprocess.run(["git", "init", "--quiet", str(tmp_path / "other")], check=True)
    for folder in (tmp_path, tmp_path / "other"):
        monkeypatch.setenv("CATLIB_ROOT", str(folder))
        monkeypatch.chdir(folder)
        found = git_commit.__wrapped__()
        assert (found and found.removesuffix("+changes")) == known
