"""Where a person types and reads: lines, single keys, and text in which nothing acts. Also without a terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import TextIO

import rich
from rich.console import Console

from fine_tune.report.visible import visible

try:
    import termios
    import tty
except ImportError:  # Windows has neither: a key is then typed with Enter.
    CAN_READ_KEYS = False
else:
    CAN_READ_KEYS = True

END_OF_INPUT = (b"", b"\x04")
# What they send: some of it has a choice in the middle, as Home has a 1.
FUNCTION_KEYS = re.compile(rb"\x1b(\[[0-?]*[ -/]*[@-~]|O.|.)")
# Two columns of fewer characters than this are harder to read than two answers one after the other.
LEAST_COLUMN = 48


class Terminal:
    """Standard input and output, or files that stand for them.

    Attributes:
        interactive: A person sits at both ends; otherwise lines are read one by one and written after the prompt.
    """

    def __init__(self, stdin: TextIO | None = None, stdout: TextIO | None = None) -> None:
        self.stdin, self.stdout = stdin or sys.stdin, stdout or sys.stdout
        self.interactive = self.stdin.isatty() and self.stdout.isatty()
        if isinstance(self.stdin, TextIOWrapper):
            self.stdin.reconfigure(errors="replace")
        if isinstance(self.stdout, TextIOWrapper):
            self.stdout.reconfigure(errors="backslashreplace")
        if self.interactive:
            # It gives input() a history, and takes a pasted text of several lines as one.
            with suppress(ImportError):
                import readline  # noqa: F401

    @property
    def console(self) -> Console:
        """The console that draws."""
        return rich.get_console()

    @property
    def wide(self) -> bool:
        """Two answers find place side by side, and can be drawn."""
        drawn = self.interactive and self.console.is_terminal and not self.console.is_dumb_terminal
        return drawn and self.console.width >= 2 * LEAST_COLUMN + 4

    def write(self, text: str) -> None:
        """Write text at once; what would act in it is written as escapes."""
        self.stdout.write(visible(text))
        self.stdout.flush()

    def say(self, line: str) -> None:
        """Write a line of the program's own."""
        self.write(f"{line}\n")

    def line(self, prompt: str) -> str | None:
        """Read a line; None at the end of the input."""
        if self.interactive:
            with suppress(EOFError):
                return input(prompt)
            self.write("\n")
            return None
        asked = self.stdin.isatty()
        if asked:
            self.write(prompt)
        text = self.stdin.readline()
        if not text:
            return None
        text = text.rstrip("\r\n")
        if not asked:
            self.say(f"{prompt}{text}")
        return text

    def key(self, prompt: str, choices: Collection[str]) -> str | None:
        """Read one of the keys, without Enter where that is possible; None at the end of the input."""
        if not (self.interactive and CAN_READ_KEYS):
            while (typed := self.line(prompt)) is not None:
                if typed.strip() in choices:
                    return typed.strip()
                self.say(f"(one of {' '.join(choices)})")
            return None
        with self._single_keys():
            # Now: what was typed before the question is not an answer to it.
            self.write(prompt)
            while (pressed := os.read(self.stdin.fileno(), 64)) not in END_OF_INPUT:
                # Pasted text is no answer, though it may hold one.
                if (found := FUNCTION_KEYS.sub(b"", pressed).decode(errors="replace")) in choices:
                    self.say(found)
                    return found
        self.write("\n")
        return None

    @contextmanager
    def _single_keys(self) -> Iterator[None]:
        before = termios.tcgetattr(self.stdin)
        try:
            tty.setcbreak(self.stdin)
            yield
        finally:
            termios.tcsetattr(self.stdin, termios.TCSADRAIN, before)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Keep what is typed ahead out of the answer that is being written; it is there when the next line is read."""
        if not (self.interactive and CAN_READ_KEYS):
            yield
            return
        before = termios.tcgetattr(self.stdin)
        quiet = termios.tcgetattr(self.stdin)
        quiet[3] &= ~termios.ECHO
        try:
            termios.tcsetattr(self.stdin, termios.TCSADRAIN, quiet)
            yield
        finally:
            termios.tcsetattr(self.stdin, termios.TCSADRAIN, before)
