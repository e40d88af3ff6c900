"""A run goes on in one process where two began it, and in two where one did, and stays the same run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fine_tune
from fine_tune import checkpoints

from .conftest import read_metrics, small_job, small_pairs_job
from .test_ddp import assert_close, two_processes

LAST = 9
# No dropout: each process draws its own.
MORE = ["method.dropout=0.0", "trainer.val_every_n_steps=3", "callbacks.checkpoint.every_n_steps=3", "callbacks.checkpoint.keep=9"]
# Enough micro-batches a step for two processes to share.
SHARED, SHARED_PAIRS = "trainer.micro_batch_tokens=64", "trainer.micro_batch_tokens=96"
ON_ONE = ["trainer.devices=1"]
ON_TWO = ["trainer.devices=2", "trainer.strategy=ddp"]


def cut_back(run_dir: Path, step: int) -> None:
    """Leave what a kill after this step would have left."""
    for folder in (run_dir / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    shutil.rmtree(run_dir / "adapter")
    (run_dir / "summary.json").unlink()


def assert_same_run(one: Path, other: Path) -> None:
    assert_close(read_metrics(one), read_metrics(other))
    ends = [checkpoints.verify(run / "checkpoints" / f"step-{LAST:07d}") for run in (one, other)]
    states = [end.trainer_state() for end in ends]
    assert states[0]["schedule"] == states[1]["schedule"]
    assert states[0]["callbacks"]["Throughput"]["samples"] == states[1]["callbacks"]["Throughput"]["samples"]
    for name, expected in ends[0].adapter().items():
        # Adam divides by the gradient's size, so that float32's rounding of a small one moves its weight like any other.
        gap = (ends[1].adapter()[name] - expected).norm() / expected.norm()
        assert gap < 2e-3, name
    exported = [load_file(str(run / "adapter" / "adapter_model.safetensors")) for run in (one, other)]
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.isfinite(value).all() for value in exported[1].values())


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_two_then_one_then_two_processes(stand_in: tuple[Path, Path], tmp_path: Path, repository: Path) -> None:
    fine_tune.train(small_job(stand_in, tmp_path / "straight", *MORE, SHARED))
    run_dir = tmp_path / "changing"
    two_processes(small_job(stand_in, run_dir, *MORE, SHARED), repository)
    cut_back(run_dir, 3)
    fine_tune.train([f"resume={run_dir}", *ON_ONE])
    assert_same_run(tmp_path / "straight", run_dir)
    cut_back(run_dir, 6)
    two_processes([f"resume={run_dir}"], repository)
    assert_same_run(tmp_path / "straight", run_dir)


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_one_then_two_processes(pair_stand_in: tuple[Path, Path], sft_run: Path, tmp_path: Path, repository: Path) -> None:
    more = [f"init_from={sft_run}", *MORE, SHARED_PAIRS]
    fine_tune.train(small_pairs_job(pair_stand_in, tmp_path / "straight", *more))
    run_dir = tmp_path / "changing"
    shutil.copytree(tmp_path / "straight", run_dir)
    cut_back(run_dir, 6)
    two_processes([f"resume={run_dir}"], repository)
    assert_same_run(tmp_path / "straight", run_dir)


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_a_run_that_loses_its_optimizer_on_the_way_is_caught(
    stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine_tune.train(small_job(stand_in, tmp_path / "straight", *MORE, SHARED))
    run_dir = tmp_path / "changing"
    shutil.copytree(tmp_path / "straight", run_dir)
    cut_back(run_dir, 6)
    monkeypatch.setattr("torch.optim.AdamW.load_state_dict", lambda self, state: None)
    fine_tune.train([f"resume={run_dir}", *ON_ONE])
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "straight", run_dir)
