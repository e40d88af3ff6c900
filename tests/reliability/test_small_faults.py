"""A disk that is full at any byte, a clock that was set, a hub that does not answer, and packages that must not be installed."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from fine_tune import checkpoints, storage
from fine_tune.errors import StorageError
from fine_tune.modules import clock

PACKAGE = Path(checkpoints.__file__).parent
STATE = {"step": 1, "moments": torch.arange(20_000.0)}


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as a quota does: the write that would is refused half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def save(root: Path, step: int) -> checkpoints.Checkpoint:
    return checkpoints.save(root, step, adapter={"b": torch.arange(30_000.0) + step}, trainer=STATE, record={})


@pytest.mark.parametrize("num_bytes", [0, 1, 100, 70_000, 80_000, 90_000, 119_999, 120_000])
def test_a_disk_that_is_full_at_any_byte_leaves_the_earlier_checkpoint(tmp_path: Path, num_bytes: int) -> None:
    save(tmp_path, 1)
    with pytest.raises(StorageError, match=r"cannot write .*Earlier checkpoints are untouched") as refused, largest_file(num_bytes):
        save(tmp_path, 2)
    assert refused.value.exit_code == 8
    newest, damaged = checkpoints.latest(tmp_path)
    assert newest is not None
    assert (newest.step, damaged) == (1, [])
    assert torch.equal(newest.adapter()["b"], torch.arange(30_000.0) + 1)
    assert [place.name for place in tmp_path.iterdir()] == ["step-0000001"]
    # There is room again.
    assert save(tmp_path, 2).step == checkpoints.latest(tmp_path)[0].step == 2  # type: ignore[union-attr]


def test_the_limit_of_these_tests_is_felt(tmp_path: Path) -> None:
    with largest_file(10), pytest.raises(OSError, match="File too large"):
        (tmp_path / "x").write_bytes(b"0" * 11)
    storage.write_bytes(tmp_path / "x", b"0" * 11)


def test_a_clock_that_was_set_changes_neither_durations_nor_the_choice_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(10**9, 0, -86_400))
    monkeypatch.setattr("time.time", lambda: float(next(now)))
    watch = clock.Stopwatch()
    assert all(watch.lap() >= 0 for _ in range(5))
    year = 365 * 86_400
    for step, away in ((1, year), (2, -year), (3, 0)):
        folder = save(tmp_path, step).folder
        for file in (*folder.iterdir(), folder):
            os.utime(file, (10**9 + away, 10**9 + away))
    assert checkpoints.latest(tmp_path)[0].step == 3  # type: ignore[union-attr]
    assert checkpoints.prune(tmp_path, 3, keep=2, best_step=None) == [1]


def wall_clocks(source: str) -> set[str]:
    """Calls whose value changes when somebody sets the clock."""
    return set(re.findall(r"\b(?:time\.time(?:_ns)?|datetime\.(?:now|utcnow|today)|getmtime)(?=\()", source))


def test_nothing_is_decided_by_the_time_of_day() -> None:
    found = {file.name: names for file in PACKAGE.rglob("*.py") if (names := wall_clocks(file.read_text(encoding="utf-8")))}
    assert found == {}
    assert wall_clocks("import time\na = time.time()") == {"time.time"}
    assert wall_clocks("from datetime import datetime\ndatetime.now()") == {"datetime.now"}


HUB = """
import sys, time
from fine_tune.data.readers import read_hub
from fine_tune.errors import EnvironmentProblem
from fine_tune.models.hub import resolve_model
for ask in (lambda: resolve_model("owner/name", revision="main"),
            lambda: list(read_hub("owner/name", subset=None, revision="main", split="train"))):
    started = time.monotonic()
    try:
        ask()
    except EnvironmentProblem as error:
        print(f"{error.exit_code} {error} {'in time' if time.monotonic() - started < 15 else 'late'}")
"""


def test_a_hub_that_does_not_answer_is_told_soon(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", HUB], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    told = done.stdout.splitlines()
    assert len(told) == 2, done.stderr
    for line, key in zip(told, ("model.path=<local folder>", "data.path=<local file>"), strict=True):
        assert line.startswith("5 ")
        for part in ("owner/name@main", "HF_HUB_OFFLINE", key, "in time"):
            assert part in line


def test_versions_that_steal_or_run_pickles_cannot_be_installed(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {canonicalize_name(found.name): found.specifier for found in map(Requirement, project["dependencies"])}
    refused = ["lightning 2.6.2", "lightning 2.6.3", "torch 2.5.1", "jinja2 3.1.5", "hydra-core 1.3.2"]
    for name, version in (one.split() for one in refused):
        assert not needed[name].contains(Version(version)), f"{name} {version}"
    pinned = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in pinned if "==" in line and not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pairs}
    for name, specifier in needed.items():
        if name in versions:
            assert specifier.contains(Version(versions[name].split(";")[0].strip())), name
    assert {"torch", "lightning", "transformers", "peft", "safetensors", "jinja2"} <= set(versions)
