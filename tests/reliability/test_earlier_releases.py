"""Checkpoints of every release that was ever recorded are still gone on from, to the weights that the release came to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import fine_tune
from fine_tune import checkpoints, safe_load

from .record_checkpoint import FOLDER, HOME

KEYS = ("step", "train/loss", "val/loss", "learning_rate")
RECORDED = sorted(folder for folder in FOLDER.iterdir() if folder.is_dir())


def test_there_is_one_and_it_is_small() -> None:
    assert RECORDED
    for folder in RECORDED:
        files = [file for file in folder.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) < 150_000
        # Nothing in it says whose machine it was made on.
        assert not [file for file in files if file.suffix in (".yaml", ".json", ".jsonl") and "/tmp" in file.read_text()]


@pytest.fixture
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A recording, at home in a folder of its own."""
    home = Path(shutil.copytree(request.param, tmp_path / "home"))
    config = home / "run" / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace(HOME, str(home)), encoding="utf-8")
    return home


@pytest.mark.parametrize("home", RECORDED, ids=[folder.name for folder in RECORDED], indirect=True)
def test_a_recorded_run_goes_on_as_it_did_then(home: Path) -> None:
    newest, damaged = checkpoints.latest(home / "run" / "checkpoints")
    assert newest is not None
    assert (newest.step, damaged) == (2, [])
    then = safe_load.tensors(home / "after_step_4.safetensors")
    apart = max((newest.adapter()[name] - tensor).abs().max().item() for name, tensor in then.items())
    lines = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    fine_tune.train([f"resume={home / 'run'}"])
    now = checkpoints.verify(home / "run" / "checkpoints" / "step-0000004").adapter()
    assert now.keys() == then.keys()
    # Other processors and libraries round otherwise; two steps of training move the weights five hundred times as far.
    for name, tensor in then.items():
        torch.testing.assert_close(now[name], tensor, rtol=1e-5, atol=1e-5)
    assert apart > 5e-3
    again = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    for before, after in zip(lines, again, strict=True):
        told = [{key: line[key] for key in KEYS if line.get(key) is not None} for line in (before, after)]
        assert told[1] == pytest.approx(told[0], rel=1e-5)
