"""A chat without a model: speakers who say what a test wrote, and a terminal made of text."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from fine_tune.chat.rows_file import RowsFile
from fine_tune.chat.session import Session
from fine_tune.chat.speaker import Answer
from fine_tune.chat.talk import Talk
from fine_tune.chat.terminal import Terminal
from fine_tune.text.conversation import Message


@dataclass
class Scripted:
    """Says its texts one by one; a prompt is a token per character.

    Attributes:
        asked: The turns of every prompt that was encoded.
        keys: The name under which each answer was asked for.
    """

    label: str
    says: list[Answer]
    room: int = 10_000
    template: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(name="scripted"))
    asked: list[tuple[Message, ...]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        self.asked.append(tuple(messages))
        return [ord(c) for message in messages for c in message.content]

    def answer(
        self, prompt: Sequence[int], *, key: str, say: Callable[[str], None], stopped: Callable[[], bool]
    ) -> Answer:
        assert len(prompt) <= self.room
        self.keys.append(key)
        found = self.says.pop(0)
        for piece in found.text.split(" "):
            say(f"{piece} ")
        return found


def said(*texts: str) -> list[Answer]:
    return [Answer(text, "whole") for text in texts]


def talk(
    lines: Sequence[str], *speakers: Scripted, pairs: RowsFile | None = None, system: str | None = None
) -> tuple[Session, str]:
    """Hold a conversation of these typed lines; returns the session and everything that was shown."""
    shown = io.StringIO()
    terminal = Terminal(io.StringIO("".join(f"{line}\n" for line in lines)), shown)
    session = Session(speakers, Talk(system), terminal, pairs)  # type: ignore[arg-type]
    session.run()
    return session, shown.getvalue()
