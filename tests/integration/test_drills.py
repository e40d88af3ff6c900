"""The drills as a user starts them, and what they see where something is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fine_tune import checkpoints
from fine_tune.cli.drill import main
from fine_tune.drills.gaps import Gap
from fine_tune.drills.resume import compare, end_of, forget_optimizer

from .conftest import small_job, small_pairs_job

STEPS = 4


@pytest.fixture(scope="module")
def run(trained: Callable[..., Path]) -> Path:
    """A finished run of four steps on a 4-bit base."""
    return trained("nf4")


def differing(one: Path, other: Path) -> dict[str, Gap]:
    return {name: gap for name, gap in compare(end_of(one, STEPS), end_of(other, STEPS)).items() if gap.size}


def rewritten(run: Path, copy: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
    """Copy a run and change what its last checkpoint holds."""
    shutil.copytree(run, copy)
    end = checkpoints.verify(copy / "checkpoints" / f"step-{STEPS:07d}")
    adapter, state = end.adapter(), end.trainer_state()
    change(adapter, state)
    record = {key: value for key, value in end.manifest.items() if key not in ("step", "files")}
    checkpoints.save(copy / "checkpoints", STEPS, adapter=adapter, trainer=state, record=record)
    return copy


def test_everything_a_run_ends_with_is_compared(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    found = compare(end_of(run, STEPS), end_of(tmp_path / "copy", STEPS))
    assert {name for name, gap in found.items() if gap.size} == set()
    empty = {name for name, gap in found.items() if not gap.compared}
    assert empty <= {"callbacks"}, "what is empty proves nothing"
    assert found["adapter"].compared == found["adapter, as exported"].compared == 28
    # Two moments and a count for each of them, at least.
    assert found["optimizer state"].compared > 3 * 28


def one_bit(adapter: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    value = next(iter(adapter.values())).flatten()
    value[0] = torch.nextafter(value[0], torch.tensor(9.0))


def moment(adapter: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    state["optimizer"]["state"][3]["exp_avg_sq"] *= 1.01


def rate(adapter: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    state["schedule"]["last_epoch"] -= 1


def draw(adapter: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    state["rng"]["torch"][9] ^= 1


def count(adapter: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    state["callbacks"]["Throughput"]["samples"] += 1


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (one_bit, "adapter"), (moment, "optimizer state"), (rate, "schedule"), (draw, "random states"), (count, "counters"),
    ],
)  # fmt: skip
def test_each_part_is_seen_where_it_alone_differs(run: Path, tmp_path: Path, change: Any, part: str) -> None:
    other = rewritten(run, tmp_path / "copy", change)
    found = differing(run, other)
    assert list(found) == [part]
    assert found[part].where


def test_other_metrics_are_seen(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    file = tmp_path / "copy" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines[2]["train/loss"] *= 1 + 1e-12
    lines[3]["tokens_per_second"] *= 2
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = differing(run, tmp_path / "copy")
    assert list(found) == ["metrics.jsonl: losses and norms"]
    assert "train/loss" in found["metrics.jsonl: losses and norms"].where


def test_the_controls_copy_has_lost_its_optimizer_and_nothing_else(run: Path, tmp_path: Path) -> None:
    forget_optimizer(run, tmp_path / "forgetful")
    found = differing(run, tmp_path / "forgetful")
    assert list(found) == ["optimizer state"]
    kept, _ = checkpoints.valid_checkpoints(tmp_path / "forgetful" / "checkpoints")
    assert [one.trainer_state()["optimizer"]["state"] for one in kept] == [{}] * len(kept)


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "drill.json").read_text(encoding="utf-8"))
    return found


def words(job: list[str], folder: Path) -> list[str]:
    left_out = ("run_dir=", "callbacks.preview", "callbacks.checkpoint.keep")
    return [*(word for word in job if not word.startswith(left_out)), f"run_dir={folder}"]


@pytest.mark.drill
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_killed_run_of_ones_own_config_is_the_straight_one(
    stand_in: tuple[Path, Path], pair_stand_in: tuple[Path, Path], tmp_path: Path, objective: str
) -> None:
    job = small_job(stand_in, tmp_path / "x" / "y") if objective == "sft" else small_pairs_job(pair_stand_in, tmp_path / "x" / "y")
    assert main(["resume", *words(job, tmp_path / "drill")]) == 0
    found = record_of(tmp_path / "drill")
    assert found["passed"]
    assert 0 < found["resumed_at_step"] <= found["killed_after_step"] < found["steps"] == 6
    *same, control = found["findings"]
    assert {gap for one in same for gap in one["gaps"].values()} == {0.0}
    assert control["is_control"]
    assert control["gaps"][""] > 0.01


@pytest.mark.drill
@pytest.mark.timeout(1800)
def test_a_resume_that_forgets_its_random_states_fails_the_drill(
    stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Python reads this in every process: the runs of the drill are those of a user, but for one planted mistake.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'fine_tune.callbacks.resume':\n"
        "            sys.meta_path.remove(self)\n"
        "            import fine_tune.rng\n"
        "            fine_tune.rng.restore_rng = lambda state: None\n"
        "sys.meta_path.insert(0, Finder())\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    job = small_job(stand_in, tmp_path / "x" / "y")
    assert main(["resume", *words(job, tmp_path / "drill")]) == 1
    told = capsys.readouterr().err
    assert "not as they must be" in told
    for part in ("adapter", "random states", "metrics.jsonl: losses and norms"):
        assert f"- {part}: " in told
    assert "- schedule: " not in told
    assert not record_of(tmp_path / "drill")["passed"]


@pytest.mark.drill
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_steps_of_ones_own_config_are_the_same_in_every_way(
    stand_in: tuple[Path, Path], pair_stand_in: tuple[Path, Path], tmp_path: Path, objective: str
) -> None:
    job = small_job(stand_in, tmp_path / "x" / "y") if objective == "sft" else small_pairs_job(pair_stand_in, tmp_path / "x" / "y")
    assert main(["equivalence", *words(job, tmp_path / "drill")]) == 0
    found = record_of(tmp_path / "drill")["findings"]
    exact = [one for one in found if one["group"] == "float64"]
    assert {one["group"] for one in found} == {"float64", "32-true, base in 4 bits"}
    assert max(max(one["gaps"].values()) for one in exact if not one["is_control"]) < 1e-12
    assert min(one["gaps"]["gradients"] for one in found if one["is_control"]) > 0.05
    assert [one["name"] for one in exact][-1] == "two processes (gloo)"
    assert not any(one["skipped"] for one in found)


@pytest.mark.drill
@pytest.mark.timeout(1800)
def test_a_run_that_fails_ends_the_drill_with_its_own_code(
    stand_in: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = [word for word in small_job(stand_in, tmp_path / "x" / "y") if not word.startswith("data.path=")]
    assert main(["resume", *words(job, tmp_path / "drill"), f"data.path={tmp_path / 'gone.jsonl'}"]) in (2, 3)
    assert "gone.jsonl" in capsys.readouterr().err
