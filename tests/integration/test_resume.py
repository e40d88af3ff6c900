"""A run that was stopped anywhere and resumed is the run that was not stopped, bit for bit."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch

import fine_tune
from fine_tune.errors import CheckpointError, ConfigError

from .conftest import assert_same_end, read_metrics, small_job, spawn, stop_in_this_process, write_model

LAST = 9


@pytest.fixture(scope="module")
def straight(stand_in: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    fine_tune.train(small_job(stand_in, run_dir, "trainer.val_every_n_steps=3"))
    return run_dir


@pytest.mark.parametrize(
    ("step", "workers"),
    [(1, 0), (5, 2), *(pytest.param(*more, marks=pytest.mark.drill) for more in ((1, 2), (5, 0), (LAST - 1, 0), (LAST - 1, 2)))],
)
def test_stopped_and_resumed_equals_uninterrupted(
    straight: Path,
    stand_in: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    workers: int,
) -> None:
    run_dir = tmp_path / "run"
    job = small_job(stand_in, run_dir, "trainer.val_every_n_steps=3", f"trainer.num_workers={workers}")
    stop_in_this_process(step, monkeypatch, job)
    torch.manual_seed(999)  # what this process draws meanwhile must not matter
    fine_tune.train([f"resume={run_dir}"])
    assert_same_end(straight, run_dir, step=LAST)


@pytest.mark.drill
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_fresh_process_goes_on_exactly(
    straight: Path, stand_in: tuple[Path, Path], tmp_path: Path, signum: int, code: int
) -> None:
    run_dir = tmp_path / "run"
    first = spawn(small_job(stand_in, run_dir, "trainer.val_every_n_steps=3"), stop_step=5, signum=signum)
    assert first.returncode == code, first.stderr
    assert f"resume={run_dir}" in first.stderr
    second = spawn([f"resume={run_dir}"])
    assert second.returncode == 0, second.stderr
    assert_same_end(straight, run_dir, step=LAST)


def test_a_forgotten_random_state_is_caught(
    straight: Path, stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    stop_in_this_process(5, monkeypatch, small_job(stand_in, run_dir, "trainer.val_every_n_steps=3"))
    monkeypatch.setattr("fine_tune.callbacks.resume.restore_rng", lambda state: None)
    torch.manual_seed(999)
    fine_tune.train([f"resume={run_dir}"])
    with pytest.raises(AssertionError, match="adapter"):
        assert_same_end(straight, run_dir, step=LAST)


def test_a_longer_run_follows_the_longer_schedule(stand_in: tuple[Path, Path], straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    fine_tune.train([f"resume={run_dir}", "trainer.max_steps=12"])
    rates = {line["step"]: line["learning_rate"] for line in read_metrics(run_dir) if "learning_rate" in line}
    # One warm-up step (3 % of 12, rounded up), then a cosine to zero at step 12: the rate before update k is that of k - 1.
    for step in (10, 11, 12):
        assert rates[step] == pytest.approx(1e-2 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 11)), rel=1e-9)
    assert sorted(rates) == list(range(1, 13))


def test_resuming_a_finished_run_trains_nothing_and_keeps_its_figures(straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    before = json.loads((run_dir / "summary.json").read_text())
    again = fine_tune.train([f"resume={run_dir}"])
    for key in (
        "steps",
        "epochs",
        "train_loss",
        "final_loss",
        "train_seconds",
        "total_flops",
        "grad_norm",
        "trainable_parameters",
    ):
        assert again[key] == before[key], key
    assert_same_end(straight, run_dir, step=LAST)
    with pytest.raises(ConfigError, match="the run has done 9 steps"):
        fine_tune.train([f"resume={run_dir}", "trainer.max_steps=4"])


def test_a_damaged_newest_checkpoint_is_passed_over(
    straight: Path, stand_in: tuple[Path, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    newest = run_dir / "checkpoints" / f"step-{LAST:07d}" / "adapter.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(bytes(content))
    fine_tune.train([f"resume={run_dir}"])
    assert_same_end(straight, run_dir, step=LAST)


def test_what_changes_the_mathematics_may_not_change_on_resume(straight: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        fine_tune.train([f"resume={straight}", "optim.lr=1e-3"])


def test_another_base_of_the_same_shape_is_refused(stand_in: tuple[Path, Path], straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    model = write_model(tmp_path / "model", seed=1)
    text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    (run_dir / "config.yaml").write_text(text.replace(str(stand_in[0]), str(model)), encoding="utf-8")
    with pytest.raises(CheckpointError, match="base_fingerprint changed"):
        fine_tune.train([f"resume={run_dir}", "trainer.max_steps=12"])
