"""A process that evaluates in children and kills them: at a named place, or after so many calls of Python.

Everything is imported once, so a kill costs what an evaluation costs. Run as a script with a list of kills and the words.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fine_tune.cli.evaluate import main
from fine_tune.evaluation import record

# A write is killed before it, when half of it is done, or behind it; a file before it gets its name.
PLACES = ("before", "inside", "behind")
LAST = ("items.jsonl", "metrics.json", "untidy", "verdict.json")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(place: str, after: int) -> None:
    """Plant a death at a place; ``after`` so many chunks of this process, where chunks are written."""
    append, unlink, replace = record._append, Path.unlink, os.replace
    seen = 0

    def appending(file: Path, values: dict[str, Any]) -> None:
        nonlocal seen
        chunk = file.name == "partial.jsonl"
        seen += chunk
        if chunk and seen > after and place == "before":
            die()
        append(file, values)
        if seen > after and place in ("inside", "behind"):
            if place == "inside":
                os.truncate(file, file.stat().st_size - 40)
            die()

    def unlinking(self: Path, missing_ok: bool = False) -> None:
        if place == "untidy" and self.name == "partial.jsonl" and (self.parent / "metrics.json").exists():
            die()
        unlink(self, missing_ok)

    def replacing(old: Path, new: Path) -> None:
        if Path(new).name == place:
            die()
        replace(old, new)

    record._append = appending
    Path.unlink = unlinking  # type: ignore[method-assign]
    os.replace = replacing  # type: ignore[assignment]


def after_calls(limit: float) -> Callable[[], int]:
    """Die at the given call of this thread, Python's own and those into C; return what tells how many there were."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        if event in ("call", "c_call"):
            calls += 1
            if calls > limit:
                die()

    sys.setprofile(count)
    return lambda: calls


def in_a_child(job: Callable[[], None]) -> bool:
    """Run a job in a child; True if it was killed."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        job()
        sys.stdout.flush()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def evaluate(words: list[str], run_dir: Path) -> None:
    if main([*words, f"run_dir={run_dir}"]) != 0:
        os._exit(1)


def kill_at_places(kills: list[tuple[str, int]], words: list[str], root: Path) -> None:
    for place, after in kills:
        killed = in_a_child(lambda place=place, after=after: (die_at(place, after), evaluate(words, root / "killed")))
        print(f"\n{'killed' if killed else 'ended'} {place} {after}", flush=True)


def kill_at_moments(moments: list[float], words: list[str], root: Path) -> None:
    """Kill at shares of an evaluation's calls; what ended before its kill is put aside, and the next one starts anew."""

    def counted() -> None:
        calls = after_calls(float("inf"))
        evaluate(words, root / "ended0")
        sys.setprofile(None)
        (root / "calls").write_text(str(calls()), encoding="utf-8")

    in_a_child(counted)
    total = int((root / "calls").read_text(encoding="utf-8"))
    for number, share in enumerate(moments, start=1):
        killed = in_a_child(lambda share=share: (after_calls(share * total), evaluate(words, root / "killed")))
        there = sorted(file.name for file in (root / "killed").rglob("*") if file.is_file())
        print(f"\n{'killed' if killed else 'ended'} at {share:.3f} of {total} calls: {there}", flush=True)
        if not killed:
            (root / "killed").rename(root / f"ended{number}")


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    place, words = Path(sys.argv[2]), sys.argv[3:]
    # What is imported on first use is imported here, and this is what all others must equal.
    evaluate(words, place / "clean")
    kill_at_places(chosen["places"], words, place)
    if (place / "killed").exists():
        evaluate(words, place / "killed")
        (place / "killed").rename(place / "ended-places")
    kill_at_moments(chosen["moments"], words, place)
    evaluate(words, place / "killed")
