"""Which runs a board is about: a folder of runs, a sweep with its jobs, or runs that were named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fine_tune.board.rows import Row, read_row, redacted, tell
from fine_tune.errors import ConfigError
from fine_tune.redaction import redact
from fine_tune.report.reading import RunFiles, read_mapping
from fine_tune.run_folder import CONFIG, SUMMARY

SWEEP = "sweep.json"
# What a job's record may say of a run without results; that it finished, only its summary says.
STATUSES = ("failed", "pruned", "interrupted")


@dataclass
class Found:
    """The runs and, of a sweep, what it was told.

    Attributes:
        title: What to call them.
        rows: One for each run, by name; of a sweep by job.
        sweep: What sweep.json says; empty without one.
        notes: Damage that was met.
    """

    title: str
    rows: list[Row]
    sweep: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def swept(self) -> tuple[str, ...]:
        """The keys that the sweep varies."""
        named = self.sweep.get("swept")
        return tuple(key for key in named if isinstance(key, str)) if isinstance(named, list) else ()


def find(sources: Sequence[Path]) -> Found:
    """Find the runs of one or several places.

    Raises:
        ConfigError: A folder is missing, or there is no run in it; all problems together.
    """
    founds, problems = [], []
    for place in sources:
        try:
            founds.append(_find(place.expanduser()))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    if len(founds) == 1:
        return founds[0]
    rows = {row.path or (row.name, index): row for index, found in enumerate(founds) for row in found.rows}
    sweeps = [found.sweep for found in founds if found.sweep]
    # The words of one sweep are not those of another.
    sweep = sweeps[0] if len(sweeps) == len(founds) == 1 else {}
    return Found(f"{len(rows)} runs", list(rows.values()), sweep, [note for found in founds for note in found.notes])


def is_run(folder: Path) -> bool:
    """Whether a run has begun in a folder."""
    return (folder / CONFIG).is_file() or (folder / SUMMARY).is_file()


def is_sweep(folder: Path) -> bool:
    """Whether a folder is the record of a sweep."""
    return (folder / SWEEP).is_file()


def _find(place: Path) -> Found:
    if not place.is_dir():
        raise ConfigError(f"run = {place}: no such folder. Pass the folder of runs, of a sweep, or of a run.")
    if is_sweep(place):
        return _of_sweep(place.resolve())
    folders = [place] if is_run(place) else _runs_in(place)
    if not folders:
        raise ConfigError(f"run = {place}: no run in it. Pass the folder of runs, of a sweep, or of a run.")
    rows = [read_row(folder) for folder in folders]
    return Found(place.resolve().name, rows, notes=_damage(rows))


def _runs_in(place: Path) -> list[Path]:
    """Return the runs of a folder by name, without what a writer left behind or is writing."""
    return sorted(inner for inner in place.iterdir() if not inner.name.startswith(".") and is_run(inner))


def _of_sweep(place: Path) -> Found:
    files = RunFiles(place)
    said = read_mapping(files, place / SWEEP)
    # A command is masked word by word, where it is shown; here it would be lost as a whole.
    sweep = {**redact(said), "command": said.get("command")}
    known = {folder.name: folder for folder in place.parent.iterdir() if folder.is_dir()}
    rows: dict[str, Row] = {}
    for file in sorted((place / "jobs").glob("*.json")):
        row = _of_job(read_mapping(files, file), file, known)
        # A job that found its run finished names the same folder.
        rows.setdefault(row.name, row)
    told = list(rows.values())
    return Found(place.name, told, sweep, [f"{place.name}/{line}" for line in files.damaged] + _damage(told))


def _of_job(job: dict[str, Any], file: Path, known: Mapping[str, Path]) -> Row:
    number = job.get("number")
    number = number if isinstance(number, int) else int(file.stem) if file.stem.isdecimal() else None
    named, status = job.get("run"), job.get("status")
    # One of the folders that are there; never a way out of the folder of runs.
    folder = known.get(named) if isinstance(named, str) else None
    row = Row(_name(named, number, file)) if folder is None else read_row(folder)
    words = job.get("overrides")
    row.overrides = tuple(word for word in words if isinstance(word, str)) if isinstance(words, list) else ()
    row.job, row.job_seconds = number, job.get("seconds")
    if not row.config:
        row.config = redacted(_typed(row.overrides))
    if row.path is None and status == "finished":
        row.status, row.reason = "gone", "its folder is not there any more"
    elif status in STATUSES and (status == "pruned" or not row.finished) and row.status != "running":
        row.status = status
        tell(row, job)
    return row


def _name(named: Any, number: int | None, file: Path) -> str:
    """Name a job without a folder as the sweep counts them: from 1."""
    return named if isinstance(named, str) and named else f"job {file.stem if number is None else number + 1}"


def _damage(rows: Sequence[Row]) -> list[str]:
    return [f"{row.name}/{line}" for row in rows for line in row.damaged]


def _typed(words: Sequence[str]) -> dict[str, Any]:
    """Read the values that words set, as a config would hold them."""
    parted = (word.lstrip("+").partition("=") for word in words)
    return {key: scalar(text) for key, equals, text in parted if equals}


def scalar(text: str) -> Any:
    """Read one value of a word.

    Example:
        >>> [scalar(text) for text in ("8", "1e-4", "true", "null", "'a b'", "[q,v]")]
        [8, 0.0001, True, None, 'a b', '[q,v]']
    """
    if text in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
