"""Many starts of one config at one moment: each run has a folder of its own."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from fine_tune.config import check_config
from fine_tune.errors import RunLocked
from fine_tune.opening import opened

STARTS = 8


def start_together(cfg: dict[str, Any]) -> tuple[list[Path], list[BaseException]]:
    """Open the folder of a run in many threads at once, and close none before all have one."""
    barrier = threading.Barrier(STARTS, timeout=60)
    paths, errors = [], []

    def start() -> None:
        barrier.wait()
        try:
            with opened(cfg, rank=0) as (path, _):
                paths.append(path)
                (path / "config.yaml").write_text("begun")
                ended.wait(60)
        except Exception as error:
            errors.append(error)

    ended = threading.Event()
    threads = [threading.Thread(target=start) for _ in range(STARTS)]
    for thread in threads:
        thread.start()
    while len(paths) + len(errors) < STARTS:
        ended.wait(0.01)
    ended.set()
    for thread in threads:
        thread.join()
    return paths, errors


def test_eight_starts_have_eight_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths, errors = start_together(check_config([]).cfg)
    assert errors == []
    assert len(set(paths)) == STARTS
    name = min(path.name for path in paths)
    assert sorted(path.name for path in paths) == [name, *(f"{name}-{i}" for i in range(2, STARTS + 1))]


def test_a_name_that_was_typed_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths, errors = start_together(check_config(["run_name=mine"]).cfg)
    assert [path.name for path in paths] == ["mine"]
    assert len(errors) == STARTS - 1
    # Who comes while the first one is at it finds it locked, or already begun.
    assert {type(error).__name__ for error in errors} <= {"RunLocked", "ConfigError"}
    assert any(isinstance(error, RunLocked) for error in errors) or all("exists" in str(error) for error in errors)
