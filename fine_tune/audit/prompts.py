"""Whether answers are asked for in the very ids after which they were learned, everywhere that a model is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from fine_tune.audit.placing import Placed
from fine_tune.audit.stretches import row_stretches
from fine_tune.chat.speaker import Speaker
from fine_tune.errors import FineTuneError
from fine_tune.evaluation.answers import Answerer, Completion
from fine_tune.evaluation.questions import Question, encode_questions
from fine_tune.text.conversation import Document, Message, PreferencePair, SourceRow
from fine_tune.text.template import ChatTemplate

Messages = tuple[Message, ...]
# Encodes prompts the way one of the places does that ask a model.
Encode = Callable[[Sequence[Messages]], list[list[int]]]


@dataclass
class _Listener(Answerer):
    """Answers as previews, held-out questions and chats do, up to where the network would be asked."""

    heard: list[list[int]] = field(default_factory=list)

    def continue_prompts(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Completion]:
        """Note the prompts."""
        self.heard = [list(prompt) for prompt in prompts]
        return []


class Askers:
    """The places that ask a model, each with its own way from messages to ids."""

    def __init__(self, tokenizer: Any, template: ChatTemplate) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.encoders: dict[str, Encode] = {
            "previews": self._previews,
            "evaluations": self._evaluations,
            "chat": self._chat,
        }

    def _previews(self, prompts: Sequence[Messages]) -> list[list[int]]:
        listener = self._listener()
        listener.answer(prompts, max_new_tokens=1)
        return listener.heard

    def _chat(self, prompts: Sequence[Messages]) -> list[list[int]]:
        # A speaker needs a loaded model; the way from its messages to ids needs no more than an answerer has.
        speaker = cast(Speaker, self._listener())
        return [Speaker.prompt(speaker, messages) for messages in prompts]

    def _listener(self) -> _Listener:
        return _Listener(nn.Identity(), self.tokenizer, self.template, max_prompt_tokens=1)

    def _evaluations(self, prompts: Sequence[Messages]) -> list[list[int]]:
        questions = [Question(str(number), messages) for number, messages in enumerate(prompts)]
        return encode_questions(questions, self.tokenizer, self.template)

    def differences(self, rows: Sequence[Placed]) -> list[list[str]]:
        """Say of each row that was kept whole where it is asked for in other ids than it was learned after."""
        prompts = [asked_prompts(row.row) for row in rows]
        learned = [_learned_after(row) for row in rows]
        found = [
            [] if len(said) == len(asked) else [f"{len(asked)} answers, but {len(said)} learned stretches"]
            for said, asked in zip(learned, prompts, strict=True)
        ]
        for place, encode in self.encoders.items():
            try:
                heard = iter(encode([prompt for asked in prompts for prompt in asked]))
            except FineTuneError as refused:
                found = [[*problems, f"{place} refuse prompts: {refused}"] for problems in found]
                continue
            for problems, said, asked in zip(found, learned, prompts, strict=True):
                ids = [next(heard) for _ in asked]
                # Stretches that are too few are told of already.
                for turn, (before, after) in enumerate(zip(said, ids, strict=False), 1):
                    if before != after:
                        problems.append(f"{place}, answer {turn}: {_apart(before, after)}")
        return found


def _learned_after(placed: Placed) -> list[list[int]]:
    """The ids before each learned stretch; of a pair those before both of its sides."""
    if placed.index is None or isinstance(placed.row, Document):
        return []
    ids = placed.table.row(placed.index)[0].tolist()
    starts = [start for start, _ in row_stretches(placed.table, placed.index)]
    return [ids[:start] for start in (starts[:1] if isinstance(placed.row, PreferencePair) else starts)]


def asked_prompts(row: SourceRow) -> list[Messages]:
    """The turns before each answer; a document has none."""
    if isinstance(row, Document):
        return []
    if isinstance(row, PreferencePair):
        return [row.prompt]
    return [row.messages[:place] for place, message in enumerate(row.messages) if message.role == "assistant"]


def _apart(trained: list[int], asked: list[int]) -> str:
    """Name the first token in which two prompts differ."""
    pairs = zip(trained, asked, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(trained), len(asked)))
    return f"token {place} of {len(trained)} learned after is not that of {len(asked)} asked after"
