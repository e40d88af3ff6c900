"""Faults of a preference run: its reference must be the one it began with, or nothing."""

from __future__ import annotations

import shutil
import signal

from benchmarks.faults.damage import flip_bit
from benchmarks.faults.fault import KILLED, Fault, Story, refused, survives
from benchmarks.faults.jobs import DPO
from benchmarks.faults.moments import step
from benchmarks.faults.scene import Scene

REFERENCE = "reference/values.safetensors"


def _start_deleted() -> Story:
    """Kill the run, delete the adapter that it started from and is measured against, and go on."""

    def play(scene: Scene) -> None:
        process = scene.start()
        scene.reach(step(5), process)
        scene.hit(process, signal.SIGKILL)
        scene.end(process)
        scene.damage(lambda: shutil.rmtree(scene.folder / "sft"))
        scene.end(scene.again())

    return Story("start, then start again", play)


def _flip(scene: Scene) -> None:
    shutil.copy(scene.run / REFERENCE, scene.folder / "reference.kept")
    flip_bit(scene.run / REFERENCE)


def _remove(scene: Scene) -> None:
    shutil.move(scene.run / REFERENCE, scene.folder / "reference.kept")


def _restore(scene: Scene) -> None:
    shutil.copy(scene.folder / "reference.kept", scene.run / REFERENCE)


FAULTS = [
    Fault(
        "start deleted",
        "killed at step 5, and init_from= is deleted",
        _start_deleted(),
        survives(KILLED, 0),
        "fresh_reference",
        DPO,
    ),
    Fault(
        "reference flipped",
        "one bit of the reference",
        refused(_flip, _restore),
        survives(4, 0, may_lose=0, says=("reference",)),
        "fresh_reference",
        DPO,
    ),
    Fault(
        "reference missing",
        "the reference is gone",
        refused(_remove, _restore),
        survives(4, 0, may_lose=0, says=("reference",)),
        "fresh_reference",
        DPO,
    ),
]
