"""Start the judged programs as processes of their own: imported ahead (warm) or from nothing (cold), to be hit from outside.

Run as a module it is the process that has everything imported and forks. Each fork is a process with its own id, files,
environment and signal handlers; only the seconds of importing torch are saved.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults import broken_checkpoints, broken_inputs, broken_runs
from benchmarks.faults.broken import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
# Importing them enters their variants.
KINDS = (broken_checkpoints, broken_inputs, broken_runs)
# The exit code of a process whose protection could not be taken out.
NOT_BROKEN = 99
# prctl's PR_SET_CHILD_SUBREAPER: what the nursery starts becomes our child when its parent is gone.
SUBREAPER = 36


@dataclass
class Process:
    """One started program.

    Attributes:
        pid: Its id.
        code: Its exit code once it has ended, negative for a signal.
    """

    pid: int
    err: Path
    started: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    code: int | None = None

    def running(self) -> bool:
        """Tell whether it still runs."""
        if self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.code, self.ended = os.waitstatus_to_exitcode(status), time.monotonic()
        return self.code is None

    def wait(self, seconds: float = 400.0) -> int:
        """Wait for its end; one that takes too long is killed and raises."""
        while self.running():
            if time.monotonic() - self.started > seconds:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"it had not ended after {seconds:g} s: {self.said()[-500:]}")
            time.sleep(0.01)
        assert self.code is not None
        return self.code

    def send(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.running():
            os.kill(self.pid, number)

    def limit(self, what: int, value: int) -> None:
        """Set a resource limit on it from outside; -1 lifts it."""
        if self.running():
            resource.prlimit(self.pid, what, (value, resource.prlimit(self.pid, what)[1]))

    def children(self) -> list[int]:
        """Return the ids of its child processes."""
        found = []
        for file in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with suppress(OSError):
                found += [int(word) for word in file.read_text(encoding="ascii").split()]
        return found

    @property
    def seconds(self) -> float:
        """How long it ran."""
        return self.ended - self.started

    def said(self) -> str:
        """What it told on stderr."""
        return self.err.read_text(encoding="utf-8", errors="replace") if self.err.is_file() else ""


def _as_at_a_prompt() -> None:
    """Take the signals that nohup or a background shell has switched off; the faults send them."""
    for sent in (signal.SIGINT, signal.SIGHUP):
        signal.signal(sent, signal.SIG_DFL)


class Nursery:
    """A forking process with everything imported, and what is asked of it; one per scorecard."""

    def __init__(self) -> None:
        ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "benchmarks.faults.nursery"]
        # In a session of its own: Ctrl-C at the terminal is for the scorecard, which then ends it.
        self._server = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_as_at_a_prompt,
        )
        self._lock = threading.Lock()

    def start(
        self,
        words: list[str],
        log: Path,
        *,
        out: str = os.devnull,
        environment: dict[str, str] | None = None,
        cwd: Path = ROOT,
        variant: str | None = None,
        cold: bool = False,
    ) -> Process:
        """Start ``python <words>``; with a variant, with one of its protections taken out first.

        Args:
            words: A script of the repository and its words.
            log: Where what it tells on stderr goes, with .err added.
            out: Where its other output goes.
            environment: Variables to set.
            cwd: Where it is started.
            variant: A name of ``VARIANTS``.
            cold: Import everything anew, as at a prompt.
        """
        err = log.with_suffix(".err")
        asked: dict[str, Any] = {
            "words": [str(ROOT / words[0]), *words[1:]],
            "out": str(out),
            "err": str(err),
            "cwd": str(cwd),
        }
        asked |= {"environment": environment or {}, "variant": variant, "cold": cold}
        return Process(int(self._ask(asked)), err)

    def preload(self, modules: Path) -> None:
        """Import what a finished program had imported (a file of names)."""
        self._ask({"preload": str(modules)})

    def close(self) -> None:
        """End it."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=30)

    def _ask(self, asked: dict[str, Any]) -> str:
        with self._lock:
            assert self._server.stdin is not None
            assert self._server.stdout is not None
            self._server.stdin.write(json.dumps(asked) + "\n")
            self._server.stdin.flush()
            return self._server.stdout.readline()


def serve() -> int:
    """Answer requests until there are none; in a fork, run the program and return its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        asked = json.loads(line)
        if "preload" in asked:
            _preload(Path(asked["preload"]))
            print("done", flush=True)
            continue
        read, write = os.pipe()
        if not (between := os.fork()):
            if child := os.fork():
                os.write(write, f"{child}\n".encode())
                os._exit(0)
            os.close(write)
            return _become(asked)
        os.waitpid(between, 0)
        os.close(write)
        with os.fdopen(read) as told:
            print(told.read().strip(), flush=True)
    return 0


def _preload(names: Path) -> None:
    for name in names.read_text(encoding="utf-8").split("\n"):
        if name != "__main__":
            # Some names of sys.modules are no modules of their own; what is not there is imported by who needs it.
            with suppress(Exception):
                importlib.import_module(name)


def _become(asked: dict[str, Any]) -> int:
    """Turn this fork into the program that was asked for."""
    os.setsid()
    for path, number, flags in (
        (os.devnull, 0, os.O_RDONLY),
        (asked["out"], 1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (asked["err"], 2, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(path, flags, 0o644), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(asked["environment"])
    # Python remembers the one it was started with.
    tempfile.tempdir = None
    os.chdir(asked["cwd"])
    words, variant = asked["words"], asked["variant"]
    if asked["cold"]:
        way = [] if variant is None else ["-m", "benchmarks.faults.nursery", variant]
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, *way, *words])
    if variant is not None:
        _break(variant)
    return run_script(words)


def _break(variant: str) -> None:
    """Take a protection out; where its place has changed, nothing is to be learnt from this process."""
    try:
        VARIANTS[variant]()
    except (AttributeError, ImportError):
        traceback.print_exc()
        sys.exit(NOT_BROKEN)


def run_script(words: list[str]) -> int:
    """Run a script as Python would, and leave the names of what it imported, where it is asked for."""
    sys.argv = list(words)
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        if place := os.environ.get("FAULTS_MODULES"):
            Path(place).write_text("\n".join(list(sys.modules)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    # With words, a program with one of its protections taken out.
    if len(sys.argv) > 2:
        _break(sys.argv[1])
        sys.exit(run_script(sys.argv[2:]))
    sys.exit(serve())
