"""A run as a row of the board, read from its folder without trust."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fine_tune.redaction import MASK, is_secret, redact, secret_in_override
from fine_tune.report.leaves import leaf_text, leaves
from fine_tune.report.reading import RunFiles, read_figures, read_lines, read_mapping
from fine_tune.run_folder import CONFIG, LOCK, SUMMARY

FAILURE = "failure.json"
# What stopped runs end with: they failed at nothing.
STOPPED = (130, 143)
# Longer lists are shortened, as text.
MAX_LIST = 100


@dataclass
class Row:
    """One run, or one job that had no folder yet when it ended.

    Attributes:
        name: The folder's name; of a job without one, its number.
        path: The folder; None where there is none.
        status: finished, failed, pruned, interrupted, running, or gone.
        config: Its config by dotted key.
        groups: Of each group, the option's name.
        overrides: The words of its job; None outside a sweep.
        exit_code: What it ended with, where that is recorded.
        error: Class of the error, empty without one.
        reason: Why it did not finish, on one line.
        settings: Its values of the keys that vary.
        value: The ranked figure, finite or None.
        interval: The 95 % interval of the figure.
        place: Its rank, from 1; None for runs that are not ranked.
    """

    name: str
    path: Path | None = None
    status: str = "interrupted"
    config: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] | None = None
    job: int | None = None
    job_seconds: Any = None
    exit_code: int | None = None
    error: str = ""
    reason: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    value: float | None = None
    interval: tuple[float, float] | None = None
    place: int | None = None
    damaged: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return self.status == "finished"

    @property
    def ended(self) -> str:
        """Its status with exit code."""
        return self.status if not self.exit_code or self.finished else f"{self.status}, exit {self.exit_code}"

    @property
    def why(self) -> str:
        """The error's class and its message, on one line."""
        return ": ".join(part for part in (self.error, self.reason) if part)

    def last(self, key: str) -> Any:
        """Return the last measurement of a name in its metrics.jsonl, None where there is none."""
        if self.path is None:
            return None
        lines = read_lines(RunFiles(self.path), self.path / "metrics.jsonl")
        return next((found for found in reversed([line[key] for line in lines if key in line])), None)


def read_row(folder: Path) -> Row:
    """Read a run's folder.

    Raises:
        ConfigError: There is no such folder.
    """
    run = read_figures(folder)
    failure = read_mapping(run, run.path / FAILURE)
    groups = {key: _plain(node.get("name")) for key, node in run.config.items() if isinstance(node, dict)}
    row = Row(
        run.path.name,
        run.path,
        config=redacted(dict(leaves(run.config))),
        groups=groups,
        summary=redact(run.summary),
        manifest=run.manifest,
        damaged=tuple(run.damaged),
    )
    row.status = _status(run, row, failure)
    return row


def redacted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by key, secrets masked; what JSON has no form for (YAML has dates and sets) as text."""
    return {key: redact(_plain(value), key=key) for key, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(entry) for entry in value] if len(value) <= MAX_LIST else leaf_text(value)
    return value if value is None or isinstance(value, str | int | float) else leaf_text(value)


def tell(row: Row, record: Mapping[str, Any]) -> None:
    """Take exit code, error and reason from the record of a failure."""
    code, error, reason = (record.get(key) for key in ("exit_code", "error", "reason"))
    row.exit_code = code if isinstance(code, int) and not isinstance(code, bool) else row.exit_code
    row.error = one_line(error) or row.error
    row.reason = one_line(reason) or row.reason


def one_line(text: Any) -> str:
    """Write a text of a file on one line, secrets masked, not too long."""
    words = text[:2000].split() if isinstance(text, str) else []
    return " ".join(masked(word) for word in words)[:600]


def masked(word: str) -> str:
    """Return a word, without its value if that is a secret."""
    key, equals, _ = word.partition("=")
    if not secret_in_override(word):
        return word
    return f"{key}={MASK}" if equals and not is_secret(key) else MASK


def _status(run: RunFiles, row: Row, failure: Mapping[str, Any]) -> str:
    if (run.path / SUMMARY).is_file() and run.summary:
        return "finished"
    if (run.path / FAILURE).is_file():
        tell(row, failure)
        return "interrupted" if row.exit_code in STOPPED else "failed"
    if (run.path / SUMMARY).is_file():
        row.reason = "its summary cannot be read"
        return "failed"
    if _held(run.path / LOCK):
        return "running"
    row.reason = "" if (run.path / CONFIG).is_file() else "it has not begun"
    return "interrupted"


def _held(lock: Path) -> bool:
    """Tell whether a live process has the run open, without taking the lock from it."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return False
    try:
        with lock.open("rb") as stream:
            # Shared, and given back at once as the file closes.
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
