"""A person at a terminal: a program behind a pseudo-terminal, typed at and read from."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Each program is a fork in a session of its own, which makes the terminal its own: Ctrl-C reaches it as a signal.
READY = """
import fcntl, json, os, signal, sys, termios
import fine_tune.chat.start
from fine_tune.cli.main import main
for line in sys.stdin:
    asked = json.loads(line)
    terminal = os.open(asked["terminal"], os.O_RDWR | os.O_NOCTTY)
    child = os.fork()
    if child:
        os.close(terminal)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for handle in range(3):
        os.dup2(terminal, handle)
    os.close(terminal)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    sys.stdin = open(0, closefd=False)
    sys.stdout, sys.stderr = (open(handle, "w", buffering=1, closefd=False) for handle in (1, 2))
    exec(asked["before"])
    sys.exit(main(asked["words"]))
"""
# A machine that is busy with something else must not miss the middle of an answer.
SLOWLY = (
    "import time\nfrom fine_tune.evaluation.generate import Batch\nstep = Batch.step\n"
    "def slow(self, ids):\n    time.sleep(0.1)\n    return step(self, ids)\nBatch.step = slow\n"
)


class Typist:
    """Types at a program and reads what it writes.

    Attributes:
        seen: Everything it has written.
    """

    def __init__(self, process: Program, handle: int) -> None:
        self.process, self.handle = process, handle
        self.seen = ""
        self._read_to = 0

    def wait_for(self, text: str, seconds: float = 240) -> str:
        """Read until a text appears behind what was waited for before, and return everything up to its end."""
        deadline = time.monotonic() + seconds
        while (found := self.seen.find(text, self._read_to)) < 0:
            assert time.monotonic() < deadline, f"{text!r} did not come: {self.seen[self._read_to :]!r}"
            assert self._read(0.2), f"the program ended before {text!r}: {self.seen[self._read_to :]!r}"
        start, self._read_to = self._read_to, found + len(text)
        return self.seen[start : self._read_to]

    def type(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def interrupt(self, expected: str) -> str:
        """Press Ctrl-C at a prompt, again each second, until it is answered.

        Python notices a signal that comes in the microseconds between its prompt and its wait for a key only with the next
        key; a program that presses at once can hit them, a person cannot.
        """
        for _ in range(60):
            self.type("\x03")
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline and self.seen.find(expected, self._read_to) < 0:
                assert self._read(0.1), f"the program ended before {expected!r}: {self.seen[self._read_to :]!r}"
            if self.seen.find(expected, self._read_to) >= 0:
                break
        return self.wait_for(expected)

    def end(self, seconds: float = 30) -> int:
        """Wait until it has ended, and return its exit code."""
        deadline = time.monotonic() + seconds
        while self._read(0.2):
            assert time.monotonic() < deadline, f"it goes on: {self.seen[self._read_to :]!r}"
        return self.process.wait()

    def line_mode(self) -> bool:
        """Tell whether the terminal takes whole lines and shows what is typed, as it did at first."""
        flags = termios.tcgetattr(self.handle)[3]
        return bool(flags & termios.ICANON and flags & termios.ECHO)

    def _read(self, seconds: float) -> bool:
        """Read what there is; False at the end."""
        ready, _, _ = select.select([self.handle], [], [], seconds)
        if not ready:
            return True
        try:
            new = os.read(self.handle, 65536)
        except OSError:  # Linux says so when nobody has the other end open.
            return False
        self.seen += new.decode(errors="replace")
        return bool(new)


class Program:
    """A program that the process which `ready` started has made by a fork."""

    def __init__(self, ready: subprocess.Popen[str], asked: dict[str, Any]) -> None:
        assert ready.stdin is not None
        assert ready.stdout is not None
        self._told, self._code = ready.stdout, None
        print(json.dumps(asked), file=ready.stdin, flush=True)
        self.pid = int(self._told.readline())

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait until it has ended, and return its exit code, as of ``subprocess``."""
        if self._code is None:
            self._code = int(self._told.readline())
        return self._code


@contextmanager
def ready_to_start() -> Iterator[subprocess.Popen[str]]:
    """Import once what a chat needs, which takes ten seconds; programs start from there, one after the other."""
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", READY], stdin=pipe, stdout=pipe, env=environment, text=True)
    try:
        with process:
            yield process
    finally:
        process.kill()


@contextmanager
def at_a_terminal(
    ready: subprocess.Popen[str], words: Sequence[str], *, columns: int = 80, rows: int = 30, slowly: bool = False
) -> Iterator[Typist]:
    """Run a verb of `fine-tune` in a terminal of this size; ``slowly`` takes a tenth of a second for each token."""
    handle, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    asked = {"terminal": os.ttyname(other), "before": SLOWLY if slowly else "", "words": list(words)}
    program = Program(ready, asked)
    os.close(other)
    try:
        yield Typist(program, handle)
    finally:
        program.kill()
        program.wait()
        os.close(handle)
