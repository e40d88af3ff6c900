"""Faults of the surroundings: what differs between two starts besides the run."""

from __future__ import annotations

import shutil

from benchmarks.faults.fault import Fault, Story, survives
from benchmarks.faults.scene import Scene


def elsewhere(**environment: str) -> Story:
    """Go on with an interrupted run under other variables."""

    def play(scene: Scene) -> None:
        scene.bring()
        scene.damage(lambda: scene.environment.update(environment))
        scene.end(scene.again())

    return Story("go on", play, from_interrupted=True)


def _other_folder() -> Story:
    def play(scene: Scene) -> None:
        scene.bring()
        if scene.armed:
            scene.cwd = scene.folder
        scene.end(scene.again())

    return Story("go on", play, from_interrupted=True)


def _moved() -> Story:
    """Give the run another name, in another folder, and go on with that."""

    def play(scene: Scene) -> None:
        scene.bring()
        place = scene.folder / "with spaces, \u00fc and (brackets)" / "renamed run" if scene.armed else scene.run
        if scene.armed:
            place.parent.mkdir()
            shutil.move(scene.run, place)
        scene.results = place
        scene.end(scene.launch([scene.job.script, f"resume='{place}'"]))

    return Story("go on", play, from_interrupted=True)


FAULTS = [
    Fault(
        "other hash seed",
        "PYTHONHASHSEED differs between two starts",
        elsewhere(PYTHONHASHSEED="12345"),
        survives(0, may_lose=0),
        "order_by_hash",
        cold=True,
    ),
    Fault(
        "other place on earth",
        "other locale, language and time zone",
        elsewhere(LC_ALL="C", LANG="de_DE", TZ="Pacific/Kiritimati"),
        survives(0, may_lose=0),
        "forgetful",
        cold=True,
    ),
    Fault(
        "other temporary folder",
        "TMPDIR on another file system",
        elsewhere(TMPDIR="/dev/shm"),
        survives(0, may_lose=0),
        "forgetful",
    ),
    Fault(
        "other working directory",
        "gone on with from another folder",
        _other_folder(),
        survives(0, may_lose=0),
        "forgetful",
    ),
    Fault("run moved", "the run's folder has another name and place", _moved(), survives(0, may_lose=0), "forgetful"),
]
