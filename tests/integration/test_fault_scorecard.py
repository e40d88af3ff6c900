"""The fault scorecard on a few faults: real processes, hit from outside, with both controls."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = ("kill in checkpoint", "term at first step", "adapter bit flipped")


@pytest.mark.drill
@pytest.mark.timeout(1200)
def test_three_faults_and_their_controls(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.faults", "--only", ",".join(FAULTS), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=1100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "scorecard.json").read_text(encoding="utf-8"))
    assert found["totals"] == {
        "faults": 3,
        "injected": 3,
        "survived": 3,
        "wrong results": 0,
        # One step of an interval of two at most for the kill, and the checkpoint that was damaged.
        "steps lost": sum(line["verdict"]["lost"] for line in found["lines"]),
        "clean controls": 2,
        "clean controls that ended clean": 2,
        "broken controls": 3,
        "broken controls noticed": 3,
        "of these on the judge alone": 0,
        "variants unharmed without a fault": "3 of 3",
    }
    lost = {line["name"]: line["verdict"]["lost"] for line in found["lines"]}
    assert lost["term at first step"] == 0
    assert 1 <= lost["kill in checkpoint"] <= 2
    assert lost["adapter bit flipped"] == 2
    # A flipped bit that nobody looks for is a wrong result or a crash, and the judge says so.
    assert all(line["noticed"] and line["how"] for line in found["lines"])
