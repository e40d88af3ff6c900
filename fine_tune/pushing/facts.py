"""What a run's folder says about an artifact, read for a card; everything may be missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fine_tune import safe_load
from fine_tune.errors import CheckpointError


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Attributes:
        config: The run's resolved config.
        summary: Its figures.
        manifest: Versions, command and device.
        ledger: Rows read, kept and dropped.
        metrics: Of each evaluation of the run, by its name.
        sentences: Verdicts, as sentences.
        merge: The merge report, of merged models.
    """

    config: dict[str, Any]
    summary: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    merge: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> dict[str, Any]:
        """Return a group of the config."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}


def read_facts(run: Path, merged: Path | None) -> Facts:
    """Read a run's records.

    Raises:
        CheckpointError: The folder is no run.
    """
    try:
        config = safe_load.yaml_text((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"ckpt={run}: no run with a config.yaml that can be read. Pass a finished run."
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"ckpt={run}: its config.yaml is damaged. Pass a finished run.")
    records = {name: _object(run / f"{file}.json") for name, file in (
        ("summary", "summary"), ("manifest", "manifest"), ("ledger", "data_ledger"))}  # fmt: skip
    metrics, sentences = _evaluations(run / "eval")
    merge = _object(merged / "merge_report.json") if merged is not None else {}
    return Facts(config, **records, metrics=metrics, sentences=sentences, merge=merge)


def _evaluations(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    metrics, sentences = {}, []
    for place in sorted(folder.iterdir()) if folder.is_dir() else []:
        # Of several checkpoints, each has a folder of its own; the run's label is its name.
        for file in (place / "metrics.json", place / folder.parent.name / "metrics.json"):
            found = _object(file).get("metrics")
            if isinstance(found, dict) and not place.name.startswith("held_out_"):
                metrics[place.name] = found
        verdicts = _json(place / "verdict.json")
        for verdict in verdicts if isinstance(verdicts, list) else []:
            if isinstance(verdict, dict) and isinstance(verdict.get("sentence"), str):
                sentences.append(verdict["sentence"])
    return metrics, sentences


def _object(file: Path) -> dict[str, Any]:
    found = _json(file)
    return found if isinstance(found, dict) else {}


def _json(file: Path) -> Any:
    try:
        return safe_load.json_text(file.read_bytes())
    except (OSError, ValueError):
        return None
