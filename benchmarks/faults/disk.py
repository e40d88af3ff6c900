"""Faults of the place that a run writes to: full, read-only, limited, not a folder."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.fault import Fault, Story, begun, survives
from benchmarks.faults.moments import exporting, step
from benchmarks.faults.nursery import Process
from benchmarks.faults.scene import Scene

# Kept free on a full disk, below what a checkpoint takes: logs go on.
LITTLE = 64 * 1024


def limited(what: int, value: Callable[[Scene, Process], int], number: int = 3) -> Story:
    """Start, limit a resource of the process at a step, and start again without the limit."""

    def play(scene: Scene) -> None:
        process = scene.start()
        scene.reach(step(number), process)
        scene.damage(lambda: process.limit(what, value(scene, process)))
        scene.end(process)
        scene.end(scene.again())

    return Story("start, then start again", play)


def on_small_disk(fill: Callable[[Path], None], undo: Callable[[Path], None], *, in_export: bool = False) -> Story:
    """Run on a file system of 160 MB that something happens to at step 3, or while the adapter is exported."""

    def play(scene: Scene) -> None:
        scene.run.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(scene.run)], check=True, capture_output=True
        )
        try:
            process = scene.start()
            scene.reach(exporting if in_export else step(3), process)
            scene.damage(lambda: fill(scene.run))
            scene.end(process)
            scene.damage(lambda: undo(scene.run))
            scene.end(scene.again())
            scene.keep_results()
        finally:
            subprocess.run(["umount", "-l", str(scene.run)], check=False, capture_output=True)

    return Story("start on a small disk, then start again", play)


def _fill(run: Path) -> None:
    _fill_whole(run)
    os.truncate(run / "ballast", (run / "ballast").stat().st_size - LITTLE)


def _fill_whole(run: Path) -> None:
    with (run / "ballast").open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(b"\0" * 4096)
        except OSError:
            return


def _empty(run: Path) -> None:
    (run / "ballast").unlink(missing_ok=True)


def _gone(moment_step: int = 3) -> Story:
    """Take the run's folder away at a step, put it back when the run has ended, and start again."""

    def play(scene: Scene) -> None:
        process = scene.start()
        scene.reach(step(moment_step), process)
        away = scene.folder / "away"
        scene.damage(lambda: scene.run.rename(away))
        scene.end(process)
        if scene.armed:
            shutil.rmtree(scene.run, ignore_errors=True)
            away.rename(scene.run)
            scene.look_again()
        scene.end(scene.again())

    return Story("start, then start again", play)


def _immutable() -> Story:
    """Let nothing be made in the folder of checkpoints from step 3 on, not even by root."""

    def play(scene: Scene) -> None:
        process = scene.start()
        scene.reach(step(3), process)
        place = str(scene.run / "checkpoints")
        scene.damage(lambda: subprocess.run(["chattr", "+i", place], check=True, capture_output=True))
        try:
            scene.end(process)
        finally:
            scene.damage(lambda: subprocess.run(["chattr", "-i", place], check=True, capture_output=True))
        scene.end(scene.again())

    return Story("start, then start again", play)


def _metrics_size(scene: Scene, process: Process) -> int:
    return (scene.run / "metrics.jsonl").stat().st_size + 25


def _no_handles(scene: Scene, process: Process) -> int:
    return len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


def _address_space(scene: Scene, process: Process) -> int:
    for line in Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmSize"):
            return int(line.split()[1]) * 1024 + 1024 * 1024
    raise RuntimeError("the process has no VmSize")


def _a_file(scene: Scene) -> None:
    scene.run.write_text("a file, not a folder", encoding="utf-8")


def _no_file(scene: Scene) -> None:
    # Where the protection is taken out, a run has taken its place.
    if scene.run.is_file():
        scene.run.unlink()


FAULTS = [
    Fault(
        "files may not grow",
        "a limit of 300 kB a file (RLIMIT_FSIZE) from step 3",
        limited(resource.RLIMIT_FSIZE, lambda scene, process: 300_000),
        survives(8, 0),
        "swallowed",
    ),
    Fault(
        "metrics may not grow",
        "a file limit a few bytes above metrics.jsonl at step 3",
        limited(resource.RLIMIT_FSIZE, _metrics_size),
        survives(8, 0),
        "untold",
    ),
    Fault(
        "disk nearly full",
        "64 kB left at step 3: no checkpoint fits",
        on_small_disk(_fill, _empty),
        survives(8, 0),
        "swallowed",
        needs_root=True,
    ),
    Fault(
        "disk full",
        "not a byte left at step 3",
        on_small_disk(_fill_whole, _empty),
        survives(8, 0),
        "swallowed",
        needs_root=True,
    ),
    Fault(
        "disk full in export",
        "64 kB left while the adapter is exported",
        on_small_disk(_fill_whole, _empty, in_export=True),
        survives(8, 0, may_lose=0),
        "export_swallowed",
        needs_root=True,
    ),
    Fault(
        "nothing may be made",
        "the folder of checkpoints is immutable (chattr +i) from step 3",
        _immutable(),
        survives(8, 0),
        "swallowed",
        needs_root=True,
    ),
    Fault(
        "folder taken away", "the run's folder is moved away at step 3 and back", _gone(), survives(8, 0), "swallowed"
    ),
    Fault(
        "no more files",
        "no further file may be opened (RLIMIT_NOFILE) from step 3",
        limited(resource.RLIMIT_NOFILE, _no_handles),
        survives((5, 8), 0),
        "untold",
    ),
    Fault(
        "no more memory",
        "the address space may not grow (RLIMIT_AS) from step 3",
        limited(resource.RLIMIT_AS, _address_space),
        survives(7, 0),
        "memory_untold",
    ),
    Fault(
        "a file in its place",
        "run_dir is a file",
        begun(_a_file, _no_file),
        survives((2, 8), 0, may_lose=0),
        "any_place",
    ),
]
