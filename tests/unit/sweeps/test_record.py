"""What a sweep writes about its jobs, and who may take one."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from fine_tune.sweeps.record import FAILED, FINISHED, JobRecord, SweepFolder
from fine_tune.sweeps.workers import leave_the_group


def test_a_record_comes_back_without_secrets(tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path)
    token = "hf_" + "a" * 24
    record = JobRecord(2, ["method.rank=4", f"x={token}"], "run-1", FAILED, 7, "MemoryExhausted", "too much", 1.5)
    sweep.write(record)
    assert sweep.read(2) == JobRecord(2, ["method.rank=4", "***"], "run-1", FAILED, 7, "MemoryExhausted", "too much", 1.5)
    assert token not in (tmp_path / "jobs" / "0002.json").read_text()
    sweep.describe({"command": "python train.py", "swept": ["method.rank"]})
    assert json.loads((tmp_path / "sweep.json").read_text())["swept"] == ["method.rank"]


def test_a_job_is_done_by_what_this_start_saw(tmp_path: Path) -> None:
    first = SweepFolder(tmp_path)
    assert not first.is_done(0)
    first.write(JobRecord(0, [], "a", FINISHED))
    assert first.is_done(0)
    file = tmp_path / "jobs" / "0000.json"
    for ahead in (-(10**9), 10**9):
        # Whatever a clock that was set says of it.
        os.utime(file, (time.time() + ahead, time.time() + ahead))
        assert not SweepFolder(tmp_path).is_done(0), "a record of an earlier start: the job is looked at again"
        second = SweepFolder(tmp_path)
        second.write(JobRecord(0, [], "a", FINISHED))
        os.utime(file, (time.time() + ahead, time.time() + ahead))
        assert second.is_done(0)
    file.write_text("{")
    assert first.read(0) is None
    assert first.records() == []


def test_only_one_process_gets_a_job(tmp_path: Path) -> None:
    one, other = SweepFolder(tmp_path), SweepFolder(tmp_path)
    with one.claim(3) as mine:
        assert mine
        with other.claim(3) as theirs, other.claim(4) as next_one:
            assert not theirs
            assert next_one
    with other.claim(3) as theirs:
        assert theirs


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (2, 4)])
def test_a_process_of_torchrun_becomes_one_of_its_own(rank: int, size: int) -> None:
    variables = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_PORT": "29500"}
    assert leave_the_group(variables) == (rank, size)
    assert variables["WORLD_SIZE"] == "1"
    assert variables["LOCAL_RANK"] == str(rank)
    assert leave_the_group({}) == (0, 1)
