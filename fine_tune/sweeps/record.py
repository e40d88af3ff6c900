"""What a sweep leaves beside its runs: which jobs there are, how each ended, and why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fine_tune.redaction import redact
from fine_tune.storage import storage_errors, write_json

SWEEP, JOBS = "sweep.json", "jobs"
FINISHED, FAILED, PRUNED, INTERRUPTED = "finished", "failed", "pruned", "interrupted"


@dataclass(frozen=True)
class JobRecord:
    """How a job ended.

    Attributes:
        number: Its place in the sweep, from 0.
        overrides: Its words.
        run: Name of its folder in the sweep's folder of runs; None where it failed before it had one.
        status: ``finished``, ``failed``, ``pruned`` or ``interrupted``.
        exit_code: What the same run alone would have ended with.
        error: The error's class.
        reason: The error's message.
        seconds: How long it took.
    """

    number: int
    overrides: list[str]
    run: str | None
    status: str
    exit_code: int = 0
    error: str | None = None
    reason: str | None = None
    seconds: float = 0.0


def _version(file: Path) -> tuple[int, int]:
    """Tell one writing of a file from the next: each puts a new file in its place."""
    found = file.stat()
    return found.st_ino, found.st_mtime_ns


class SweepFolder:
    """The record of one sweep, shared by all processes that work on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # By what the files are, not by what a clock says of them.
        self._earlier = {file.name: _version(file) for file in (path / JOBS).glob("*.json")}

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Write what the sweep is, without secrets."""
        write_json(self.path / SWEEP, redact(dict(facts)))

    def _file(self, number: int) -> Path:
        return self.path / JOBS / f"{number:04d}.json"

    def write(self, record: JobRecord) -> None:
        """Write how a job ended."""
        write_json(self._file(record.number), redact(asdict(record)))

    def read(self, number: int) -> JobRecord | None:
        """Return how a job ended; None if it has not, or its record is damaged."""
        try:
            return JobRecord(**json.loads(self._file(number).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def records(self) -> list[JobRecord]:
        """All records, by number."""
        numbers = sorted(int(file.stem) for file in (self.path / JOBS).glob("*.json") if file.stem.isdecimal())
        return [record for number in numbers if (record := self.read(number)) is not None]

    def is_done(self, number: int) -> bool:
        """Tell whether a job has ended since this process opened the sweep."""
        file = self._file(number)
        return self.read(number) is not None and _version(file) != self._earlier.get(file.name)

    @contextmanager
    def claim(self, number: int) -> Iterator[bool]:
        """Yield whether the job is this process's to do; no other process gets it meanwhile."""
        file = self.path / JOBS / f".{number:04d}.lock"
        with storage_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(file))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()
