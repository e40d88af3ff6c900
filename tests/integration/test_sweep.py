"""Sweeps: what is done is not done again, what fails does not stop the rest, and one base serves all jobs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fine_tune
from fine_tune.cli.train import main
from fine_tune.errors import MemoryExhausted
from fine_tune.fitting import Job
from fine_tune.modules.step import StepModule
from fine_tune.sweeps import sweep as sweeping

from .conftest import assert_same_end, read_metrics, small_job

# What a clock or the machine decides.
TIMED = (
    "wall_seconds", "train_seconds", "samples_per_second", "tokens_per_second", "supervised_tokens_per_second", "mfu",
    "peak_memory_gb", "reserved_memory_gb",
)  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    """A base of an earlier test is of another model."""
    sweeping.KEPT.forget()
    sweeping.KEPT.answers.clear()
    sweeping.KEPT.num_loads = 0


def words_of(stand_in: tuple[Path, Path], root: Path, *more: str) -> list[str]:
    """A sweep of small jobs with held-out answers, in ``root/runs``."""
    job = [word for word in small_job(stand_in, root / "x") if not word.startswith(("run_dir=", "data.num_eval_items="))]
    return ["-m", *job, "trainer.max_steps=4", "data.num_eval_items=2", "data.answer_rule=whole",
            "data.max_new_tokens=4", f"sweep_dir={root / 'runs'}", *more]


def runs_of(root: Path) -> dict[int, Path]:
    """The run folders of the only sweep, by rank."""
    found = {}
    for run in (root / "runs").iterdir():
        if (run / "adapter").is_dir():
            found[json.loads((run / "adapter" / "adapter_config.json").read_text())["r"]] = run
    return found


def records(root: Path) -> list[dict[str, Any]]:
    (folder,) = (root / "runs").glob("sweep-*")
    return [json.loads(file.read_text()) for file in sorted((folder / "jobs").glob("*.json"))]


def figures(run: Path) -> dict[str, Any]:
    summary = json.loads((run / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key not in TIMED and key != "run_name"}


def test_one_base_serves_all_jobs_and_they_are_what_separate_runs_are(
    stand_in: tuple[Path, Path], tmp_path: Path
) -> None:
    assert main(words_of(stand_in, tmp_path, "method.rank=4,8")) == 0
    assert sweeping.KEPT.num_loads == 1
    assert len(sweeping.KEPT.answers) == 2
    job = [word for word in words_of(stand_in, tmp_path)[1:] if not word.startswith("sweep_dir=")]
    for rank, run in runs_of(tmp_path).items():
        alone = tmp_path / f"alone-{rank}"
        fine_tune.train([*job, f"method.rank={rank}", f"run_dir={alone}"])
        assert_same_end(alone, run, step=4)
        assert figures(alone) == figures(run)
        for name in ("held_out_base", "held_out"):
            items = [folder / "eval" / name / "items.jsonl" for folder in (alone, run)]
            assert items[0].read_bytes() == items[1].read_bytes()
    board = json.loads(next((tmp_path / "runs").glob("sweep-*/board.json")).read_text())
    assert len(board["runs"]) == 2


@pytest.mark.drill
def test_another_base_is_loaded_and_the_first_is_gone(stand_in: tuple[Path, Path], tmp_path: Path) -> None:
    assert main(words_of(stand_in, tmp_path, "method=qlora,lora,qlora8", "trainer.max_steps=1")) == 0
    # The 8-bit base is no base that is kept.
    assert sweeping.KEPT.num_loads == 2


def test_finished_runs_are_skipped_and_interrupted_ones_go_on(
    stand_in: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(stand_in, tmp_path, "method.rank=4,8")
    assert main(words) == 0
    first, second = runs_of(tmp_path)[4], runs_of(tmp_path)[8]
    shutil.copytree(second, tmp_path / "whole")
    # As if the second had been killed after its last checkpoint but one.
    shutil.rmtree(second / "checkpoints" / "step-0000004")
    (second / "summary.json").unlink()
    kept = (first / "summary.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main(words) == 0
    assert (first / "summary.json").stat().st_mtime_ns == kept
    assert " ".join(capsys.readouterr().out.split()).count("is finished and skipped") == 1
    assert_same_end(tmp_path / "whole", second, step=4)
    assert [record["status"] for record in records(tmp_path)] == ["finished", "finished"]


def test_the_results_of_another_config_are_not_taken(
    stand_in: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(stand_in, tmp_path, "run_name=mine", "trainer.max_steps=1", "data.num_eval_items=0")
    assert main([*words, "method.rank=4"]) == 0
    kept = (tmp_path / "runs" / "mine" / "summary.json").read_bytes()
    assert main([*words, "method.rank=8"]) == 2
    assert "holds a run of another config" in capsys.readouterr().err
    assert (tmp_path / "runs" / "mine" / "summary.json").read_bytes() == kept
    assert main([*words, "method.rank=4"]) == 0
    assert main([*words, "method.rank=8", "overwrite=true"]) == 0


def test_a_job_that_shares_no_base_does_not_keep_the_last_one(stand_in: tuple[Path, Path], tmp_path: Path) -> None:
    assert main(words_of(stand_in, tmp_path, "method=qlora,qlora8", "trainer.max_steps=1", "data.num_eval_items=0")) == 0
    assert sweeping.KEPT.key is None


def test_jobs_that_fail_are_told_and_the_others_finish(
    stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step = StepModule.training_step

    def faulty(self: StepModule, batch: Any, batch_idx: int) -> None:
        rank = self.network.peft_config["default"].r
        if rank == 2 and batch.step == 2:
            raise RuntimeError("planted in rank 2")
        if rank == 4 and batch.step == 1:
            raise torch.OutOfMemoryError("planted in rank 4")
        train_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(StepModule, "training_step", faulty)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 0)
        assert main(words_of(stand_in, tmp_path, "method.rank=2,4,8")) == 1
    found = records(tmp_path)
    assert [record["status"] for record in found] == ["failed", "failed", "finished"]
    assert [record["exit_code"] for record in found] == [1, MemoryExhausted.exit_code, 0]
    assert found[0]["error"] == "RuntimeError"
    assert found[0]["reason"] == "planted in rank 2"
    assert found[1]["error"] == "MemoryExhausted"
    assert "Lower trainer.micro_batch_tokens" in found[1]["reason"]
    run = tmp_path / "runs" / found[0]["run"]
    assert json.loads((run / "failure.json").read_text())["reason"] == "planted in rank 2"
    assert "in faulty" in (run / "error.log").read_text()
    said = capsys.readouterr().err
    assert "job 1 failed with exit code 1 (RuntimeError): planted in rank 2" in said
    board = next((tmp_path / "runs").glob("sweep-*/board.html")).read_text()
    assert "planted in rank 2" in board
    assert "ran out of memory" in board
    # Without the fault the same words finish what is missing; the runs forget that they had failed.
    assert main(words_of(stand_in, tmp_path, "method.rank=2,4,8")) == 0
    assert not (run / "failure.json").exists()
    assert not (run / "error.log").exists()
    assert [record["status"] for record in records(tmp_path)] == ["finished"] * 3


def test_a_signal_ends_the_sweep_and_is_no_failure(
    stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = StepModule.training_step

    def stopping(self: StepModule, batch: Any, batch_idx: int) -> None:
        if batch.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        train_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(StepModule, "training_step", stopping)
        assert main(words_of(stand_in, tmp_path, "method.rank=4,8")) == 143
    assert [record["status"] for record in records(tmp_path)] == ["interrupted"]
    assert not list((tmp_path / "runs").glob("*/failure.json"))


@pytest.mark.drill
def test_processes_of_torchrun_share_the_jobs(stand_in: tuple[Path, Path], tmp_path: Path) -> None:
    """Two processes, three jobs: each is done once, and the first process shows the board of all."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29631", "train.py",
        *words_of(stand_in, tmp_path, "method.rank=2,4,8"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=environment, check=False,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert [record["status"] for record in records(tmp_path)] == ["finished"] * 3
    assert sorted(runs_of(tmp_path)) == [2, 4, 8]
    # No job was begun twice: every run has each step once.
    for run in runs_of(tmp_path).values():
        assert [line["step"] for line in read_metrics(run)] == [0, 1, 2, 3, 4]
    assert done.stdout.count("the page:") == 1


@pytest.mark.parametrize("words", [["sweep=optuna", "optim.lr=1e-3,1e-2"], ["hydra/launcher=joblib", "method.rank=4,8"]])
def test_what_cannot_be_shared_is_refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    assert main(["-m", *words]) == 2
    assert "Start one process, without torchrun" in capsys.readouterr().err


def test_a_job_knows_no_more_than_a_run_does() -> None:
    """A run's Job shares nothing unless a sweep says so."""
    assert Job.__dataclass_fields__["kept"].default is None
