"""A preference run that was stopped anywhere and resumed is the run that was not stopped, its reference included."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fine_tune
from fine_tune.cli.train import main
from fine_tune.errors import ConfigError
from fine_tune.starting import REFERENCE_FILE

from .conftest import assert_same_end, read_metrics, small_pairs_job, spawn, stop_in_this_process

LAST = 9
# Where only what the loss is measured from is asked: a validation before the stop, and one after it.
SHORT = ["trainer.max_steps=4", "trainer.val_every_n_steps=2"]


@pytest.fixture(scope="module")
def straight(pair_stand_in: tuple[Path, Path], sft_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    fine_tune.train(small_pairs_job(pair_stand_in, run_dir, f"init_from={sft_run}"))
    return run_dir


@pytest.fixture(scope="module")
def straight_stored(pair_stand_in: tuple[Path, Path], sft_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight_stored") / "run"
    store = run_dir.parent / "store"
    fine_tune.train(
        small_pairs_job(pair_stand_in, run_dir, f"init_from={sft_run}", f"objective.reference_store={store}")
    )
    return run_dir


@pytest.fixture(scope="module")
def stopped_at_5(pair_stand_in: tuple[Path, Path], sft_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_in_this_process(5, patch, small_pairs_job(pair_stand_in, run_dir, f"init_from={sft_run}"))
    return run_dir


@pytest.fixture
def half_done(stopped_at_5: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped_at_5, tmp_path / "run")


@pytest.mark.parametrize(
    ("step", "workers"),
    [(5, 0), *(pytest.param(*more, marks=pytest.mark.drill) for more in ((1, 0), (1, 2), (5, 2), (LAST - 1, 0), (LAST - 1, 2)))],
)
def test_stopped_and_resumed_equals_uninterrupted(
    straight: Path,
    pair_stand_in: tuple[Path, Path],
    sft_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    workers: int,
) -> None:
    run_dir = tmp_path / "run"
    words = [f"init_from={sft_run}", f"trainer.num_workers={workers}"]
    stop_in_this_process(step, monkeypatch, small_pairs_job(pair_stand_in, run_dir, *words))
    torch.manual_seed(999)  # what this process draws meanwhile must not matter
    fine_tune.train([f"resume={run_dir}"])
    assert_same_end(straight, run_dir, step=LAST)


@pytest.mark.drill
def test_a_fresh_process_goes_on_though_the_start_is_gone(
    straight: Path, pair_stand_in: tuple[Path, Path], sft_run: Path, tmp_path: Path
) -> None:
    run_dir, start = tmp_path / "run", tmp_path / "start"
    shutil.copytree(sft_run, start)
    first = spawn(small_pairs_job(pair_stand_in, run_dir, f"init_from={start}"), stop_step=5)
    assert first.returncode == 143, first.stderr
    assert f"resume={run_dir}" in first.stderr
    shutil.rmtree(start)
    second = spawn([f"resume={run_dir}"])
    assert second.returncode == 0, second.stderr
    assert_same_end(straight, run_dir, step=LAST)


def test_a_reference_from_a_folder_that_is_gone(
    pair_stand_in: tuple[Path, Path], sft_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = tmp_path / "reference"
    shutil.copytree(sft_run / "adapter", reference)
    # The start is the base, and the reference another model: both must be found again.
    words = [f"objective.reference={reference}", "objective.allow_other_start=true", *SHORT]
    fine_tune.train(small_pairs_job(pair_stand_in, tmp_path / "whole" / "run", *words))
    run_dir = tmp_path / "halted" / "run"
    stop_in_this_process(2, monkeypatch, small_pairs_job(pair_stand_in, run_dir, *words))
    shutil.rmtree(reference)
    fine_tune.train([f"resume={run_dir}"])
    assert_same_end(tmp_path / "whole" / "run", run_dir, step=4)


def test_a_base_reference_is_made_again(
    pair_stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine_tune.train(small_pairs_job(pair_stand_in, tmp_path / "whole" / "run", *SHORT))
    run_dir = tmp_path / "halted" / "run"
    stop_in_this_process(3, monkeypatch, small_pairs_job(pair_stand_in, run_dir, *SHORT))
    torch.manual_seed(999)
    fine_tune.train([f"resume={run_dir}"])
    assert_same_end(tmp_path / "whole" / "run", run_dir, step=4)


@pytest.mark.parametrize("store_is", ["kept", pytest.param("deleted", marks=pytest.mark.drill)])
def test_with_stored_reference_values(
    straight: Path,
    straight_stored: Path,
    pair_stand_in: tuple[Path, Path],
    sft_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    store_is: str,
) -> None:
    # The first epoch is packed as the store was filled: reading gives what computing gives.
    assert read_metrics(straight_stored)[:7] == read_metrics(straight)[:7]
    run_dir, store = tmp_path / "run", tmp_path / "store"
    words = [f"init_from={sft_run}", f"objective.reference_store={store}"]
    stop_in_this_process(5, monkeypatch, small_pairs_job(pair_stand_in, run_dir, *words))
    if store_is == "deleted":
        shutil.rmtree(store)
    fine_tune.train([f"resume={run_dir}"])
    assert_same_end(straight_stored, run_dir, step=LAST)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncated, "the run's reference is missing or damaged"),
        pytest.param(Path.unlink, "the run's reference is missing or damaged", marks=pytest.mark.drill),
        (flipped, "reference_fingerprint changed since it was written"),
    ],
)
def test_a_damaged_reference_is_refused(
    half_done: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], reason: str
) -> None:
    newest = max((half_done / "checkpoints").iterdir())
    damage(half_done / REFERENCE_FILE)
    before = read_metrics(half_done)
    assert main([f"resume={half_done}"]) == 4
    told = capsys.readouterr().err
    assert reason in told
    assert str(half_done) in told
    assert "init_from=" in told, "the way out"
    assert max((half_done / "checkpoints").iterdir()) == newest
    assert read_metrics(half_done) == before


def test_what_the_loss_is_may_not_change_on_resume(half_done: Path) -> None:
    for word in ("objective.beta=0.2", "objective.loss=ipo", "objective.reference=base"):
        with pytest.raises(ConfigError, match=word.partition("=")[0].replace(".", r"\.")):
            fine_tune.train([f"resume={half_done}", word])


def test_a_finished_run_is_not_trained_again(straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    again = fine_tune.train([f"resume={run_dir}"])
    assert again["steps"] == LAST
    last = read_metrics(run_dir)[-1]
    assert again["preference_accuracy"] == last["val/rewards/accuracies"]
    assert again["reward_margin"] == last["val/rewards/margins"]
    assert again["kl"] == last["val/kl"]
    assert_same_end(straight, run_dir, step=LAST)
