"""The turns of a conversation: what was asked and kept, and what still fits the context."""

from __future__ import annotations

from dataclasses import dataclass, field

from fine_tune.text.conversation import Message


@dataclass(frozen=True)
class Exchange:
    """A question with the answer that the conversation went on with; ``whole`` is False for one that was cut off."""

    question: str
    answer: str
    whole: bool


@dataclass
class Talk:
    """A conversation.

    Attributes:
        system: Text of the system turn, None for none.
        exchanges: All of them, the oldest first.
        left_out: How many of the oldest no longer fit.
    """

    system: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    left_out: int = 0

    def messages(self, question: str | None = None, *, everything: bool = False) -> tuple[Message, ...]:
        """Return the turns for a model, ending with a new question, if there is one.

        Args:
            question: What is asked now.
            everything: Also the turns that no longer fit.
        """
        turns = [Message("system", self.system)] if self.system else []
        for one in self.exchanges[0 if everything else self.left_out :]:
            turns += [Message("user", one.question), Message("assistant", one.answer)]
        return (*turns, *([Message("user", question)] if question is not None else []))

    def leave_out_oldest(self) -> bool:
        """Leave one more exchange out; False where none is left."""
        if self.left_out >= len(self.exchanges):
            return False
        self.left_out += 1
        return True

    def add(self, question: str, answer: str, *, whole: bool) -> None:
        """Keep an exchange."""
        self.exchanges.append(Exchange(question, answer, whole))

    def undo(self) -> Exchange | None:
        """Take the last exchange back and return it; None where there is none."""
        if not self.exchanges:
            return None
        taken = self.exchanges.pop()
        self.left_out = min(self.left_out, len(self.exchanges))
        return taken

    def reset(self) -> None:
        """Forget everything but the system turn."""
        self.exchanges.clear()
        self.left_out = 0
