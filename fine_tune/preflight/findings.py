"""What stands in a run's way, collected so that all of it is told at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fine_tune.errors import FineTuneError, SeveralProblems
from fine_tune.interrupts import Interrupted


class Findings:
    """Collects the errors of checks that do not depend on each other.

    Attributes:
        looked_at: Names of the checks that ran, in their order.
        problems: What they refused.

    Example:
        >>> from fine_tune.errors import DataError
        >>> findings = Findings()
        >>> with findings.of("data"):
        ...     raise DataError("no row is left")
        >>> findings.refuse()
        Traceback (most recent call last):
        fine_tune.errors.DataError: no row is left
    """

    def __init__(self) -> None:
        self.looked_at: list[str] = []
        self.problems: list[FineTuneError] = []

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Run one check; what it refuses is kept for later."""
        self.looked_at.append(name)
        try:
            yield
        except Interrupted:
            raise
        except FineTuneError as problem:
            # Two checks may meet the same file.
            if str(problem) not in map(str, self.problems):
                self.problems.append(problem)

    def refuse(self) -> None:
        """Raise what was found: one problem as it is, several together."""
        if len(self.problems) == 1:
            raise self.problems[0]
        if self.problems:
            raise SeveralProblems(self.problems) from self.problems[0]
