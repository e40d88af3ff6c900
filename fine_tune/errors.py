"""Errors a user can meet, each with the exit code that the entry points return for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class FineTuneError(Exception):
    """A problem that is told in one message, without a traceback."""

    exit_code = 1


class ConfigError(FineTuneError, ValueError):
    """One or more config values are refused; all of them are reported together."""

    exit_code = 2

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{len(self.problems)} problem(s) in the config:\n{lines}")


class ChecklistFailed(FineTuneError):
    """What a run proves about itself at its first steps does not hold."""

    exit_code = 2

    def __init__(self, failed: Sequence[str]) -> None:
        self.failed = list(failed)
        lines = "\n".join(f"  - {one}" for one in failed)
        super().__init__(
            f"the checklist of the first steps failed:\n{lines}\nNothing was saved since. If this is meant, pass "
            "trainer.checklist=false."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes, as launchers send it."""
        return type(self), (self.failed,)


class DataError(FineTuneError, ValueError):
    """Rows are unreadable, missing or lost past the stated share."""

    exit_code = 3


class CheckpointError(FineTuneError):
    """A checkpoint or adapter is missing, damaged, or belongs to another base."""

    exit_code = 4


class EnvironmentProblem(FineTuneError):
    """The machine lacks what the config asks for: a device, a package, access to the hub."""

    exit_code = 5


class NonFiniteError(FineTuneError):
    """The loss or the gradient is not finite; the last good checkpoint is kept."""

    exit_code = 6


class MemoryExhausted(FineTuneError):
    """The device ran out of memory at the smallest micro-batch."""

    exit_code = 7


class StorageError(FineTuneError):
    """Writing failed; earlier checkpoints are untouched."""

    exit_code = 8


class RunLocked(FineTuneError):
    """Another live process owns the run folder."""

    exit_code = 9


class UnsafeArtifact(FineTuneError):
    """A file from elsewhere asks for code execution or another unsafe load."""

    exit_code = 10


class SeveralProblems(FineTuneError):
    """Several things stand in the way of a run; all are told, and the exit code is that of the first.

    Args:
        problems: What was found, in the order in which it was looked for.
    """

    # Of each problem; its error.log has the rest.
    MAX_LINES = 6

    def __init__(self, problems: Sequence[FineTuneError]) -> None:
        self.problems = list(problems)
        self.exit_code = problems[0].exit_code
        told = "\n".join(line for problem in problems for line in self._lines(problem))
        super().__init__(f"{len(problems)} problems, found before anything was loaded:\n{told}")

    @classmethod
    def _lines(cls, problem: FineTuneError) -> list[str]:
        if isinstance(problem, ConfigError):
            return [f"  - {one}" for one in problem.problems]
        first, *more = str(problem).splitlines()
        left = len(more) - (cls.MAX_LINES - 1)
        shown = more if left <= 0 else [*more[: cls.MAX_LINES - 2], f"  ... and {left + 1} more lines"]
        return [f"  - {first}", *(f"  {line}" for line in shown)]

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes, as launchers send it."""
        return type(self), (self.problems,)
