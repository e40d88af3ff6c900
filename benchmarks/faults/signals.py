"""Faults that signals are: a process killed, asked to stop, stopped for a while or out of time, at every kind of moment."""

from __future__ import annotations

import os
import resource
import signal
import time

from benchmarks.faults.fault import (
    HUNG_UP,
    KILLED,
    OUT_OF_TIME,
    Fault,
    Story,
    stopped,
    stopped_each,
    survives,
    while_running,
)
from benchmarks.faults.moments import after, exporting, loading, saved, step, validating, writing
from benchmarks.faults.scene import Scene

KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
# Before the run takes signals over, the shell's own answer is 128 + 15 and 128 + 2 as well.
IMPORTING_TERM, IMPORTING_INT = (143, -15), (130, -2)
ASKED = ("stopped",)


def _pause(scene: Scene, pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(3.0)
    os.kill(pid, signal.SIGCONT)


def _out_of_time(scene: Scene, pid: int) -> None:
    used = sum(float(word) for word in _stat(pid)[11:13]) / os.sysconf("SC_CLK_TCK")
    resource.prlimit(pid, resource.RLIMIT_CPU, (int(used) + 1, resource.RLIM_INFINITY))


def _stat(pid: int) -> list[str]:
    with open(f"/proc/{pid}/stat", encoding="ascii") as stream:
        return stream.read().rpartition(")")[2].split()


def kill_all(processes: list[int]) -> None:
    """Send SIGKILL to processes."""
    for process in processes:
        os.kill(process, KILL)


def _unread() -> Story:
    """Print into a pipe whose reader leaves at step 3."""

    def play(scene: Scene) -> None:
        pipe = scene.folder / "pipe"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        scene.out = str(pipe)
        process = scene.start()
        scene.reach(step(3), process)
        scene.damage(lambda: os.close(reader))
        scene.end(process)
        if not scene.armed:
            os.close(reader)
        scene.out = os.devnull
        scene.end(scene.again())

    return Story("start, then start again", play)


def _worker_killed() -> Story:
    def play(scene: Scene) -> None:
        process = scene.start("trainer.num_workers=1")
        scene.reach(step(3), process)
        scene.damage(lambda: kill_all(process.children()))
        scene.end(process)
        scene.end(scene.again())

    return Story("start with a worker, then start again", play)


FAULTS = [
    Fault(
        "kill while importing",
        "SIGKILL 1 s after the start",
        stopped(after(1.0), KILL),
        survives(KILLED, 0, may_lose=0),
        cold=True,
    ),
    Fault(
        "kill while loading",
        "SIGKILL while the model is loaded",
        stopped(loading, KILL),
        survives(KILLED, 0, may_lose=0),
    ),
    Fault("kill at first step", "SIGKILL after step 1", stopped(step(1), KILL), survives(KILLED, 0), "uncut"),
    Fault(
        "kill in checkpoint",
        "SIGKILL while a checkpoint is half written",
        stopped(writing(4), KILL),
        survives(KILLED, 0),
        "in_place",
    ),
    Fault(
        "kill after checkpoint",
        "SIGKILL right after a checkpoint",
        stopped(saved(6), KILL),
        survives(KILLED, 0),
        "forgetful",
    ),
    Fault(
        "kill in validation", "SIGKILL within a validation", stopped(validating(6), KILL), survives(KILLED, 0), "uncut"
    ),
    Fault(
        "kill in export",
        "SIGKILL while the adapter is exported",
        stopped(exporting, KILL),
        survives(KILLED, 0, may_lose=0),
        "exported_once",
    ),
    Fault(
        "kill twice",
        "SIGKILL after step 3, gone on with, SIGKILL after step 7",
        stopped_each((step(3), KILL), (step(7), KILL)),
        survives(KILLED, KILLED, 0),
        "forgetful",
    ),
    Fault(
        "term while importing",
        "SIGTERM 1 s after the start",
        stopped(after(1.0), TERM),
        survives(IMPORTING_TERM, 0, may_lose=0),
        cold=True,
    ),
    Fault(
        "term while loading",
        "SIGTERM while the model is loaded",
        stopped(loading, TERM),
        survives(143, 0, may_lose=0, says=ASKED),
        "deaf",
    ),
    Fault(
        "term at first step",
        "SIGTERM after step 1",
        stopped(step(1), TERM),
        survives(143, 0, may_lose=0, says=ASKED),
        "deaf",
    ),
    Fault(
        "term in checkpoint",
        "SIGTERM while a checkpoint is half written",
        stopped(writing(4), TERM),
        survives(143, 0, may_lose=0, says=ASKED),
        "deaf",
    ),
    Fault(
        "term in validation",
        "SIGTERM within a validation",
        stopped(validating(6), TERM),
        survives(143, 0, may_lose=0, says=ASKED),
        "deaf",
    ),
    Fault(
        "term in export",
        "SIGTERM while the adapter is exported",
        stopped(exporting, TERM),
        survives(143, 0, may_lose=0, says=ASKED),
        "deaf",
    ),
    Fault(
        "term twice",
        "SIGTERM twice within half a second, at step 3",
        stopped(step(3), TERM, TERM, apart=0.05),
        survives(143, 0, may_lose=0, says=ASKED),
        "deaf",
    ),
    Fault(
        "interrupt while importing",
        "Ctrl-C 1 s after the start",
        stopped(after(1.0), INT),
        survives(IMPORTING_INT, 0, may_lose=0),
        cold=True,
    ),
    Fault(
        "interrupt while loading",
        "Ctrl-C while the model is loaded",
        stopped(loading, INT),
        survives(130, 0, may_lose=0, says=ASKED),
        "deaf_and_silent",
    ),
    Fault(
        "interrupt at a step",
        "Ctrl-C after step 3",
        stopped(step(3), INT),
        survives(130, 0, may_lose=0, says=ASKED),
        "deaf",
    ),
    Fault(
        "interrupt twice",
        "Ctrl-C twice at step 3: at once, unsaved",
        stopped(step(3), INT, INT, apart=0.03),
        survives(130, 0, says=ASKED),
        "deaf",
    ),
    Fault("terminal gone", "SIGHUP after step 3", stopped(step(3), signal.SIGHUP), survives(HUNG_UP, 0), "forgetful"),
    Fault(
        "paused",
        "stopped for 3 s at step 3 (SIGSTOP, SIGCONT)",
        while_running(step(3), _pause),
        survives(0, 0, may_lose=0),
    ),
    Fault(
        "out of CPU time",
        "a CPU-time limit (SIGXCPU) at step 3",
        while_running(step(3), _out_of_time),
        survives(OUT_OF_TIME, 0),
        "forgetful",
    ),
    Fault(
        "nobody reads",
        "stdout is a pipe that is closed at step 3, as by `| head`",
        _unread(),
        survives(0, 0, may_lose=0),
        "silent_end",
    ),
    Fault(
        "data worker killed",
        "SIGKILL to the data worker at step 3",
        _worker_killed(),
        survives(5, 0, says=("worker",)),
        "quiet_worker",
    ),
]
