"""The process that speaks to W&B: one JSON message a line in, one answer a line out.

It runs as a file and imports wandb alone, holds no secret but W&B's key, and ends when the run's process does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

# How long a run whose process was killed may take to send what it has.
ORPHAN_SECONDS = 30.0
# How much longer than it was given the start may take.
GRACE_SECONDS = 15.0


class Speaker:
    """One run of W&B, and what is asked of it."""

    def __init__(self) -> None:
        self.run: Any = None

    def start(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Open the run, or go on with it."""
        # W&B has a limit of its own, which it may overlook.
        with _left_after(asked["init_seconds"] + GRACE_SECONDS):
            self.run = _open(asked, mode="offline" if asked["offline"] else "online")
        return {"folder": str(Path(self.run.settings.sync_dir))}

    def log(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Log numbers at a step."""
        self.run.log(asked["numbers"], step=asked["step"])
        return {}

    def rows(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Log a table at a step."""
        import wandb

        self.run.log({asked["name"]: wandb.Table(columns=asked["columns"], data=asked["data"])}, step=asked["step"])
        return {}

    def finish(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Log the adapter, add the run's final numbers, and send everything."""
        if asked["adapter"]:
            import wandb

            artifact = wandb.Artifact(f"{self.run.name}-adapter", type="model", metadata={"step": asked["step"]})
            for file in asked["adapter"]:
                artifact.add_file(file, name=Path(file).name, skip_cache=True)
            self.run.log_artifact(artifact, aliases=["latest", *(["best"] if asked["best"] else [])])
        for name, value in asked["summary"].items():
            self.run.summary[f"run/{name}"] = value
        self.run.finish(exit_code=int(asked["failed"]))
        self.run = None
        return {}


def _open(asked: dict[str, Any], *, mode: str) -> Any:
    import wandb

    settings = wandb.Settings(
        mode=mode,
        root_dir=asked["folder"],
        init_timeout=asked["init_seconds"],
        # Nothing is sent but what the run logs: no code, diff, console, packages, machine or hardware.
        console="off",
        disable_code=True,
        save_code=False,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
        host="hidden",
        program="fine_tune",
        silent=True,
        symlink=False,
        use_dot_wandb=False,
        # A killed run keeps what it logged.
        x_transaction_log_flush_interval=1.0,
    )
    about = {key: asked[key] for key in ("project", "entity", "tags", "group", "job_type", "id", "name", "config")}
    return wandb.init(**about, resume="allow", settings=settings)


def main() -> None:
    """Answer messages until the run ends or its process does."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Whatever wandb prints is not an answer.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for number in (signal.SIGINT, signal.SIGTERM):
        # A scheduler tells the whole job; how the run ends is for its own process to say.
        signal.signal(number, signal.SIG_IGN)
    speaker = Speaker()
    serve(sys.stdin, answers, speaker)
    if speaker.run is not None:
        with _left_after(ORPHAN_SECONDS):
            speaker.run.finish(exit_code=1)
    # Hooks at the end of the interpreter would wait for the server.
    os._exit(0)


def serve(messages: TextIO, answers: TextIO, speaker: Speaker) -> None:
    """Answer each message; an error is an answer too."""
    doing: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "start": speaker.start, "log": speaker.log, "rows": speaker.rows, "finish": speaker.finish,
    }  # fmt: skip
    for line in messages:
        asked = json.loads(line)
        try:
            said = doing[asked["do"]](asked)
        except Exception as error:
            said = {"error": _brief(error)}
        try:
            answers.write(json.dumps(said) + "\n")
            answers.flush()
        except OSError:
            return


@contextmanager
def _left_after(seconds: float) -> Iterator[None]:
    """End the process if a block takes longer."""
    timer = threading.Timer(seconds, os._exit, args=(1,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _brief(error: Exception) -> str:
    """An error in one line, without the key."""
    key = os.environ.get("WANDB_API_KEY")
    text = " ".join(str(error).split()) or type(error).__name__
    return (text.replace(key, "***") if key else text)[:300]


if __name__ == "__main__":
    main()
