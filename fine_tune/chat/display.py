"""How answers appear while they are written: one after the other, or two side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from fine_tune.chat.speaker import Answer
from fine_tune.chat.terminal import Terminal
from fine_tune.report.visible import visible

REDRAW_SECONDS = 0.06
NOTES = {
    "whole": "",
    "limit": "(cut off at max_new_tokens)",
    "context": "(cut off: the context is full)",
    "stopped": "(stopped)",
}


class Display(Protocol):
    """Takes the answers to one question."""

    def begin(self, index: int) -> None:
        """Say who answers now."""

    def write(self, index: int, piece: str) -> None:
        """Show more of an answer."""

    def end(self, index: int, answer: Answer) -> None:
        """Show how an answer ended."""

    def close(self) -> None:
        """Leave the answers as they stand."""


class InTurn:
    """Each answer behind its name, written as it comes."""

    def __init__(self, terminal: Terminal, names: Sequence[str]) -> None:
        self._terminal, self._names = terminal, names

    def begin(self, index: int) -> None:
        """Write the name."""
        self._terminal.write(f"{self._names[index]}> ")

    def write(self, index: int, piece: str) -> None:
        """Write the piece."""
        if piece:
            self._terminal.write(piece)

    def end(self, index: int, answer: Answer) -> None:
        """Write what there is to say about the answer, and how it reads if that has changed."""
        if answer.read_again:
            self._terminal.write(f"\n(read as a whole:) {answer.text}")
        note = NOTES[answer.ended] or ("" if answer.text else "(said nothing)")
        self._terminal.say(f" {note}" if note else "")

    def close(self) -> None:
        """Nothing is open."""


class SideBySide:
    """A column for each answer, redrawn as it grows; while it is higher than the screen, its end is shown."""

    def __init__(self, terminal: Terminal, names: Sequence[str]) -> None:
        self._names = names
        self._texts = ["" for _ in names]
        self._all, self._drawn = False, 0.0
        self._live = Live(self, console=terminal.console, auto_refresh=False)
        self._live.start()

    def begin(self, index: int) -> None:
        """Nothing: the names stand above the columns."""

    def write(self, index: int, piece: str) -> None:
        """Add to a column; draw it if the last time is a while ago."""
        self._texts[index] += visible(piece)
        if time.monotonic() - self._drawn >= REDRAW_SECONDS:
            self._draw()

    def end(self, index: int, answer: Answer) -> None:
        """Show the column as it stays."""
        note = NOTES[answer.ended] or ("" if answer.text else "(said nothing)")
        self._texts[index] = " ".join(part for part in (visible(answer.text), note) if part)
        self._draw()

    def close(self) -> None:
        """Draw everything a last time."""
        self._all = True
        self._live.stop()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._live.refresh()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the columns, their last lines only while they do not fit."""
        table = Table.grid(expand=True, padding=(0, 2))
        for _ in self._names:
            table.add_column(ratio=1, overflow="fold")
        # Text, not markup: a model's square brackets are its own.
        table.add_row(*(Text(name, style="bold") for name in self._names))
        table.add_row(*(Text(text) for text in self._texts))
        lines = console.render_lines(table, options, pad=False)
        room = len(lines) if self._all else max(2, console.height - 2)
        shown = lines if len(lines) <= room else [lines[0], *lines[len(lines) - room + 1 :]]
        for number, line in enumerate(shown):
            if number:
                yield Segment.line()
            yield from line
