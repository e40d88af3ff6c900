"""Faults of an evaluation: stopped, damaged or met by another; the items end the same, byte for byte."""

from __future__ import annotations

import os
import signal

from benchmarks.faults.fault import KILLED, Fault, Hurt, Story, stopped, stopped_each, survives
from benchmarks.faults.jobs import EVALUATE, EVALUATED, answered
from benchmarks.faults.moments import Moment, until
from benchmarks.faults.nursery import Process
from benchmarks.faults.scene import Scene


def chunks(number: int) -> Moment:
    """So many chunks of answers are on disk."""

    def moment(process: Process, run: object) -> None:
        until(lambda: answered(run) >= number, process)  # type: ignore[arg-type]

    return moment


def then(hurt: Hurt, number: int = 3) -> Story:
    """Kill an evaluation after some chunks, do something to its files, and start it again."""

    def play(scene: Scene) -> None:
        process = scene.start()
        scene.reach(chunks(number), process)
        scene.hit(process, signal.SIGKILL)
        scene.end(process)
        scene.damage(lambda: hurt(scene))
        scene.end(scene.again())

    return Story("start, then start again", play)


def finished(hurt: Hurt) -> Story:
    """Damage a finished evaluation and start it again."""

    def play(scene: Scene) -> None:
        scene.end(scene.start())
        scene.damage(lambda: hurt(scene))
        scene.end(scene.again())

    return Story("start, then start again", play)


def _half_line(scene: Scene) -> None:
    with (scene.run / EVALUATED / "partial.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"chunk": 3, "lines": [{"id": "x", "compl')


def _cut_items(scene: Scene) -> None:
    file = scene.run / EVALUATED / "items.jsonl"
    os.truncate(file, file.stat().st_size // 2)


def _second() -> Story:
    def play(scene: Scene) -> None:
        process = scene.start()
        if scene.armed:
            chunks(2)(process, scene.run)
            scene.end(scene.again())
        scene.end(process)
        if not scene.armed:
            scene.end(scene.again())

    return Story("start, then start again", play)


FAULTS = [
    Fault(
        "answers killed",
        "SIGKILL after three chunks of answers",
        stopped(chunks(3), signal.SIGKILL),
        survives(KILLED, 0, may_lose=1),
        "answers_forgotten",
        EVALUATE,
    ),
    Fault(
        "answers killed twice",
        "SIGKILL after two chunks, and after six",
        stopped_each((chunks(2), signal.SIGKILL), (chunks(6), signal.SIGKILL)),
        survives(KILLED, KILLED, 0, may_lose=1),
        "answers_forgotten",
        EVALUATE,
    ),
    Fault(
        "answers terminated",
        "SIGTERM after three chunks",
        stopped(chunks(3), signal.SIGTERM),
        survives(143, 0, may_lose=1, says=("stopped",)),
        "deaf",
        EVALUATE,
    ),
    Fault(
        "half an answer",
        "killed, and the last line of the chunks is cut",
        then(_half_line),
        survives(KILLED, 0, may_lose=1),
        "strict_answers",
        EVALUATE,
    ),
    Fault(
        "answers cut",
        "items.jsonl of a finished evaluation is cut",
        finished(_cut_items),
        survives(0, 0, may_lose=12),
        "any_answers",
        EVALUATE,
    ),
    Fault(
        "second evaluation",
        "the same evaluation is started at once again",
        _second(),
        survives(9, 0, may_lose=0, says=("in use",)),
        "unlocked",
        EVALUATE,
    ),
]
