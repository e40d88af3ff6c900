"""Faults of files between two starts of a run: checkpoints flipped, cut, missing, forged or of another time; leftovers."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import time
import zipfile
from pathlib import Path

from benchmarks.faults.fault import KILLED, Fault, Hurt, Story, damaged, refused, survives
from benchmarks.faults.moments import saved
from benchmarks.faults.scene import Scene

YEAR = 365 * 24 * 3600.0
ADAPTER, TRAINER, MANIFEST = "adapter.safetensors", "trainer.pt", "manifest.json"


def newest(scene: Scene, number: int = 1) -> Path:
    """Return the newest checkpoint of the run, or an earlier one."""
    return sorted(file.parent for file in scene.run.glob("checkpoints/step-*/manifest.json"))[-number]


def flip(name: str, number: int = 1) -> Hurt:
    """Flip one bit in the middle of a file of a checkpoint: a high bit of a number's exponent."""

    def hurt(scene: Scene) -> None:
        flip_bit(newest(scene, number) / name)

    return hurt


def flip_bit(file: Path) -> None:
    """Flip one bit in the middle of a file of 32-bit numbers that lie behind a header."""
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else 0
    place = start + (len(content) - start) // 8 * 4 + 3
    content[place] ^= 0b00000010
    file.write_bytes(bytes(content))


def cut(name: str) -> Hurt:
    """Cut a file of the newest checkpoint in half."""

    def hurt(scene: Scene) -> None:
        file = newest(scene) / name
        os.truncate(file, file.stat().st_size // 2)

    return hurt


def remove(name: str) -> Hurt:
    """Remove a file of the newest checkpoint."""

    def hurt(scene: Scene) -> None:
        (newest(scene) / name).unlink()

    return hurt


def _empty_folder(scene: Scene) -> None:
    folder = newest(scene)
    shutil.rmtree(folder)
    folder.mkdir()


def _other_step(scene: Scene) -> None:
    file = newest(scene) / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"step": 9}), encoding="utf-8")


def _all_flipped(scene: Scene) -> None:
    for file in scene.run.glob(f"checkpoints/*/{ADAPTER}"):
        flip_bit(file)


def _other_times(scene: Scene) -> None:
    for shift, folder in ((-YEAR, newest(scene)), (YEAR, newest(scene, 2))):
        for place in (*folder.iterdir(), folder):
            os.utime(place, (time.time() + shift, time.time() + shift))


def _leftovers(scene: Scene) -> None:
    half = scene.run / "checkpoints" / ".tmp-00000000-step-0000010"
    half.mkdir()
    (half / ADAPTER).write_bytes(b"half of a checkpoint")
    (scene.run / ".tmp-00000000-summary.json").write_text("{", encoding="utf-8")


def _half_line(scene: Scene) -> None:
    with (scene.run / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 9, "train/lo')


def _cut_config(scene: Scene) -> None:
    file = scene.run / "config.yaml"
    shutil.copy(file, scene.folder / "config.kept")
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[: len(lines) // 3]), encoding="utf-8")


def _restore_config(scene: Scene) -> None:
    shutil.copy(scene.folder / "config.kept", scene.run / "config.yaml")


class Canary:
    """Unpickling it makes a file, as an attack would run a program."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, ...]:
        """What unpickling calls."""
        return os.mkdir, (str(self.place),)


def _evil(scene: Scene) -> None:
    """Put code into the newest trainer.pt, and its true hash into the manifest."""
    folder = newest(scene)
    shutil.copytree(folder, scene.folder / "kept")
    file = folder / TRAINER
    memory = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(memory, "w") as new:
        for name in old.namelist():
            new.writestr(name, _evil_pickle(scene) if name.endswith("/data.pkl") else old.read(name))
    file.write_bytes(memory.getvalue())
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"][TRAINER] = {
        "sha256": hashlib.sha256(memory.getvalue()).hexdigest(),
        "bytes": len(memory.getvalue()),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _evil_pickle(scene: Scene) -> bytes:
    return pickle.dumps({"step": 8, "optimizer": Canary(scene.folder / "canary")}, protocol=2)


def _undo_evil(scene: Scene) -> None:
    if (scene.folder / "canary").exists():
        scene.notes.append("code of the checkpoint ran")
    folder = newest(scene)
    shutil.rmtree(folder)
    shutil.copytree(scene.folder / "kept", folder)


def _only_one_flipped() -> Story:
    """Kill a run right after its first checkpoint, and flip a bit of that."""

    def play(scene: Scene) -> None:
        process = scene.start()
        scene.reach(saved(2), process)
        scene.hit(process, signal.SIGKILL)
        scene.end(process)
        scene.damage(lambda: _all_flipped(scene))
        scene.end(scene.again())

    return Story("start, then start again", play)


KEPT = survives(0, may_lose=2)
FAULTS = [
    Fault("adapter bit flipped", "one bit of the newest adapter", damaged(flip(ADAPTER)), KEPT, "unhashed"),
    Fault("trainer bit flipped", "one bit of the newest trainer.pt", damaged(flip(TRAINER)), KEPT, "unhashed"),
    Fault("adapter cut", "half of the newest adapter is gone", damaged(cut(ADAPTER)), KEPT, "unhashed"),
    Fault("trainer cut", "half of the newest trainer.pt is gone", damaged(cut(TRAINER)), KEPT, "unhashed"),
    Fault("adapter missing", "the newest adapter is gone", damaged(remove(ADAPTER)), KEPT, "unforgiving"),
    Fault("trainer missing", "the newest trainer.pt is gone", damaged(remove(TRAINER)), KEPT, "unforgiving"),
    Fault("manifest missing", "the newest manifest is gone", damaged(remove(MANIFEST)), KEPT, "unforgiving"),
    Fault("manifest cut", "half of the newest manifest is gone", damaged(cut(MANIFEST)), KEPT, "unforgiving"),
    Fault("manifest of another step", "the newest manifest says step 9", damaged(_other_step), KEPT, "unhashed"),
    Fault("empty checkpoint", "the newest checkpoint is an empty folder", damaged(_empty_folder), KEPT, "unforgiving"),
    Fault(
        "earlier checkpoint flipped",
        "one bit of the one before the newest",
        damaged(flip(ADAPTER, 2)),
        survives(0, may_lose=0),
        "unforgiving",
    ),
    Fault(
        "every checkpoint flipped",
        "one bit of the only checkpoint there is",
        _only_one_flipped(),
        survives(KILLED, 0),
        "unhashed",
    ),
    Fault(
        "evil checkpoint",
        "code in trainer.pt, its hash in the manifest",
        refused(_evil, _undo_evil),
        survives(10, 0, may_lose=0),
        "unpickled",
    ),
    Fault(
        "clock a year off",
        "newest checkpoint a year old, the one before from next year",
        damaged(_other_times),
        survives(0, may_lose=0),
        "by_mtime",
    ),
    Fault(
        "leftovers",
        "temporary files and folders of a killed writer",
        damaged(_leftovers),
        survives(0, may_lose=0),
        "leftovers_taken",
    ),
    Fault(
        "half a metrics line",
        "metrics.jsonl ends within a line",
        damaged(_half_line),
        survives(0, may_lose=0),
        "strict_lines",
    ),
    Fault(
        "config cut",
        "config.yaml of the run is cut",
        refused(_cut_config, _restore_config),
        survives((2, 4), 0, may_lose=0),
        "any_config",
    ),
]
