"""tracker.json of a run folder: under which identity its trackers know it, and how far each was told."""

from __future__ import annotations

import json
import os
import threading
import uuid
from pathlib import Path
from typing import Any

FILE = "tracker.json"


class TrackerRecord:
    """What is kept between the starts of a run; a file that is damaged counts as absent.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self._lock = folder / FILE, threading.Lock()
        self._known: dict[str, Any] = {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if isinstance(found, dict) and isinstance(found.get("id"), str) and isinstance(found.get("sent"), dict):
            self._known = found
        else:
            self._known = {"id": uuid.uuid4().hex[:16], "sent": {}}

    @property
    def tracker_id(self) -> str:
        """The run's identity."""
        return str(self._known["id"])

    def last(self, tracker: str, kind: str) -> int:
        """Return the last step a tracker was told, -1 for none."""
        step = self._known["sent"].get(tracker, {}).get(kind, -1)
        return step if isinstance(step, int) else -1

    def note(self, tracker: str, kind: str, step: int) -> None:
        """Keep that a tracker was told a step."""
        with self._lock:
            self._known["sent"].setdefault(tracker, {})[kind] = step
            # Whole or absent also after a kill; not flushed to the disk, for it is written at every step.
            temporary = self.path.with_name(f".tmp-{FILE}")
            temporary.write_text(json.dumps(self._known), encoding="utf-8")
            os.replace(temporary, self.path)


class Sent:
    """How far one tracker was told.

    Args:
        record: The run's record.
        tracker: The tracker's name in the config.
        up_to: Steps past this one count as not told; None keeps what is recorded.
    """

    def __init__(self, record: TrackerRecord, tracker: str, *, up_to: int | None = None) -> None:
        self._record, self._tracker, self._up_to = record, tracker, up_to
        self._earlier: dict[str, int] = {}

    def is_new(self, kind: str, step: int) -> bool:
        """Tell whether no earlier start has told this step; what this start tells twice is its own affair."""
        last = self._earlier.setdefault(kind, self._record.last(self._tracker, kind))
        return step > (last if self._up_to is None else min(last, self._up_to))

    def note(self, kind: str, step: int) -> None:
        """Keep that the tracker was told a step."""
        self._record.note(self._tracker, kind, step)
