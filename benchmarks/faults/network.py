"""Faults of servers: closed, silent or absent, for trackers and the hub."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.faults.fault import Fault, Story, survives
from benchmarks.faults.scene import Scene

# What a tracker may add to a run, and the hub to an answer, on top of starting Python and importing.
TRACKER_SECONDS, HUB_SECONDS = 20.0, 15.0
KEY = "0123456789abcdef0123456789abcdef01234567"
WANDB = ("logger=wandb", "logger.wandb.init_seconds=5")


@contextmanager
def server(*, silent: bool) -> Iterator[tuple[int, list[float]]]:
    """Listen on a port of this machine; hang up at once, or take connections and never answer.

    Yields:
        The port, and the moments at which somebody came.
    """
    came: list[float] = []
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    visitor, _ = listening.accept()
                except OSError:
                    return
                came.append(time.monotonic())
                if silent:
                    kept.append(visitor)
                else:
                    visitor.close()

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1], came
        listening.shutdown(socket.SHUT_RDWR)
    for visitor in kept:
        visitor.close()


def _tracked(*, silent: bool) -> Story:
    """Train with W&B on a server that does not answer; the run may be a little longer, and is otherwise the clean one."""

    def play(scene: Scene) -> None:
        usual = scene.end(scene.start_over()).seconds
        scene.ends.clear()
        with server(silent=silent) as (port, _):
            scene.environment = {
                "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
                "WANDB_API_KEY": KEY,
                "WANDB_MODE": "online",
            }
            took = scene.end(scene.start_over(*(WANDB if scene.armed else ()))).seconds
        if took > usual + TRACKER_SECONDS + 0.5 * usual:
            scene.notes.append(f"the run took {took:.0f} s instead of {usual:.0f} s")

    return Story("start", play)


def _offline() -> Story:
    def play(scene: Scene) -> None:
        scene.environment = {"WANDB_MODE": "offline"}
        scene.end(scene.start(*(WANDB if scene.armed else ())))
        if scene.armed and not list(scene.run.glob("wandb/**/*.wandb")):
            scene.notes.append("W&B kept nothing")

    return Story("start", play)


def _hub(*, silent: bool, word: str, more: tuple[str, ...] = ()) -> Story:
    """Ask for something of a hub that does not answer, which is refused in time; then start without."""

    def play(scene: Scene) -> None:
        with server(silent=silent) as (port, came):
            scene.environment = {
                "HF_HUB_OFFLINE": "0",
                "HF_ENDPOINT": f"http://127.0.0.1:{port}",
                "HF_HOME": str(scene.folder / "hub"),
            }
            process = scene.start(*((word, *more) if scene.armed else ()))
            scene.end(process)
            waited = process.ended - min(came, default=process.ended)
        if waited > HUB_SECONDS:
            scene.notes.append(
                f"the refusal took {waited:.0f} s after the hub was asked, {HUB_SECONDS:.0f} are promised"
            )
        if scene.armed and not came:
            scene.notes.append("nobody asked the hub")
        scene.environment = {}
        scene.end(scene.again() if not scene.armed else scene.start_over())

    return Story("start cold, then start again", play)


def no_gpu() -> Story:
    """Ask for a GPU where none is to be seen, then for the CPU."""

    def play(scene: Scene) -> None:
        scene.environment = {"CUDA_VISIBLE_DEVICES": ""}
        scene.end(scene.start(*(("trainer=gpu",) if scene.armed else ())))
        scene.end(scene.again() if not scene.armed else scene.start())

    return Story("start, then start again", play)


def secret_typed() -> Story:
    """Type a secret on the command line: refused, and written nowhere."""
    secret = "hf_" + "abcdefghijklmnopqrstuvwx"

    def play(scene: Scene) -> None:
        scene.end(scene.start(*((f"run_name={secret}",) if scene.armed else ())))
        found = [file for file in _files(scene.folder) if secret.encode() in file.read_bytes()]
        scene.notes += [f"the secret is in {file.name}" for file in found]
        scene.end(scene.again() if not scene.armed else scene.start())

    return Story("start, then start again", play)


def _files(folder: Path) -> list[Path]:
    return [Path(place) / name for place, _, names in os.walk(folder) for name in names]


HUB_MODEL = ("model.path=nobody/nothing", ("model.revision=" + "abcdef12" * 5, "model.chat_template=chatml"))
FAULTS = [
    Fault(
        "tracker hangs up",
        "W&B's server closes every connection",
        _tracked(silent=False),
        survives(0, may_lose=0),
        "tracker_inside",
    ),
    Fault(
        "tracker silent",
        "W&B's server takes connections and says nothing",
        _tracked(silent=True),
        survives(0, may_lose=0),
        "tracker_inside",
    ),
    Fault("tracker offline", "W&B without a network", _offline(), survives(0, may_lose=0)),
    Fault(
        "hub hangs up",
        "the hub closes every connection",
        _hub(silent=False, word=HUB_MODEL[0], more=HUB_MODEL[1]),
        survives(5, 0, may_lose=0, says=("hub",)),
        "patient",
        cold=True,
    ),
    Fault(
        "hub silent",
        "the hub takes connections and says nothing",
        _hub(silent=True, word=HUB_MODEL[0], more=HUB_MODEL[1]),
        survives(5, 0, may_lose=0, says=("hub",)),
        "patient",
        cold=True,
    ),
    Fault(
        "no GPU",
        "trainer=gpu where no GPU is to be seen",
        no_gpu(),
        survives(5, 0, may_lose=0, says=("trainer=cpu",)),
        "any_device",
    ),
    Fault("secret typed", "a token on the command line", secret_typed(), survives(2, 0, may_lose=0), "secrets_taken"),
]
