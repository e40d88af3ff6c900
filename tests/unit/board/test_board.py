"""Which runs are found, how they stand, and what differs between them, against figures written by hand."""

from __future__ import annotations

import fcntl
import json
import math
from pathlib import Path
from typing import Any

import pytest

from fine_tune.board.board import make_board
from fine_tune.board.heat import heat_map
from fine_tune.board.parallel import parallel
from fine_tune.board.ranking import Board
from fine_tune.errors import ConfigError

from .conftest import board_of, config, put, write_job, write_run, write_sweep


def places(board: Board) -> list[tuple[str, int | None]]:
    return [(row.name, row.place) for row in board.rows]


def test_a_sweep_is_ranked_and_what_failed_stands_below(sweep: Path) -> None:
    board = board_of(sweep)
    assert (board.metric.name, board.metric.lower_is_better, board.keys) == (
        "exact_match", False, ("method.rank", "method.alpha"),
    )  # fmt: skip
    # Equal figures share a place and stand by name.
    ranked = [("r16-a16", 1), ("r64-a16", 1), ("r8-a32", 3), ("r8-a16", 4), ("r64-a32", 5)]
    assert places(board) == [*ranked, ("r16-a32", None), ("job 7", None)]
    memory, broken = board.rows[5:]
    assert (memory.ended, memory.why) == ("failed, exit 7", "MemoryExhausted: out of memory at 11 GB")
    assert (broken.ended, broken.why) == ("failed, exit 2", "ConfigError: method.rank = 0: must be > 0")
    assert broken.settings == {"method.rank": 0, "method.alpha": 16}
    assert board.counts == "5 finished, 2 failed"


def test_a_folder_of_runs_is_found_without_its_sweep(sweep: Path) -> None:
    board = board_of(sweep.parent)
    assert (len(board.rows), board.title, board.keys) == (6, "runs", ("method.alpha", "method.rank"))
    assert board.rows[5].why == "MemoryExhausted: out of memory at 11 GB"
    named = board_of(sweep.parent / "r8-a16", sweep.parent / "r8-a32", sweep.parent / "r8-a16")
    assert places(named) == [("r8-a32", 1), ("r8-a16", 2)]
    assert named.keys == ("method.alpha",)


def test_the_sweep_says_what_to_rank_by(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, metric="val/loss", direction="minimize")
    assert places(board_of(sweep))[:3] == [("r8-a16", 1), ("r8-a32", 1), ("r16-a16", 3)]
    upward = write_sweep(tmp_path / "up", metric="val/loss", direction="maximize")
    assert [name for name, place in places(board_of(upward)) if place == 1] == ["r64-a16", "r64-a32"]
    # A direction is of the sweep's metric, and of no other.
    assert places(board_of(upward, metric="train_seconds"))[0] == ("r8-a16", 1)


def test_the_loss_ranks_where_a_finished_run_was_not_asked(sweep: Path) -> None:
    write_run(sweep.parent / "unasked", config(), final_loss=0.01)
    board = board_of(sweep.parent)
    assert (board.metric.name, board.metric.lower_is_better) == ("final_loss", True)
    assert places(board)[0] == ("unasked", 1)
    assert all(row.interval is None for row in board.rows)


def test_a_metric_of_steps_is_the_last_one(tmp_path: Path) -> None:
    for name, last in (("a", 3.0), ("b", 2.0)):
        run = write_run(tmp_path / name, config(), final_loss=1.0)
        lines = [{"step": 0, "train/own": 9.0}, {"step": 1, "train/own": last}, {"step": 2}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    board = board_of(tmp_path, metric="train/own")
    assert [(row.name, row.value) for row in board.rows] == [("a", 3.0), ("b", 2.0)]


def test_an_unknown_metric_is_refused_with_those_there_are(sweep: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"metric = exact_math: no finished run has it. Choose from exact_match, final_loss"
    ):
        board_of(sweep, metric="exact_math")


def test_all_missing_folders_are_told_together(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as refused:
        board_of(tmp_path / "gone", tmp_path / "empty")
    assert [problem.partition(": ")[2][:16] for problem in refused.value.problems] == [
        "no such folder. ",
        "no run in it. Pa",
    ]


def test_none_finished_is_a_board_without_a_best(tmp_path: Path) -> None:
    write_run(tmp_path / "a", config())
    put(
        write_run(tmp_path / "b", config(seed=1)) / "failure.json",
        {"exit_code": 6, "error": "NonFiniteError", "reason": "nan"},
    )
    board = make_board(tmp_path, out=tmp_path)
    assert (board.best, board.command, board.counts) == (None, "", "1 interrupted, 1 failed")
    assert "No run finished with a finite final_loss." in board.page.read_text(encoding="utf-8")
    assert json.loads((tmp_path / "board.json").read_text())["best"] is None


def test_one_run_is_a_board_without_figures(tmp_path: Path) -> None:
    write_run(tmp_path / "a", config(), exact_match=1.0)
    board = make_board(tmp_path / "a", out=tmp_path / "a")
    assert (places(board), board.keys, heat_map(board), parallel(board)) == ([("a", 1)], (), None, None)


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf, None, "0.9", True, [1], 10**400])
def test_what_is_no_finite_number_has_no_place(tmp_path: Path, figure: Any) -> None:
    write_run(tmp_path / "a", config(seed=1), exact_match=0.5)
    write_run(tmp_path / "b", config(seed=2), exact_match=figure, tokens_per_second=figure, train_seconds=figure)
    board = make_board(tmp_path, out=tmp_path, metric="exact_match")
    assert places(board) == [("a", 1), ("b", None)]
    assert "No place without a finite exact_match: b." in board.notes
    assert json.loads((tmp_path / "board.json").read_text())["runs"][1]["timings"]["tokens_per_second"] is None


@pytest.mark.parametrize(
    "name", ["config.yaml", "manifest.json", "summary.json", "failure.json", "eval/held_out/metrics.json"]
)
@pytest.mark.parametrize("content", ["", "null", "[1]", "{", "\x00\xff", '{"a": {"b": [[[]]]}}'])
def test_damaged_files_do_not_stop_the_others(sweep: Path, name: str, content: str) -> None:
    for run in ("r8-a16", "r16-a32"):
        (sweep.parent / run / name).parent.mkdir(parents=True, exist_ok=True)
        (sweep.parent / run / name).write_text(content, encoding="utf-8")
    board = make_board(sweep, out=sweep, metric="exact_match")
    assert len(board.rows) == 7
    assert places(board)[0] == ("r16-a16", 1)


def test_damaged_sweep_files_are_noted(sweep: Path) -> None:
    (sweep / "jobs" / "0003.json").write_text("[", encoding="utf-8")
    put(sweep / "sweep.json", {"swept": {"a": 1}, "command": 7, "metric": [], "direction": 3})
    board = make_board(sweep, out=sweep)
    assert ("job 4" in [row.name for row in board.rows], board.keys) == (True, ("method.alpha", "method.rank"))
    assert "sweep-0badf00d/jobs/0003.json: damaged, left out" in board.notes


def test_a_job_names_no_folder_outside(sweep: Path) -> None:
    outside = write_run(sweep.parent.parent / "elsewhere", config(), exact_match=1.0)
    for number, name in enumerate((f"../{outside.name}", str(outside), "..", "."), start=20):
        write_job(sweep, number, ["method.rank=1"], name)
    board = board_of(sweep)
    assert board.rows[0].name == "r16-a16"
    assert [row.status for row in board.rows if row.job and row.job >= 20] == ["gone"] * 4


def test_two_jobs_of_one_run_are_one_row(sweep: Path) -> None:
    write_job(sweep, 20, ["method.rank=16", "method.alpha=16", "seed=42"], "r16-a16")
    found = [(row.name, row.job) for row in board_of(sweep).rows]
    assert len(found) == 7
    assert found[0] == ("r16-a16", 2)


def test_what_a_folder_says_of_its_run(tmp_path: Path) -> None:
    for name in ("stopped", "killed", "open"):
        write_run(tmp_path / name, config())
        (tmp_path / name / ".lock").touch()
    put(tmp_path / "stopped" / "failure.json", {"exit_code": 143, "error": None, "reason": "terminated"})
    with (tmp_path / "open" / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        found = {row.name: row.ended for row in board_of(tmp_path).rows}
        assert found == {"open": "running", "killed": "interrupted", "stopped": "interrupted, exit 143"}
    assert {row.status for row in board_of(tmp_path).rows} == {"interrupted"}


def test_a_pruned_run_has_no_place_and_a_mended_one_has(sweep: Path) -> None:
    write_job(sweep, 4, ["method.rank=64", "method.alpha=16"], "r64-a16", status="pruned", reason="behind at step 20")
    put(sweep.parent / "r16-a32" / "summary.json", {"exact_match": 1.0})
    board = board_of(sweep)
    assert places(board)[:2] == [("r16-a32", 1), ("r16-a16", 2)]
    (pruned,) = [row for row in board.rows if row.name == "r64-a16"]
    assert (pruned.ended, pruned.why, pruned.place, pruned.value) == ("pruned", "behind at step 20", None, None)


def test_keys_that_an_option_brings_are_told_by_its_name(tmp_path: Path) -> None:
    for name, method, bits, seed in (("a", "qlora", 4, 1), ("b", "lora", 16, 1), ("c", "lora", 16, 2)):
        write_run(
            tmp_path / name, config(method__name=method, method__bits=bits, seed=seed, run_name=name), exact_match=0.5
        )
    assert set(board_of(tmp_path).keys) == {"method.name", "seed"}
    write_run(tmp_path / "d", config(method__name="lora", method__bits=8, seed=2), exact_match=0.5)
    assert set(board_of(tmp_path).keys) == {"method.name", "method.bits", "seed"}


def test_an_option_that_is_swept_is_one_column(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep-00000001"
    put(sweep / "sweep.json", {"swept": ["method"], "command": "train.py -m method=qlora,lora"})
    for number, (method, bits) in enumerate((("qlora", 4), ("lora", 16))):
        write_run(tmp_path / method, config(method__name=method, method__bits=bits), exact_match=0.5 + number / 4)
        write_job(sweep, number, [f"method={method}"], method)
    board = board_of(sweep)
    assert [(row.settings, row.place) for row in board.rows] == [({"method": "lora"}, 1), ({"method": "qlora"}, 2)]
    assert board.command == "python train.py method=lora"
