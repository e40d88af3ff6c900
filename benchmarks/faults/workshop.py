"""What all faults share: the clean runs, an interrupted one of each kind, and how a fault is played and judged."""

from __future__ import annotations

import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.faults.damage import flip_bit
from benchmarks.faults.fault import Fault, Story
from benchmarks.faults.jobs import DPO, EVALUATE, EVALUATED, OWN, PLAIN, SFT, Job
from benchmarks.faults.judge import Promise, Verdict, answer_differences, differences, judge, plain_differences
from benchmarks.faults.moments import Missed, last_step, saved
from benchmarks.faults.nursery import NOT_BROKEN, Nursery
from benchmarks.faults.scene import Scene

# The step after whose checkpoint the interrupted runs were killed.
INTERRUPTED_AT, EARLY = 8, 4
EXPORTED = "adapter/adapter_model.safetensors"


class Workshop:
    """A folder of scenes, and the clean runs that they are measured by.

    Args:
        folder: Where everything goes.
        nursery: Starts programs.
    """

    def __init__(self, folder: Path, nursery: Nursery) -> None:
        self.folder, self.nursery = folder, nursery
        self._left: dict[str, Path] = {}
        folder.mkdir(parents=True)

    def prepare(self, jobs: set[str]) -> None:
        """Do the clean runs and interrupt one of each kind; the first has its imports taken over by all later processes."""
        for job in (SFT, OWN, DPO, EVALUATE, PLAIN):
            # What others start from, or are asked of.
            needed = {SFT.name} if jobs & {DPO.name, EVALUATE.name} else set()
            if job.name not in jobs | needed:
                continue
            scene = self.scene(f"clean-{job.name}", job)
            modules = scene.folder / "modules.txt"
            scene.environment["FAULTS_MODULES"] = str(modules)
            end = scene.end(scene.start())
            if end.code != 0:
                sys.exit(f"the clean run of {job.name} failed: {end.said}")
            self.nursery.preload(modules)
            if job is not EVALUATE:
                self._interrupt(job, INTERRUPTED_AT)
            if job is PLAIN:
                self._interrupt(job, EARLY, "-early")

    def _interrupt(self, job: Job, number: int, more: str = "") -> None:
        for _ in range(5):
            scene = self.scene(f"interrupted-{job.name}{more}", job)
            process = scene.start()
            saved(number)(process, scene.run)
            process.send(signal.SIGKILL)
            process.wait()
            scene.end(process)
            if last_step(scene.run) == number:
                return
            shutil.rmtree(scene.folder)
        sys.exit(f"{job.name}: no run could be killed between step {number} and the next")

    def scene(self, name: str, job: Job) -> Scene:
        """Make a scene with a folder of its own."""
        folder = self.folder / name.replace(" ", "-")
        folder.mkdir()
        interrupted = self.folder / f"interrupted-{job.name}" / "run"
        clean = self.folder / f"clean-{job.name}" / "run"
        return Scene(folder, job, self.nursery, clean=clean, interrupted=interrupted if interrupted.is_dir() else None)

    def play(self, fault: Fault, name: str, *, armed: bool = True, broken: bool = False) -> Verdict:
        """Play a fault in a scene of its own and judge how it ended.

        Args:
            fault: What is played.
            name: Of the scene.
            armed: Whether the fault happens.
            broken: With the fault's protection taken out.

        Raises:
            Missed: Its moment did not come.
        """
        scene = self.scene(name, fault.job)
        scene.armed, scene.cold, scene.variant = armed, fault.cold, fault.broken if broken else None
        promise = fault.promise if armed else _unharmed(fault.promise)
        try:
            fault.story.play(scene)
        except TimeoutError as error:
            scene.notes.append(f"it hung: {error}")
        finally:
            scene.close()
        if armed and not broken:
            self._left[fault.name] = scene.results or scene.run
        return self._judge(scene, promise)

    def _judge(self, scene: Scene, promise: Promise) -> Verdict:
        codes, told = [end.code for end in scene.ends], [end.said for end in scene.ends]
        if NOT_BROKEN in codes:
            raise Missed(f"the protection {scene.variant} was not taken out: {told[-1][-300:]}")
        found = compare(scene.job, scene.results or scene.run, scene.clean)
        return judge(promise, codes, told, losses=scene.losses, differences=found, notes=scene.notes)

    def unharmed(self, variant: str, job: Job, *, cold: bool) -> Verdict:
        """Play no fault at all with a protection taken out: the program must still be the same program."""

        def play(scene: Scene) -> None:
            scene.end(scene.start())

        fault = Fault(variant, "", Story("start", play), Promise([(0,)]), variant, job, cold)
        return self.play(fault, f"unharmed-{variant}", broken=True)

    def tampered(self, fault: Fault, name: str) -> Verdict:
        """Change one bit of what a fault left and judge that."""
        scene = self.scene(name, fault.job)
        shutil.copytree(self._left[fault.name], scene.run)
        flip_bit(scene.run / (f"{EVALUATED}/items.jsonl" if fault.job is EVALUATE else EXPORTED))
        return judge(Promise([(0,)]), [0], [""], losses=[], differences=compare(fault.job, scene.run, scene.clean))


def compare(job: Job, run: Path, clean: Path) -> list[str] | None:
    """Compare what a scene left with what the clean run of its job did."""
    if job is EVALUATE:
        return answer_differences(run / EVALUATED, clean / EVALUATED)
    return plain_differences(run, clean) if job is PLAIN else differences(run, clean)


def _unharmed(promise: Promise) -> Promise:
    """Return what is promised where the fault does not happen: every start ends well, and nothing is lost."""
    return replace(promise, codes=[(0,)] * len(promise.codes), may_lose=0, says=())
