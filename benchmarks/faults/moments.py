"""Moments of a run, seen from outside: by what its folder holds."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.nursery import Process

PATIENCE_SECONDS = 120.0
Moment = Callable[[Process, Path], None]


class Missed(Exception):
    """The process ended, or nothing was seen, before the moment came."""


def last_step(run: Path) -> int:
    """Return the newest step that metrics.jsonl tells of, 0 where there is none."""
    found = 0
    file = run / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        try:
            found = max(found, int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def newest_saved(run: Path) -> int:
    """Return the highest step whose checkpoint has a manifest, which is its last file; of a plain run, has its name."""
    ours = [file.parent.name for file in run.glob("checkpoints/step-*/manifest.json")]
    plain = [file.stem for file in run.glob("checkpoints/step=*.ckpt") if _is_last(file)]
    return max((int(name[len("step-") :]) for name in (*ours, *plain) if name[len("step-") :].isdigit()), default=0)


def _is_last(file: Path) -> bool:
    """A plain checkpoint is whole once the one that runs go on from was written after it."""
    last = file.with_name("last.ckpt")
    try:
        return last.stat().st_mtime_ns >= file.stat().st_mtime_ns
    except OSError:
        return False


def until(seen: Callable[[], bool], process: Process) -> None:
    """Look every few milliseconds until something is seen."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not seen():
        if not process.running():
            raise Missed(f"the process ended first (exit code {process.code}): {process.said()[-400:]}")
        if time.monotonic() > deadline:
            raise Missed(f"not seen within {PATIENCE_SECONDS:g} s")
        time.sleep(0.002)


def after(seconds: float) -> Moment:
    """Some seconds after the start."""

    def moment(process: Process, run: Path) -> None:
        until(lambda: time.monotonic() - process.started >= seconds, process)

    return moment


def loading(process: Process, run: Path) -> None:
    """The run has its folder and loads the model."""
    until((run / "manifest.json").is_file, process)


def step(number: int) -> Moment:
    """A step is done: its line is in metrics.jsonl."""

    def moment(process: Process, run: Path) -> None:
        until(lambda: last_step(run) >= number, process)

    return moment


def saved(number: int) -> Moment:
    """A step's checkpoint is whole."""

    def moment(process: Process, run: Path) -> None:
        until(lambda: newest_saved(run) >= number, process)

    return moment


def half_written(run: Path) -> list[Path]:
    """Return what a writer of checkpoints has not finished: temporary files and folders, and folders without a manifest."""
    plain = list((run.parent / "tmp").glob("tmp*"))
    return plain or [
        f for f in run.glob("checkpoints/*") if f.is_dir() and not (f / "manifest.json").is_file() and any(f.iterdir())
    ]


def writing(number: int) -> Moment:
    """A checkpoint of this step or a later one is half written; the process is stopped there, so that it stays so."""

    def moment(process: Process, run: Path) -> None:
        saved(number - 1)(process, run) if number > 1 else None
        while True:
            until(lambda: bool(half_written(run)), process)
            process.send(signal.SIGSTOP)
            time.sleep(0.02)
            if half_written(run):
                return
            process.send(signal.SIGCONT)

    return moment


def validating(number: int) -> Moment:
    """Between the update of a step and its line, which waits for the validation; the process is stopped there.

    The line comes two ordinary steps late at least, so what is under way by then is the validation.
    """

    def moment(process: Process, run: Path) -> None:
        step(number - 3)(process, run)
        first = time.monotonic()
        step(number - 1)(process, run)
        usual = (time.monotonic() - first) / 2
        second = time.monotonic()
        until(lambda: time.monotonic() - second > 1.6 * usual + 0.02, process)
        process.send(signal.SIGSTOP)
        time.sleep(0.02)
        if last_step(run) >= number:
            raise Missed("the validation was over")

    return moment


def exporting(process: Process, run: Path) -> None:
    """The last step is done and the adapter's folder is being filled."""
    until(lambda: (run / "adapter").exists() and any(os.scandir(run / "adapter")), process)
