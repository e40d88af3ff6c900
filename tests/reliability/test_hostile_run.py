"""A whole run folder of somebody who means harm, through the doors that people use: exit codes, and a canary that stays silent."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from fine_tune import checkpoints, storage
from fine_tune.cli.evaluate import main as evaluate
from fine_tune.cli.train import run_job
from fine_tune.errors import FineTuneError

from .hostile import Evil
from .record_checkpoint import FOLDER, HOME


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The newest recorded run, at home in a folder of its own."""
    newest = max((folder for folder in FOLDER.iterdir() if folder.is_dir()), key=lambda folder: folder.name)
    home = Path(shutil.copytree(newest, tmp_path / "home"))
    config = home / "run" / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace(HOME, str(home)), encoding="utf-8")
    return home


def replaced(home: Path, name: str, content: bytes | dict[str, object]) -> None:
    """Put something else into a file of the checkpoint, and into its manifest what makes it look whole."""
    folder = home / "run" / "checkpoints" / "step-0000002"
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        torch.save(content, folder / name)
    manifest = json.loads((folder / checkpoints.MANIFEST).read_text())
    manifest["files"][name]["sha256"] = storage.sha256(folder / name)
    (folder / checkpoints.MANIFEST).write_text(json.dumps(manifest))
    assert checkpoints.latest(home / "run" / "checkpoints")[0] is not None


def test_resuming_it_exits_with_10_and_runs_nothing(home: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    replaced(home, checkpoints.TRAINER_FILE, {"optimizer": {"state": {0: {"step": Evil(canary)}}}})
    with pytest.raises(FineTuneError, match="holds more than plain tensors; it is not loaded") as refused:
        run_job([f"resume={home / 'run'}"])
    assert refused.value.exit_code == 10
    assert not canary.exists()
    told = json.loads((home / "run" / "failure.json").read_text())
    assert (told["exit_code"], told["error"]) == (10, "UnsafeArtifact")


def test_evaluating_it_is_refused_and_runs_nothing(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = tmp_path / "canary"
    replaced(home, checkpoints.ADAPTER_FILE, pickle.dumps(Evil(canary), protocol=2))
    assert evaluate([f"ckpt={home / 'run'}", "eval=perplexity", "eval.num_items=2", "accelerator=cpu"]) == 4
    assert "adapter.safetensors: damaged or missing" in capsys.readouterr().err.replace("\n", "")
    assert not canary.exists()
