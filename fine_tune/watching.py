"""Who follows a run from outside: told where it lives and what its validations found, and able to stop it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class Pruned(Exception):
    """A search has seen enough of a run."""


class Watcher:
    """Follows one run; this one does nothing."""

    def opened(self, folder: Path) -> None:
        """The run has its folder."""

    def validated(self, step: int, values: Mapping[str, float]) -> None:
        """A validation found values, by their names in metrics.jsonl.

        Raises:
            Pruned: The run is to stop.
        """
