"""What a fault is: a story that is played in a scene, how it has to end, and the protection whose absence must be noticed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.faults.jobs import INTERVAL, SFT, Job
from benchmarks.faults.judge import Promise
from benchmarks.faults.moments import Moment
from benchmarks.faults.scene import Scene

Play = Callable[[Scene], None]
Hurt = Callable[[Scene], None]
KILLED, OUT_OF_TIME, HUNG_UP = -9, -24, -1


@dataclass(frozen=True)
class Story:
    """What happens, in order.

    Attributes:
        kind: Stories of one kind are the same without their fault, and share a clean-run control.
        play: Plays it.
        from_interrupted: It begins with a run that was killed after a checkpoint.
    """

    kind: str
    play: Play
    from_interrupted: bool = False


@dataclass(frozen=True)
class Fault:
    """A named fault.

    Attributes:
        name: Its name.
        what: What happens, for people.
        story: How it is played.
        promise: How it has to end.
        broken: The protection to take out in the broken-on-purpose control, a name of ``broken.VARIANTS``; empty where none can
            be taken out: the results are then tampered with, which shows the judge alone.
        job: What is run.
        cold: Everything is imported anew, as at a prompt.
        needs_root: It mounts a small file system.
    """

    name: str
    what: str
    story: Story
    promise: Promise
    broken: str = ""
    job: Job = SFT
    cold: bool = False
    needs_root: bool = False


def stopped(moment: Moment, *signals: int, apart: float = 0.0) -> Story:
    """Start, send signals at a moment, and start again."""

    def play(scene: Scene) -> None:
        process = scene.start()
        scene.reach(moment, process)
        scene.hit(process, *signals, apart=apart)
        scene.end(process)
        scene.end(scene.again())

    return Story("start, then start again", play)


def stopped_each(*hits: tuple[Moment, int]) -> Story:
    """Start and be stopped, several times over, and start a last time."""

    def play(scene: Scene) -> None:
        process = scene.start()
        for moment, number in hits:
            scene.reach(moment, process)
            scene.hit(process, number)
            scene.end(process)
            process = scene.again()
        scene.end(process)

    return Story(f"start, then start {len(hits)} times again", play)


def while_running(moment: Moment, act: Callable[[Scene, int], None], kind: str = "start, then start again") -> Story:
    """Start, do something to the process (given by its id) at a moment, and start again."""

    def play(scene: Scene) -> None:
        process = scene.start()
        scene.reach(moment, process)
        scene.damage(lambda: act(scene, process.pid))
        scene.end(process)
        scene.end(scene.again())

    return Story(kind, play)


def damaged(hurt: Hurt) -> Story:
    """Go on with an interrupted run to whose files something was done."""

    def play(scene: Scene) -> None:
        scene.bring()
        scene.damage(lambda: hurt(scene))
        scene.end(scene.again())

    return Story("go on", play, from_interrupted=True)


def refused(hurt: Hurt, undo: Hurt) -> Story:
    """Go on after something was done, which is refused; undo it and go on. Nothing may be lost by the refusal."""

    def play(scene: Scene) -> None:
        scene.bring()
        scene.damage(lambda: hurt(scene))
        before = scene.hashes("checkpoints/*/*", "metrics.jsonl")
        scene.end(scene.again())
        if scene.armed and scene.variant is None and scene.hashes("checkpoints/*/*", "metrics.jsonl") != before:
            scene.notes.append("the refused start changed checkpoints or metrics")
        scene.damage(lambda: undo(scene))
        scene.end(scene.again())

    return Story("go on, then go on again", play, from_interrupted=True)


def begun(hurt: Hurt, undo: Hurt | None = None, *words: str) -> Story:
    """Start after something was done, which is refused; undo it and start again.

    Args:
        hurt: What is done before.
        undo: What makes it good.
        words: Further words of the first start, which are part of the fault.
    """

    def play(scene: Scene) -> None:
        scene.job.words(scene)
        scene.damage(lambda: hurt(scene))
        scene.end(scene.start(*(words if scene.armed else ())))
        if undo is not None:
            scene.damage(lambda: undo(scene))
        scene.end(scene.again())

    return Story("start, then start again", play)


def survives(*codes: int | Sequence[int], may_lose: int = INTERVAL, says: Sequence[str] = ()) -> Promise:
    """The starts end with these codes, and the last with the clean run's results."""
    return Promise([(code,) if isinstance(code, int) else code for code in codes], may_lose, says)
