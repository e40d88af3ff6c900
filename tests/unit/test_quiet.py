"""What a run keeps off the terminal, and that it goes on where nobody reads it any more."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fine_tune.quiet import quiet_libraries

SCRIPT = """
import os, rich
from fine_tune.quiet import quiet_libraries
quiet_libraries()
for number in range(2000):
    rich.get_console().print("a line " * 20)
os.write(2, b"still here")
"""


def test_a_reader_that_leaves_does_not_end_the_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), told) == (0, b"still here")


class Ends:
    """Something whose end fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __del__(self) -> None:
        raise self.error


def test_of_errors_that_nobody_catches_only_a_dead_workers_is_kept_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: seen.append(str(found.exc_value)))
    quiet_libraries()
    hook = sys.unraisablehook
    quiet_libraries()
    assert sys.unraisablehook is hook, "no hook over a hook for each run of a process"
    for error in (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("something else"),
        ValueError("DataLoader worker"),
    ):
        one = Ends(error)
        del one
    assert seen == ["something else", "DataLoader worker"]
