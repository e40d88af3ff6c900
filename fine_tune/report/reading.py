"""What a run folder holds, read without trust: a missing file is noted, a damaged line is skipped and counted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fine_tune import safe_load
from fine_tune.errors import ConfigError

# What a run may leave behind, and what a report says where it did not.
FILES = {
    "config.yaml": "its config",
    "manifest.json": "versions and command",
    "metrics.jsonl": "measurements of its steps",
    "summary.json": "its summary: it has not finished, or is no training run",
    "data_ledger.json": "the account of its data",
    "previews.jsonl": "previews",
}
# Items of one evaluation that are kept for showing.
MAX_ITEMS = 20_000


@dataclass
class EvaluationFiles:
    """One folder below ``eval/``: its figures and its comparisons with other checkpoints."""

    name: str
    path: Path
    metrics: dict[str, Any]
    verdicts: list[dict[str, Any]]


@dataclass
class RunFiles:
    """The files of one run.

    Attributes:
        path: The run's folder.
        config_text: config.yaml as it stands; ``config`` is what it says.
        alias: What it is called in a study, where that is not its folder's name.
        missing: Files that are not there, with what they would have told.
        damaged: Unreadable files, and how many lines of others were skipped.
    """

    path: Path
    alias: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    checklist: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    previews: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[EvaluationFiles] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the run is called: its folder's name, unless a study calls it otherwise."""
        return self.alias or self.path.name

    @property
    def label(self) -> str:
        """What evaluations call it: its name, without what may not stand in a folder's name."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip(".-")[:64] or "checkpoint"

    @property
    def is_trained(self) -> bool:
        """Whether there is anything of a training in it."""
        return len(self.missing) < len(FILES)

    @property
    def is_run(self) -> bool:
        """Whether a run left this folder; results of evaluations may stand in one of their own."""
        return self.is_trained or (self.path / "eval").is_dir()

    @property
    def objective(self) -> str:
        """The label of its objective, such as SFT; empty if nothing says it."""
        named = self.summary.get("objective") or section(self.config, "objective").get("name")
        return named.upper() if isinstance(named, str) else ""

    @property
    def starts_from(self) -> Path | None:
        """The folder whose adapter it started from."""
        named = self.config.get("init_from")
        try:
            return Path(named).expanduser().resolve() if isinstance(named, str) and named else None
        except (OSError, ValueError, RuntimeError):
            return None

    def written(self) -> str:
        """When its last file of figures was written; copying a folder may change it."""
        times = [place.stat().st_mtime for name in FILES if (place := self.path / name).is_file()]
        return datetime.fromtimestamp(max(times), UTC).strftime("%Y-%m-%d %H:%M UTC") if times else ""


def section(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a mapping inside a mapping, empty if there is none of that name."""
    found = tree.get(key)
    return found if isinstance(found, dict) else {}


def read_figures(folder: Path) -> RunFiles:
    """Read what a run was told and what it came to, and none of its lines: enough for a table of many runs.

    Raises:
        ConfigError: There is no such folder.
    """
    place = folder.expanduser().resolve()
    if not place.is_dir():
        raise ConfigError(f"run = {folder}: no such folder. Pass the folder of a run, such as runs/<run_name>.")
    run = RunFiles(place)
    run.config_text, run.config = _config(run)
    run.manifest = read_mapping(run, place / "manifest.json")
    run.summary = read_mapping(run, place / "summary.json")
    return run


def read_run(folder: Path) -> RunFiles:
    """Read every file that a report shows.

    Raises:
        ConfigError: There is no such folder, or nothing in it is of a run.
    """
    run = read_figures(folder)
    place = run.path
    run.ledger = read_mapping(run, place / "data_ledger.json")
    run.checklist = read_mapping(run, place / "checklist.json")
    run.metrics = list(read_lines(run, place / "metrics.jsonl"))
    run.previews = list(read_lines(run, place / "previews.jsonl"))
    run.missing = [f"{name} ({told})" for name, told in FILES.items() if not (place / name).is_file()]
    run.evaluations = _evaluations(run)
    if len(run.missing) == len(FILES) and not run.evaluations:
        raise ConfigError(f"run = {folder}: no file of a run in it. Pass the folder of a run, such as runs/<run_name>.")
    return run


def read_lines(run: RunFiles, file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines; what cannot be read is counted in ``run.damaged``."""
    skipped = 0
    for line in _text(run, file).split("\n"):
        if not line.strip():
            continue
        value = _parse(line)
        if isinstance(value, dict):
            yield value
        else:
            skipped += 1
    if skipped:
        run.damaged.append(f"{_relative(run, file)}: {skipped} damaged line(s) skipped")


def read_items(run: RunFiles, evaluation: EvaluationFiles) -> Iterator[dict[str, Any]]:
    """Yield the first items of an evaluation."""
    for number, item in enumerate(read_lines(run, evaluation.path / "items.jsonl")):
        if number < MAX_ITEMS:
            yield item


def _text(run: RunFiles, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    except OSError as error:
        run.damaged.append(f"{_relative(run, file)}: cannot be read ({error.strerror})")
        return ""


def _parse(text: str) -> Any:
    try:
        return safe_load.json_text(text)
    except safe_load.Unreadable:
        return None


def read_mapping(run: RunFiles, file: Path) -> dict[str, Any]:
    """Return the object that a JSON file of the run holds; a missing one is empty, a damaged one is noted, too."""
    text = _text(run, file)
    value = _parse(text) if text else {}
    if isinstance(value, dict):
        return value
    run.damaged.append(f"{_relative(run, file)}: damaged, left out")
    return {}


def _config(run: RunFiles) -> tuple[str, dict[str, Any]]:
    text = _text(run, run.path / "config.yaml")
    try:
        value = safe_load.yaml_text(text) if text else {}
    except safe_load.Unreadable:
        value = None
    if isinstance(value, dict):
        return text, {str(key): inner for key, inner in value.items()}
    run.damaged.append("config.yaml: damaged, shown as it stands")
    return text, {}


def _evaluations(run: RunFiles) -> list[EvaluationFiles]:
    """Find evaluations in ``eval/<name>/`` and, of several checkpoints, in ``eval/<name>/<checkpoint>/``.

    A folder of results alone, without a run, holds them itself.
    """
    root = run.path / "eval" if run.is_run else run.path
    folders = sorted(place for depth in ("*", "*/*") for place in root.glob(depth) if place.is_dir())
    folders = folders if run.is_run else [root, *folders]
    found = [_evaluation(run, folder, root) for folder in folders if not folder.name.startswith(".")]
    return [evaluation for evaluation in found if evaluation.metrics or evaluation.verdicts]


def _evaluation(run: RunFiles, folder: Path, root: Path) -> EvaluationFiles:
    metrics = read_mapping(run, folder / "metrics.json")
    verdicts: list[dict[str, Any]] = []
    for file in sorted(folder.glob("verdict*.json")):
        value = _parse(_text(run, file))
        # One comparison, or several of the same items.
        several = value if isinstance(value, list) else [value]
        verdicts += [verdict for verdict in several if isinstance(verdict, dict)]
        if not all(isinstance(verdict, dict) for verdict in several):
            run.damaged.append(f"{_relative(run, file)}: damaged, left out")
    name = folder.name if folder == root else folder.relative_to(root).as_posix()
    return EvaluationFiles(name, folder, metrics, verdicts)


def _relative(run: RunFiles, file: Path) -> str:
    return file.relative_to(run.path).as_posix()
