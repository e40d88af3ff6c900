"""A finished run is made longer: what was done stays, what follows has the longer run's rates, and a kill changes nothing."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fine_tune

from .conftest import assert_same_end, read_metrics, small_job, spawn, stop_in_this_process

DONE, LONGER = 9, 12
PEAK = 1e-2
# 41 training rows in steps of 8: the last of an epoch's six steps has one row.
PER_EPOCH = 6
LONG = [f"trainer.max_steps={LONGER}"]
Rate = Callable[[int, int, int], float]


def cosine(update: int, warmup: int, total: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * (update - warmup) / (total - warmup)))


def linear(update: int, warmup: int, total: int) -> float:
    return (total - update) / (total - warmup)


def constant(update: int, warmup: int, total: int) -> float:
    return 1.0


def expected_rate(schedule: Rate, step: int, total: int) -> float:
    """The rate of optimizer step ``step`` of a run of ``total`` steps, as docs/resume.md says: a function of the two alone."""
    warmup, update = math.ceil(0.03 * total), step - 1
    return PEAK * (update / warmup if update < warmup else schedule(update, warmup, total))


@pytest.fixture(scope="module")
def finished(stand_in: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    fine_tune.train(small_job(stand_in, run_dir, "callbacks.checkpoint.keep=99"))
    return run_dir


@pytest.fixture(scope="module")
def extended(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("extended") / "run"
    shutil.copytree(finished, run_dir)
    fine_tune.train([f"resume={run_dir}", *LONG])
    return run_dir


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run_dir) if "train/loss" in line]


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_was_done_stays_bit_for_bit(finished: Path, extended: Path) -> None:
    before, after = read_metrics(finished), read_metrics(extended)
    assert after[: len(before)] == before
    for step in range(1, DONE + 1):
        old = [content(run / "checkpoints" / f"step-{step:07d}") for run in (finished, extended)]
        assert sorted(old[0]) == ["adapter.safetensors", "manifest.json", "trainer.pt"]
        assert old[0] == old[1], step


def test_every_step_has_the_rate_of_a_run_of_its_length(finished: Path, extended: Path) -> None:
    rates = {line["step"]: line["learning_rate"] for line in steps_of(extended)}
    assert sorted(rates) == list(range(1, LONGER + 1))
    for step, rate in rates.items():
        total = DONE if step <= DONE else LONGER
        assert rate == pytest.approx(expected_rate(cosine, step, total), rel=1e-9, abs=1e-15), step
    # The short cosine had come down; the longer one's middle is higher, as the documentation warns.
    assert rates[DONE + 1] > 2 * rates[DONE]


def test_epochs_samples_and_order_go_on_counting(extended: Path, finished: Path) -> None:
    lines = steps_of(extended)
    assert [line["epoch"] for line in lines] == [(line["step"] - 1) // PER_EPOCH for line in lines]
    assert [line["samples"] for line in lines] == [8, 8, 8, 8, 8, 1] * 2
    summary = json.loads((extended / "summary.json").read_text(encoding="utf-8"))
    assert (summary["steps"], summary["epochs"]) == (LONGER, 2.0)
    counted = sum(line["train/loss"] * line["supervised_tokens"] for line in lines) / sum(
        line["supervised_tokens"] for line in lines
    )
    assert summary["train_loss"] == pytest.approx(counted, rel=1e-12)
    before = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    assert before["steps"] == DONE
    assert summary["total_flops"] > before["total_flops"]


def test_extended_stopped_and_resumed_is_extended(
    finished: Path, extended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    stop_in_this_process(LONGER - 1, monkeypatch, [f"resume={run_dir}", *LONG])
    assert not (run_dir / "summary.json").is_file(), "what is there is the shorter run's, and this one has not ended"
    # The longer length is the run's own by now.
    fine_tune.train([f"resume={run_dir}"])
    assert_same_end(extended, run_dir, step=LONGER)


def test_where_rates_do_not_jump_the_extended_run_is_the_longer_run(stand_in: tuple[Path, Path], tmp_path: Path) -> None:
    flat = "optim.schedule=constant_with_warmup"
    fine_tune.train(small_job(stand_in, tmp_path / "long" / "run", flat, *LONG))
    run_dir = tmp_path / "short" / "run"
    # Validation follows the last step of each, so it is left out.
    fine_tune.train(small_job(stand_in, run_dir, flat))
    fine_tune.train([f"resume={run_dir}", *LONG])
    assert [line["learning_rate"] for line in steps_of(run_dir)] == pytest.approx(
        [expected_rate(constant, step, LONGER) for step in range(1, LONGER + 1)], rel=1e-12
    )
    for run in (tmp_path / "long" / "run", run_dir):
        drop_validation_after(run, DONE)
    assert_same_end(tmp_path / "long" / "run", run_dir, step=LONGER)


def drop_validation_after(run_dir: Path, step: int) -> None:
    """Take away what only a run has that once ended here: a validation, and answers for people."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{k: v for k, v in line.items() if line["step"] != step or not k.startswith("val/")} for line in lines]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    shown = [json.loads(line) for line in (run_dir / "previews.jsonl").read_text(encoding="utf-8").splitlines()]
    text = "".join(json.dumps(line) + "\n" for line in shown if line["step"] != step)
    (run_dir / "previews.jsonl").write_text(text, encoding="utf-8")


def test_extended_and_ended_at_once_is_not_taken_for_finished(
    finished: Path, extended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)

    class Killed(BaseException):
        """Nothing catches it, as nothing catches SIGKILL."""

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("fine_tune.modules.step.StepModule.training_step", die)
        with pytest.raises(Killed):
            fine_tune.train([f"resume={run_dir}", *LONG])
    fine_tune.train([f"resume={run_dir}"])
    assert_same_end(extended, run_dir, step=LONGER)


@pytest.mark.drill
@pytest.mark.timeout(900)
@pytest.mark.parametrize("step", [DONE + 1, LONGER])
def test_extended_killed_and_resumed_is_extended(finished: Path, extended: Path, tmp_path: Path, step: int) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    killed = spawn([f"resume={run_dir}", *LONG], stop_step=step, signum=signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # A kill at its first step leaves the last checkpoint of the shorter run; that run's summary would call it finished.
    assert not (run_dir / "summary.json").is_file()
    again = spawn([f"resume={run_dir}"])
    assert again.returncode == 0, again.stderr
    assert_same_end(extended, run_dir, step=LONGER)


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_epochs_make_a_run_longer_as_steps_do(finished: Path, extended: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    fine_tune.train([f"resume={run_dir}", "trainer.max_epochs=2"])
    assert_same_end(extended, run_dir, step=LONGER)


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_a_line_that_comes_down_to_zero_goes_on_from_its_middle(stand_in: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fine_tune.train(small_job(stand_in, run_dir, "optim.schedule=linear"))
    fine_tune.train([f"resume={run_dir}", *LONG])
    for line in steps_of(run_dir):
        total = DONE if line["step"] <= DONE else LONGER
        assert line["learning_rate"] == pytest.approx(expected_rate(linear, line["step"], total), rel=1e-9, abs=1e-15)
