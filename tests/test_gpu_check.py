"""The CUDA check runs, on the CPU with its toy model, so that it can be run on a GPU at any commit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.long
def test_every_section_of_the_tiny_check_runs(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--tiny", "--seconds", "100000"]
    run = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    figures = json.loads((tmp_path / "gpu_check.json").read_text())
    assert figures["correct"]["ok"] and figures["versions"]["loss_depends_on_features"]
    assert figures["whole"]["largest difference of a resumed run's weights"] == 0
    assert all("error" not in row for row in figures["train"]["rows"] + figures["qlora"]["rows"])
