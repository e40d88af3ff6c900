"""What a line that begins with a slash does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fine_tune.chat.rows_file import TRAINS, RowsFile
from fine_tune.chat.speaker import Speaker
from fine_tune.chat.talk import Talk
from fine_tune.chat.terminal import Terminal
from fine_tune.errors import ConfigError, StorageError
from fine_tune.problems import nearest
from fine_tune.text.conversation import Message, RowRefused

HELP = """/reset          forget the conversation; the system turn stays
/undo           take the last question and its answer back
/system <text>  begin the conversation with a system turn; /system alone shows it, /system off takes it away
/save <file>    add this conversation to a file of rows (.jsonl) that trains with data=chat
/quit           leave, as Ctrl-D does
Ctrl-C stops an answer. Several lines go between two \"\"\". A line that must begin with / begins with a space."""
OFF = "off"


class Leave(Exception):
    """The person leaves."""


class Commands:
    """The commands of a conversation.

    Args:
        talk: The turns.
        terminal: Where the person is.
        speakers: Who answers: their templates must take a system turn.
    """

    def __init__(self, talk: Talk, terminal: Terminal, speakers: Sequence[Speaker]) -> None:
        self._talk, self._terminal, self._speakers = talk, terminal, speakers
        self._known: dict[str, Callable[[str], None]] = {
            "/help": lambda _: terminal.say(HELP),
            "/reset": self._reset,
            "/undo": self._undo,
            "/system": self._system,
            "/save": self._save,
            "/quit": self._quit,
        }

    def do(self, line: str) -> None:
        """Do what a line says.

        Raises:
            Leave: It was /quit.
        """
        name, _, rest = line.strip().partition(" ")
        if name in self._known:
            self._known[name](rest.strip())
            return
        close = nearest(name, list(self._known))
        meant = f" Did you mean {close}?" if close else ""
        self._terminal.say(f"({name}: no such command.{meant} /help shows them; a space before it makes it a question)")

    def _quit(self, _: str) -> None:
        raise Leave

    def _reset(self, _: str) -> None:
        self._talk.reset()
        self._terminal.say("(a new conversation)")

    def _undo(self, _: str) -> None:
        taken = self._talk.undo()
        self._terminal.say(f"(taken back: {taken.question})" if taken else "(nothing to take back)")

    def _system(self, text: str) -> None:
        if not text:
            self._terminal.say(f"(system: {self._talk.system})" if self._talk.system else "(no system turn)")
        elif text == OFF:
            self._talk.system = None
            self._terminal.say("(no system turn from now on)")
        elif problem := system_problem(text, self._speakers):
            self._terminal.say(f"(not set: {problem})")
        else:
            self._talk.system = text
            self._terminal.say("(set; it stands before the whole conversation)")

    def _save(self, name: str) -> None:
        if not name:
            self._terminal.say("(/save <file>: no file)")
        elif not self._talk.exchanges:
            self._terminal.say("(nothing to save yet)")
        elif not all(one.whole for one in self._talk.exchanges):
            self._terminal.say(
                "(not saved: an answer was cut off, and training would teach to stop there; /undo takes it back)"
            )
        else:
            self._add_row(Path(name).expanduser())

    def _add_row(self, path: Path) -> None:
        try:
            RowsFile(path, "conversation").add_conversation(self._talk.messages(everything=True))
        except ConfigError as error:
            self._terminal.say(f"({' '.join(error.problems)})")
        except StorageError as error:
            self._terminal.say(f"({error})")
        else:
            self._terminal.say(f"(added to {path}: {TRAINS['conversation']} data.path={path})")


def system_problem(text: str, speakers: Sequence[Speaker]) -> str | None:
    """Say why a conversation cannot begin with a system turn; None if it can."""
    messages = [Message("system", text), Message("user", "one")]
    try:
        for speaker in speakers:
            # A template may leave a system turn out without a word.
            if speaker.prompt(messages) == speaker.prompt(messages[1:]):
                return f"template {speaker.template.name} has no place for a system turn"
    except RowRefused as refused:
        return str(refused)
    return None
