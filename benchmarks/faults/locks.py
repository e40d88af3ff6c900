"""Faults of runs that meet: a stale lock, a second start, several at once."""

from __future__ import annotations

from benchmarks.faults.fault import Fault, Story, damaged, survives
from benchmarks.faults.judge import differences
from benchmarks.faults.moments import step
from benchmarks.faults.scene import Scene


def _stale(scene: Scene) -> None:
    # No process has a number as high as this.
    (scene.run / ".lock").write_text("4194304\n", encoding="utf-8")


def second_start() -> Story:
    """Start a second time while the first runs: the second is refused and the first ends well."""

    def play(scene: Scene) -> None:
        process = scene.start()
        if scene.armed:
            step(3)(process, scene.run)
            scene.end(scene.again())
        scene.end(process)
        if not scene.armed:
            scene.end(scene.again())

    return Story("start, then start again", play)


def _at_once(number: int) -> Story:
    """Start several times at once under one name: each ends well in a folder of its own, or is told that it is taken."""

    def play(scene: Scene) -> None:
        names = [word for word in scene.job.words(scene) if not word.startswith("run_dir=")]
        elsewhere = scene.folder / "elsewhere"
        elsewhere.mkdir()
        scene.cwd = elsewhere
        processes = [scene.launch(names) for _ in range(number if scene.armed else 1)]
        for process in processes:
            scene.end(process)
        runs = [folder for folder in (elsewhere / "runs").iterdir() if (folder / "config.yaml").is_file()]
        finished = [end for end in scene.ends if end.code == 0]
        if any(end.code not in (0, 9) for end in scene.ends):
            scene.notes.append(f"exit codes {[end.code for end in scene.ends]}")
        if len(runs) != len(finished) or not finished:
            scene.notes.append(f"{len(finished)} starts ended well, in {len(runs)} folders")
        for run in runs:
            found = differences(run, scene.clean)
            scene.notes += (
                [f"{run.name}: no result" if found is None else f"{run.name} differs: {found[0]}"]
                if found != []
                else []
            )
        scene.results = runs[0] if runs else scene.run
        scene.ends[:] = sorted(scene.ends, key=lambda end: -end.code)[-1:]

    return Story("start under its own name", play)


FAULTS = [
    Fault(
        "stale lock", "a lock file that names a dead process", damaged(_stale), survives(0, may_lose=0), "lock_by_file"
    ),
    Fault(
        "second start",
        "the same run is started again at step 3",
        second_start(),
        survives(9, 0, may_lose=0, says=("in use",)),
        "unlocked",
    ),
    Fault(
        "two at once",
        "two starts at the same moment, one name",
        _at_once(2),
        survives(0, may_lose=0),
        "unlocked_for_long",
    ),
    Fault(
        "eight at once",
        "eight starts at the same moment, one name",
        _at_once(8),
        survives(0, may_lose=0),
        "unlocked_for_long",
    ),
]
