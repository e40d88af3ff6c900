"""One performance of a fault: its folder, what was started in it, and how each start ended."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.jobs import Job
from benchmarks.faults.moments import Moment, last_step
from benchmarks.faults.nursery import ROOT, Nursery, Process


@dataclass
class End:
    """How one start ended: exit code, what it told on stderr, steps done, seconds."""

    code: int
    said: str
    done: int
    seconds: float


@dataclass
class Scene:
    """A folder of its own in which a fault is played.

    Attributes:
        folder: Everything of this scene.
        job: What is run.
        nursery: Starts programs.
        variant: The protection that is taken out; None for the programs as they are.
        armed: False in the clean-run control: everything happens but the fault.
        clean: The clean run's folder.
        interrupted: The folder of a run that was killed after a checkpoint; None for jobs without one.
        ends: How each start ended.
        losses: Steps that each start did again.
        notes: What must not have happened and did; empty when all is well.
        environment: Variables that are set for what is started.
        cwd: Where it is started.
        cold: Everything is imported anew.
        out: Where what it prints on stdout goes.
        results: The folder to be judged; None for the run's.
        started: Every process of the scene.
    """

    folder: Path
    job: Job
    nursery: Nursery
    clean: Path
    interrupted: Path | None = None
    variant: str | None = None
    armed: bool = True
    ends: list[End] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    losses: list[int] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    cwd: Path = ROOT
    cold: bool = False
    out: str = os.devnull
    results: Path | None = None
    started: list[Process] = field(default_factory=list)
    _done_before: int = 0
    _watches: dict[int, _Watch] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    def bring(self) -> None:
        """Put the interrupted run here, as its own."""
        assert self.interrupted is not None
        self.job.words(self)
        shutil.copytree(self.interrupted, self.run)
        self._done_before = last_step(self.run)
        # What it reads lies beside it.
        config = self.run / "config.yaml"
        if config.is_file():
            text = config.read_text(encoding="utf-8")
            config.write_text(text.replace(str(self.interrupted.parent), str(self.folder)), encoding="utf-8")

    def start(self, *words: str) -> Process:
        """Start the job anew, with further words."""
        return self.launch([*self.job.words(self), *words])

    def start_over(self, *words: str) -> Process:
        """Start the job anew in place of what is there; nothing of that is lost by it."""
        self.forget()
        return self.start("overwrite=true", *words)

    def forget(self) -> None:
        """Count no step done so far: what follows does not go on with them."""
        self._done_before = 0

    def again(self, *words: str) -> Process:
        """Start what a user starts next: go on where there is something to go on with, else the same again."""
        if self.job.resumes and (self.run / "config.yaml").is_file():
            return self.launch([self.job.script, f"resume={self.run}", *words])
        return self.start(*words)

    def launch(self, words: Sequence[str]) -> Process:
        """Start a script of the repository with its words."""
        log = self.folder / f"start{len(list(self.folder.glob('start*.err')))}"
        watch = _Watch(self.run / self.job.progress, lambda: self.job.done(self.run), before=self._done_before)
        process = self.nursery.start(
            list(words),
            log,
            out=self.out,
            environment=self.environment,
            cwd=self.cwd,
            variant=self.variant,
            cold=self.cold,
        )
        self._watches[process.pid] = watch
        self.started.append(process)
        return process

    def end(self, process: Process, seconds: float = 400.0) -> End:
        """Wait for a start to end, and write down how, and what it did again."""
        code = process.wait(seconds)
        watch = self._watches.pop(process.pid)
        if (went_on_from := watch.stop()) is not None:
            self.losses.append(max(0, watch.before - went_on_from))
        end = End(code, process.said(), self.job.done(self.run), process.seconds)
        self._done_before = end.done
        self.ends.append(end)
        return end

    def look_again(self) -> None:
        """Take the steps done from the run's folder as it is now, where it was away when a start ended."""
        self._done_before = self.job.done(self.run)

    def reach(self, moment: Moment, process: Process) -> None:
        """Wait for a moment, in the armed scene."""
        if self.armed:
            moment(process, self.run)

    def hit(self, process: Process, *numbers: int, apart: float = 0.0) -> None:
        """Send signals, in the armed scene; a process that a moment has stopped goes on to receive them."""
        if not self.armed:
            return
        for number in numbers:
            process.send(number)
            time.sleep(apart)
        process.send(signal.SIGCONT)

    def damage(self, what: Callable[[], object]) -> None:
        """Do something to files, in the armed scene."""
        if self.armed:
            what()

    def close(self) -> None:
        """End whatever still runs."""
        for process in self.started:
            process.send(signal.SIGKILL)
            with suppress(TimeoutError):
                process.wait()

    def keep_results(self) -> None:
        """Copy the run to where it stays."""
        self.results = self.folder / "kept"
        shutil.copytree(self.run, self.results, ignore=shutil.ignore_patterns("ballast"))

    def hashes(self, *patterns: str) -> dict[str, str]:
        """Hash files of the run."""
        files = sorted(file for pattern in patterns for file in self.run.glob(pattern) if file.is_file())
        return {str(file.relative_to(self.run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class _Watch:
    """Look at a file that every start replaces: what it tells when it is new is where that start went on from."""

    def __init__(self, file: Path, told: Callable[[], int], *, before: int) -> None:
        self._file, self._told, self.before = file, told, before
        self._found: int | None = None
        self._before = self._inode()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _inode(self) -> int | None:
        return self._file.stat().st_ino if self._file.exists() else None

    def _follow(self) -> None:
        while not self._stop.wait(0.01) and self._found is None:
            if (now := self._inode()) is not None and now != self._before:
                self._found = self._told()

    def stop(self) -> int | None:
        """Stop looking; return the step that was gone on from, None where the file was not touched."""
        self._stop.set()
        self._thread.join()
        return self._found
