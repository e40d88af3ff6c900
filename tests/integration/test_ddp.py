"""Two processes give the step of one: the same loss and gradients, however the rows are dealt out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fine_tune

from .conftest import read_metrics, small_job, small_pairs_job


@pytest.mark.drill
def test_two_processes_equal_one(stand_in: tuple[Path, Path], tmp_path: Path, repository: Path) -> None:
    # No dropout: each process draws its own.
    more = ["method.dropout=0.0", "trainer.val_every_n_steps=3", "callbacks.checkpoint.every_n_steps=3"]
    more.append("trainer.micro_batch_tokens=64")
    fine_tune.train(small_job(stand_in, tmp_path / "one", *more))
    two_processes(small_job(stand_in, tmp_path / "two", *more), repository)
    assert_close(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"))


@pytest.mark.drill
@pytest.mark.parametrize("stored", [False, True], ids=["live", "stored"])
def test_two_processes_equal_one_on_pairs(
    pair_stand_in: tuple[Path, Path], sft_run: Path, tmp_path: Path, repository: Path, stored: bool
) -> None:
    # Micro-batches of two or three pairs, and a last step of one pair: a rank without work.
    more = [f"init_from={sft_run}", "callbacks.checkpoint.every_n_steps=3", "trainer.micro_batch_tokens=96"]
    fine_tune.train(small_pairs_job(pair_stand_in, tmp_path / "one", *more))
    store = tmp_path / "store"
    words = [*more, *([f"objective.reference_store={store}"] if stored else [])]
    two_processes(small_pairs_job(pair_stand_in, tmp_path / "two", *words), repository)
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert_close(one, two)
    assert two[0]["val/rewards/margins"] == two[1]["train/rewards/margins"] == 0.0
    assert min(line["samples"] for line in two if "samples" in line) == 1
    if stored:
        (file,) = store.glob("*.safetensors")
        values = load_file(str(file))["logps"]
        assert torch.isfinite(values).all(), "each rank's rows reached the file"


def two_processes(words: list[str], repository: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run(
        [*command, *words, "trainer.strategy=ddp", "trainer.devices=2"], cwd=repository, capture_output=True, text=True,
        timeout=200, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def assert_close(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            # float32 sums in another order; rewards are small differences of large sums
            assert right[key] == pytest.approx(value, rel=2e-4, abs=1e-4 if "rewards" in key else None), (
                left["step"],
                key,
            )


@pytest.mark.drill
def test_devices_without_a_launcher_are_refused(stand_in: tuple[Path, Path], tmp_path: Path) -> None:
    words = [*small_job(stand_in, tmp_path / "run"), "trainer.strategy=ddp", "trainer.devices=2"]
    with pytest.raises(fine_tune.errors.ConfigError, match="torchrun --nproc-per-node 2"):
        fine_tune.train(words)
