"""The faults that apply to a plain lightning-hydra style loop, for its figures beside ours."""

from __future__ import annotations

import io
import os
import pickle
import time
import zipfile
from dataclasses import replace
from pathlib import Path

from benchmarks.faults import disk, locks, signals, surroundings
from benchmarks.faults.damage import YEAR, Canary, flip_bit
from benchmarks.faults.fault import Fault, Hurt, Story, begun, damaged, refused, survives
from benchmarks.faults.inputs import cut, latin, other_answer
from benchmarks.faults.jobs import INTERVAL, PLAIN
from benchmarks.faults.scene import Scene

LAST = "last.ckpt"
# Faults of ours whose stories ask nothing of a run but to be started, watched and stopped.
SHARED = (
    "kill while importing", "kill at first step", "kill in checkpoint", "kill after checkpoint", "kill in export", "kill twice",
    "term at first step", "term in checkpoint", "term twice", "interrupt at a step", "terminal gone", "paused",
    "out of CPU time", "files may not grow", "disk nearly full", "disk full", "nothing may be made", "other hash seed",
    "other place on earth", "other working directory",
)  # fmt: skip


def _on_last(change: str) -> Hurt:
    def hurt(scene: Scene) -> None:
        file = scene.run / "checkpoints" / LAST
        if change == "flip":
            flip_bit(file)
        elif change == "cut":
            os.truncate(file, file.stat().st_size // 2)
        else:
            file.unlink()

    return hurt


def _other_times(scene: Scene) -> None:
    """A checkpoint of long ago has a time to come, as after a clock that was set back."""
    folder = scene.run / "checkpoints"
    earlier = scene.clean.parent.parent / "interrupted-plain-early" / "run" / "checkpoints" / LAST
    (folder / "last-v1.ckpt").write_bytes(earlier.read_bytes())
    os.utime(folder / "last-v1.ckpt", (time.time() + YEAR, time.time() + YEAR))


def _evil(scene: Scene) -> None:
    file = scene.run / "checkpoints" / LAST
    (scene.folder / "kept").write_bytes(file.read_bytes())
    memory = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(memory, "w") as new:
        for name in old.namelist():
            new.writestr(
                name,
                pickle.dumps(Canary(scene.folder / "canary"), protocol=2)
                if name.endswith("/data.pkl")
                else old.read(name),
            )
    file.write_bytes(memory.getvalue())


def _undo_evil(scene: Scene) -> None:
    if (scene.folder / "canary").exists():
        scene.notes.append("code of the checkpoint ran")
    (scene.run / "checkpoints" / LAST).write_bytes((scene.folder / "kept").read_bytes())


def _rows(scene: Scene) -> Path:
    return scene.folder / "rows.jsonl"


def _input(change: object, *, between: bool) -> Story:
    """Change the rows before or between starts, restore them, and start again."""

    def hurt(scene: Scene) -> None:
        (scene.folder / "rows.kept").write_bytes(_rows(scene).read_bytes())
        change(_rows(scene))  # type: ignore[operator]

    def undo(scene: Scene) -> None:
        _rows(scene).write_bytes((scene.folder / "rows.kept").read_bytes())

    return refused(hurt, undo) if between else begun(hurt, undo)


def _diverging() -> Story:
    def play(scene: Scene) -> None:
        scene.end(scene.start(*(["model.lr=1e30", "trainer.gradient_clip_val=null"] if scene.armed else [])))
        scene.forget()
        scene.end(scene.start("ckpt_path=null"))

    return Story("start, then start over", play)


def _no_gpu() -> Story:
    def play(scene: Scene) -> None:
        scene.environment |= {"CUDA_VISIBLE_DEVICES": ""}
        scene.end(scene.start(*(["trainer.accelerator=gpu"] if scene.armed else [])))
        scene.end(scene.start())

    return Story("start, then start again", play)


OWN_FAULTS = [
    Fault("checkpoint bit flipped", "one bit of the newest checkpoint", damaged(_on_last("flip")), survives(0)),
    Fault("checkpoint cut", "half of the newest checkpoint is gone", damaged(_on_last("cut")), survives(0)),
    Fault("checkpoint missing", "the newest checkpoint is gone", damaged(_on_last("unlink")), survives(0)),
    Fault("clock a year off", "an early checkpoint from next year", damaged(_other_times), survives(0, may_lose=0)),
    Fault("evil checkpoint", "code in the newest checkpoint", refused(_evil, _undo_evil), survives(10, 0, may_lose=0)),
    Fault("rows cut", "the data file ends within a row", _input(cut, between=False), survives(3, 0, may_lose=0)),
    Fault("rows in latin-1", "three rows are no UTF-8", _input(latin, between=False), survives(3, 0, may_lose=0)),
    Fault(
        "rows changed",
        "40 answers changed between two starts",
        _input(other_answer, between=True),
        survives(4, 0, may_lose=0),
    ),
    Fault("diverging", "a learning rate of 1e30", _diverging(), survives(6, 0, may_lose=0)),
    Fault("no GPU", "a GPU is asked for where none is to be seen", _no_gpu(), survives(5, 0, may_lose=0)),
    Fault("second start", "the same run is started again at step 3", locks.second_start(), survives(9, 0, may_lose=0)),
]


def plain_faults() -> list[tuple[str, Fault]]:
    """Return the faults for the plain loop: any exit code but 0 is a right refusal there, and messages are not judged."""
    ours = [fault for module in (signals, disk, surroundings) for fault in module.FAULTS if fault.name in SHARED]
    return [("plain", _lenient(fault)) for fault in (*ours, *OWN_FAULTS)]


def _lenient(fault: Fault) -> Fault:
    promise = replace(fault.promise, lenient=True, says=(), may_lose=max(fault.promise.may_lose, INTERVAL))
    return replace(fault, name=f"plain {fault.name}", promise=promise, job=PLAIN, broken="", cold=fault.cold)
