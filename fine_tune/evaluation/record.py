"""The folder of one evaluation: the key it is kept under, the chunks so far, and the finished result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fine_tune.storage import finite, remove_leftovers, write_json, write_text

ITEMS, METRICS, PARTIAL, PROGRESS, KEY = "items.jsonl", "metrics.json", "partial.jsonl", "progress.jsonl", "key.json"
Lines = list[dict[str, Any]]


@dataclass
class Result:
    """A finished evaluation of one checkpoint."""

    label: str
    folder: Path
    lines: Lines
    metrics: dict[str, Any]


@dataclass
class Record:
    """Reads and writes one evaluation's folder.

    Attributes:
        folder: The folder; only one process works in it at a time.
        key: Everything that decides an answer. What lies there under another key is not used.
        compares: The field of a line whose running mean goes to ``progress.jsonl``; None for none.
    """

    folder: Path
    key: Mapping[str, Any]
    compares: str | None
    _done: int = field(default=0, init=False)
    _sum: float = field(default=0.0, init=False)

    def finished(self) -> Result | None:
        """Return the result that is there under this key; None where there is none, or a damaged one."""
        remove_leftovers(self.folder)
        if not (self.folder / METRICS).is_file() or not self._same_key():
            return None
        try:
            report = json.loads((self.folder / METRICS).read_text(encoding="utf-8"))
            lines = [json.loads(line) for line in (self.folder / ITEMS).read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError):
            return None  # done again
        if not isinstance(report, dict) or report.get("num_items") != len(lines):
            return None
        (self.folder / PARTIAL).unlink(missing_ok=True)
        return Result(report["checkpoint"], self.folder, lines, report["metrics"])

    def start(self, chunks: Sequence[Sequence[int]]) -> dict[int, Lines]:
        """Open the folder for this key and return the chunks of it that are done; nothing else stays there."""
        same = self._same_key()
        # What is there did not read as finished: at most its chunks are of use.
        for name in (METRICS, ITEMS) if same else (METRICS, ITEMS, PARTIAL, PROGRESS):
            (self.folder / name).unlink(missing_ok=True)
        if not same:
            write_json(self.folder / KEY, self.key)
        return self._known(chunks)

    def add(self, index: int, lines: Lines) -> None:
        """Put a chunk on disk, and the running mean of all of them."""
        _append(self.folder / PARTIAL, {"chunk": index, "lines": lines})
        if self.compares is not None:
            _append(self.folder / PROGRESS, self._progress(lines))

    def finish(self, report: Mapping[str, Any], lines: Lines) -> Result:
        """Write the result, the metrics last: where they are, the rest is whole."""
        write_text(self.folder / ITEMS, "".join(_line(line) for line in lines))
        write_json(self.folder / METRICS, report)
        (self.folder / PARTIAL).unlink(missing_ok=True)
        return Result(report["checkpoint"], self.folder, lines, report["metrics"])

    def _same_key(self) -> bool:
        try:
            found = json.loads((self.folder / KEY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(found == json.loads(json.dumps(finite(dict(self.key)))))

    def _known(self, chunks: Sequence[Sequence[int]]) -> dict[int, Lines]:
        """Read the chunks of an interrupted evaluation; a line that a kill cut off is cut away for good."""
        file = self.folder / PARTIAL
        if not file.is_file():
            (self.folder / PROGRESS).unlink(missing_ok=True)
            return {}
        known: dict[int, Lines] = {}
        progress = []
        for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(text)
                index, lines = int(entry["chunk"]), list(entry["lines"])
            except (ValueError, KeyError, TypeError):
                continue
            if index not in known and 0 <= index < len(chunks) and len(lines) == len(chunks[index]):
                known[index] = lines
                progress.append(self._progress(lines))
        write_text(file, "".join(_line({"chunk": index, "lines": lines}) for index, lines in known.items()))
        if self.compares is not None:
            # A kill between the two files leaves one of them behind the other.
            write_text(self.folder / PROGRESS, "".join(_line(entry) for entry in progress))
        return known

    def _progress(self, lines: Lines) -> dict[str, Any]:
        found = [line[self.compares] for line in lines] if self.compares else []
        values = [float(value) for value in found if value is not None]
        self._done, self._sum = self._done + len(values), self._sum + sum(values)
        return {"done": self._done, "mean": self._sum / self._done if self._done else None}


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(finite(dict(values)), ensure_ascii=True) + "\n"


def _append(file: Path, values: Mapping[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(_line(values))
        stream.flush()
