"""The files of a board read back, and the best run's command."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from pathlib import Path

import pytest

from fine_tune.board.board import make_board
from fine_tune.board.command import command_of
from fine_tune.board.metric import wilson
from fine_tune.board.rows import Row

from .conftest import board_of, config, put, write_job, write_run


def test_values_that_json_has_no_form_for_are_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", config(), exact_match=0.5)
    write_run(tmp_path / "b", config(), exact_match=0.25)
    odd = (
        "when: 2026-01-02\nraw: !!binary aGk=\nmany: !!set {x, y}\nmethod: {name: [a, {b: 2026-01-02}]}\n1: {2: .nan}\n"
    )
    (run / "config.yaml").write_text(odd, encoding="utf-8")
    make_board(tmp_path, out=tmp_path)
    settings = json.loads((tmp_path / "board.json").read_text())["runs"][0]["settings"]
    assert (settings["when"], settings["1.2"]) == ('"2026-01-02"', None)


def test_the_csv_reads_back(sweep: Path) -> None:
    make_board(sweep, out=sweep)
    with (sweep / "board.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["run"] for row in rows] == ["r16-a16", "r64-a16", "r8-a32", "r8-a16", "r64-a32", "r16-a32", "job 7"]
    assert [row["exact_match"] for row in rows] == ["0.9", "0.9", "0.75", "0.5", "0.25", "", ""]
    assert [row["method.rank"] for row in rows] == ["16", "64", "8", "8", "64", "16", "0"]
    assert (rows[0]["place"], rows[0]["train_seconds"], rows[5]["exit_code"]) == ("1", "12.0", "7")
    assert float(rows[0]["interval_low"]) == wilson(0.9, 200)[0]


def test_figures_that_repeat_are_apart_from_those_that_do_not(sweep: Path) -> None:
    make_board(sweep, out=sweep)
    first = json.loads((sweep / "board.json").read_text())
    for number, run in enumerate(sorted(sweep.parent.glob("r*/summary.json"))):
        said = json.loads(run.read_text())
        put(run, {**said, "train_seconds": 99.0 + number, "tokens_per_second": 5.0, "peak_memory_gb": 3.0, "mfu": 0.1})
    make_board(sweep, out=sweep)
    second = json.loads((sweep / "board.json").read_text())
    assert second["runs"][0]["timings"]["train_seconds"] == 99.0
    for board in (first, second):
        for run in board["runs"]:
            del run["timings"]
    assert first == second
    assert first["runs"][0]["metrics"]["exact_match"] == 0.9
    put(sweep.parent / "r8-a32" / "summary.json", {"exact_match": 0.76, "loss_unit": "nats/token", "final_loss": 0.08})
    make_board(sweep, out=sweep)
    third = json.loads((sweep / "board.json").read_text())
    assert [a["metrics"] == b["metrics"] for a, b in zip(first["runs"], third["runs"], strict=True)].count(False) == 1


def test_the_command_has_the_fixed_words_and_the_jobs(sweep: Path) -> None:
    assert board_of(sweep).command == "python train.py seed=7 method.rank=16 method.alpha=16"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["data.path=my rows/a;b.jsonl"], "python train.py 'data.path=my rows/a;b.jsonl'"),
        (["x=$(touch y)", "y=`z`"], "python train.py 'x=$(touch y)' 'y=`z`'"),
        (["+a.b=it's", "~callbacks.progress"], """python train.py '+a.b=it'"'"'s' '~callbacks.progress'"""),
        (["hydra.launcher.n_jobs=2", "hydra/launcher=joblib", "sweep=lr", "run_name=r", "-m", "seed=1"], "python train.py seed=1"),
        ([], "python train.py"),
    ],
)  # fmt: skip
def test_words_are_quoted_for_a_shell(words: list[str], wanted: str) -> None:
    assert command_of(Row("x", overrides=tuple(words)), None)[0] == wanted
    kept = [word for word in words if word in shlex.split(wanted)]
    assert shlex.split(wanted) == ["python", "train.py", *kept]


def test_secrets_are_masked_wherever_they_were_recorded(sweep: Path) -> None:
    secret = "hf_" + "a1B2" * 8
    put(
        sweep / "sweep.json",
        {"command": f"train.py -m seed=7 logger.wandb.api_key=abc123 data.path={secret}", "swept": []},
    )
    job = {"status": "failed", "exit_code": 2, "error": "E", "reason": f"token {secret} refused"}
    write_job(sweep, 6, [f"data.path={secret}"], None, **job)
    shutil.rmtree(sweep.parent / "r8-a16")
    leaky = config(method__rank=8, method__alpha=16, data__path=secret)
    write_run(sweep.parent / "r8-a16", leaky, command=f"x {secret}", exact_match=0.99, note=secret, device=secret)
    board = make_board(sweep, out=sweep)
    assert shlex.split(board.command)[2:5] == ["seed=7", "logger.wandb.api_key=***", "data.path=***"]
    assert "Values that look like secrets are masked." in board.notes
    for name in ("board.html", "board.csv", "board.json"):
        written = (sweep / name).read_text(encoding="utf-8")
        assert secret not in written
        assert "abc123" not in written
        assert "***" in written


def test_a_run_by_itself_is_repeated_by_its_manifest(tmp_path: Path) -> None:
    command = shlex.join(["__main__.py", "run_dir='runs/a'", "objective=dpo", "data.path='a b'"])
    write_run(tmp_path / "a", config(), command=command, exact_match=1.0)
    assert board_of(tmp_path).command == """python train.py objective=dpo 'data.path='"'"'a b'"'"''"""
    put(tmp_path / "a" / "manifest.json", {"command": "train.py resume=runs/a"})
    board = board_of(tmp_path)
    assert (board.command, board.notes[0][:14]) == ("", "It was resumed")
