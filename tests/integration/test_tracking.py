"""Trackers of real runs: they hold what the run's files say, no secret, and never decide how a run ends."""

from __future__ import annotations

import csv
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2 as records_of_wandb

import fine_tune
from fine_tune.redaction import redact
from fine_tune.tracking.context import numbers_of

from .conftest import read_metrics, small_job, stop_in_this_process

# Made up, in the form of the real ones.
KEY = "fedcba9876543210" * 2 + "fedcba98"
SECRETS = {
    "WANDB_API_KEY": KEY,
    "HF_TOKEN": "hf_" + "Zq7" * 11,
    "MY_SERVICE_API_KEY": "correct-horse-battery-staple",
    "OPENAI_API_KEY": "sk-" + "proj-" + "x1Y" * 10,
    "HTTPS_PROXY": "http://someone:hunter2secret@127.0.0.1:9",
}
NEEDLES = [*list(SECRETS.values())[:-1], "hunter2secret"]


def job(stand_in: tuple[Path, Path], run_dir: Path, *more: str) -> list[str]:
    """Four steps with validation and previews at every second."""
    previews = ["callbacks.preview.every_n_steps=2", "callbacks.preview.prompts=[w1 w2,w3]"]
    left_out = ("trainer.max_steps=9", "callbacks.preview.every_n_steps=4")
    words = [word for word in small_job(stand_in, run_dir) if word not in left_out]
    return [*words, "trainer.max_steps=4", "trainer.val_every_n_steps=2", *previews, *more]


def records(file: Path) -> Iterator[Any]:
    """What wandb wrote into a .wandb file: blocks of 32 KiB of chunks with a length and a kind each."""
    data, position, held = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        held += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = records_of_wandb.Record()
            record.ParseFromString(held)
            held = b""
            yield record


def wandb_runs(run_dir: Path) -> list[list[Any]]:
    return [list(records(file)) for file in sorted((run_dir / "wandb").rglob("*.wandb"))]


def of_kind(found: list[Any], kind: str) -> list[Any]:
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def history(found: list[Any]) -> dict[int, dict[str, Any]]:
    lines: dict[int, dict[str, Any]] = {}
    for entry in of_kind(found, "history"):
        items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in entry.item}
        assert entry.step.num not in lines
        lines[entry.step.num] = items
    return lines


def logged_numbers(found: list[Any]) -> dict[int, dict[str, float]]:
    own = ("_", "previews")
    return {
        step: {k: v for k, v in items.items() if not k.startswith(own)} for step, items in history(found).items()
    }


def lines_of(run_dir: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: numbers_of(line) for line in lines}


def holding(folder: Path, needle: str) -> list[str]:
    """Files whose bytes or name hold a text, and .wandb files of which a record does."""
    found = []
    for file in (path for path in folder.rglob("*") if path.is_file()):
        inside = needle.encode() in file.read_bytes() or needle in str(file.relative_to(folder))
        if not inside and file.suffix == ".wandb":
            inside = any(needle.encode() in record.SerializeToString() for record in records(file))
        found += [file.name] if inside else []
    return found


@pytest.fixture(scope="module")
def offline(stand_in: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one process, with secrets in the environment."""
    root = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.setenv("WANDB_MODE", "online")
        for name, seed in (("one", 1), ("two", 2)):
            words = ["logger=wandb", "logger.wandb.offline=true", "logger.wandb.group=both", f"seed={seed}"]
            fine_tune.train(job(stand_in, root / name, *words))
    return [root / "one", root / "two"]


def test_an_offline_run_holds_config_metrics_previews_and_adapter(offline: list[Path]) -> None:
    run_dir = offline[0]
    (found,) = wandb_runs(run_dir)
    (run,) = of_kind(found, "run")[:1]
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("fine-tune", "both", "train", "one")
    assert run.run_id == json.loads((run_dir / "tracker.json").read_text())["id"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"}
    assert config == yaml.safe_load((run_dir / "config.yaml").read_text())
    assert logged_numbers(found) == lines_of(run_dir)
    assert set(lines_of(run_dir)) == {0, 1, 2, 3, 4}

    previews = [json.loads(line) for line in (run_dir / "previews.jsonl").read_text().splitlines()]
    assert {step for step, items in history(found).items() if items.get("previews/_type") == "table-file"} == {0, 2, 4}
    shown = []
    for file in sorted((run_dir / "wandb").rglob("previews_*.table.json"), key=lambda f: int(f.name.split("_")[1])):
        table = json.loads(file.read_text())
        shown += [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert shown == previews

    (adapter,) = [artifact for artifact in of_kind(found, "artifact") if artifact.type == "model"]
    assert adapter.name == "one-adapter"
    losses = {step: line["val/loss"] for step, line in lines_of(run_dir).items() if "val/loss" in line}
    assert set(adapter.aliases) == {"latest", *(["best"] if min(losses, key=lambda s: losses[s]) == 4 else [])}
    held = {entry.path: Path(entry.local_path).read_bytes() for entry in adapter.manifest.contents}
    assert held == {file.name: file.read_bytes() for file in (run_dir / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "passport.json"} <= set(held)
    # Nothing outside the run is needed to send it.
    assert all(Path(e.local_path).is_relative_to(run_dir) for e in adapter.manifest.contents)
    assert of_kind(found, "exit")[0].exit_code == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    final = {"/".join(i.nested_key) or i.key: i.value_json for s in of_kind(found, "summary") for i in s.update}
    assert json.loads(final["run/final_loss"]) == summary["final_loss"]


def test_runs_of_one_process_are_runs_of_their_own(offline: list[Path]) -> None:
    ids = [json.loads((run / "tracker.json").read_text())["id"] for run in offline]
    assert ids[0] != ids[1]
    for run_dir, run_id in zip(offline, ids, strict=True):
        (found,) = wandb_runs(run_dir)
        assert [run.run_id for run in of_kind(found, "run")] == [run_id]
        assert logged_numbers(found) == lines_of(run_dir)
    assert lines_of(offline[0])[4]["train/loss"] != lines_of(offline[1])[4]["train/loss"]
    assert "wandb" not in sys.modules or getattr(sys.modules["wandb"], "run", None) is None
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("tracker-")] == []


def test_nothing_of_the_machine_is_kept(offline: list[Path]) -> None:
    names = {file.name for file in (offline[0] / "wandb").rglob("*")}
    assert not names & {"wandb-metadata.json", "requirements.txt", "output.log", "diff.patch", "conda-environment.yaml"}
    assert not [file for file in (offline[0] / "wandb").rglob("*") if file.is_symlink()]
    (found,) = wandb_runs(offline[0])
    assert {run.host for run in of_kind(found, "run")} == {"hidden"}
    kinds = {record.WhichOneof("record_type") for record in found}
    assert not kinds & {"stats", "output", "output_raw", "environment"}


def test_no_secret_is_anywhere_under_the_run(offline: list[Path]) -> None:
    for run_dir in offline:
        assert [holding(run_dir, needle) for needle in NEEDLES] == [[]] * len(NEEDLES)


def test_a_secret_that_is_there_is_found(tmp_path: Path, offline: list[Path]) -> None:
    # The control: the search sees what was logged, in names, in plain files and inside .wandb files.
    project = holding(offline[0], "fine-tune")
    assert any(name.endswith(".wandb") for name in project)
    assert "config.yaml" in project
    (tmp_path / "deep" / KEY).mkdir(parents=True)
    (tmp_path / "deep" / KEY / "x").write_bytes(b"\x00")
    (tmp_path / "debug.log").write_bytes(b"\x00\xff" + KEY.encode())
    assert sorted(holding(tmp_path, KEY)) == ["debug.log", "x"]
    assert redact({"logger": {"wandb": {"tags": [KEY]}}}) == {"logger": {"wandb": {"tags": ["***"]}}}


def test_a_resumed_run_goes_on_under_its_identity_without_doubles(
    stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    stop_in_this_process(2, monkeypatch, job(stand_in, run_dir, "logger=wandb"))
    before = json.loads((run_dir / "tracker.json").read_text())
    fine_tune.train([f"resume={run_dir}"])
    assert json.loads((run_dir / "tracker.json").read_text())["id"] == before["id"]
    first, second = wandb_runs(run_dir)
    assert [of_kind(found, "run")[0].run_id for found in (first, second)] == [before["id"]] * 2
    assert [sorted(logged_numbers(found)) for found in (first, second)] == [[0, 1, 2], [3, 4]]
    assert logged_numbers(first) | logged_numbers(second) == lines_of(run_dir)
    assert [of_kind(found, "exit")[0].exit_code for found in (first, second)] == [1, 0]
    assert [a.name for a in of_kind(second, "artifact") if a.type == "model"] == ["run-adapter"]


@contextmanager
def silent_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def closed_port() -> Iterator[str]:
    yield "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def untracked(stand_in: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    run_dir = tmp_path_factory.mktemp("untracked") / "run"
    started = time.monotonic()
    fine_tune.train(job(stand_in, run_dir))
    return run_dir, time.monotonic() - started


@pytest.mark.parametrize("server", [silent_server, pytest.param(closed_port, marks=pytest.mark.drill)])
def test_an_unreachable_server_costs_a_bounded_wait_and_one_warning(
    server: Any,
    stand_in: tuple[Path, Path],
    untracked: tuple[Path, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain, plain_seconds = untracked
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with server() as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        started = time.monotonic()
        fine_tune.train(job(stand_in, tmp_path / "run", "logger=wandb", "logger.wandb.finish_seconds=2"))
        seconds = time.monotonic() - started
    assert seconds < plain_seconds + 12
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("warning: wandb had not taken everything 2 s after the end of the run") == 1
    assert read_metrics(tmp_path / "run") == read_metrics(plain)
    assert holding(tmp_path / "run", KEY) == []


def test_what_could_not_be_sent_in_time_is_kept_offline(
    stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run_dir = tmp_path / "run"
    with closed_port() as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        words = ["logger=wandb", "logger.wandb.init_seconds=0.5", "logger.wandb.finish_seconds=30"]
        fine_tune.train(job(stand_in, run_dir, *words))
    printed = " ".join(capsys.readouterr().out.split())
    assert "note: wandb: no connection (" in printed
    assert "warning" not in printed
    kept = [found for found in wandb_runs(run_dir) if of_kind(found, "history")]
    assert [logged_numbers(found) for found in kept] == [lines_of(run_dir)]


def test_tables_of_csv_and_tensorboard_are_whole_after_a_resume(
    stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    added = "+logger.csv={_target_:lightning.pytorch.loggers.CSVLogger,name:csv,version:''}"
    stop_in_this_process(2, monkeypatch, job(stand_in, run_dir, "logger=tensorboard", added))
    fine_tune.train([f"resume={run_dir}"])
    expected = lines_of(run_dir)
    with (run_dir / "csv" / "metrics.csv").open(newline="") as stream:
        table = {
            int(row.pop("step")): {k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(stream)
        }
    assert table == expected
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    for name in ("train/loss", "val/loss", "learning_rate"):
        told = {event.step: event.value for event in board.Scalars(name)}
        assert told == pytest.approx({step: line[name] for step, line in expected.items() if name in line}, rel=1e-6)
        assert len(board.Scalars(name)) == len(told)
    assert [tag for tag in board.Tags()["tensors"] if tag.startswith("previews/")]

    # A tracker that a finished run did not have is told all of it.
    fine_tune.train([f"resume={run_dir}", "logger=wandb"])
    (found,) = wandb_runs(run_dir)
    assert logged_numbers(found) == expected
    assert [artifact.name for artifact in of_kind(found, "artifact") if artifact.type == "model"] == ["run-adapter"]
