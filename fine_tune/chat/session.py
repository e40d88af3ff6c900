"""The conversation: a line is asked of one checkpoint or of two, and a key says which of two answers is better."""

from __future__ import annotations

from collections.abc import Sequence

from fine_tune.chat.commands import Commands, Leave
from fine_tune.chat.display import Display, InTurn, SideBySide
from fine_tune.chat.rows_file import RowsFile
from fine_tune.chat.speaker import Answer, Speaker
from fine_tune.chat.stopping import CtrlC
from fine_tune.chat.talk import Talk
from fine_tune.chat.terminal import Terminal
from fine_tune.errors import StorageError
from fine_tune.text.conversation import Message, RowRefused

YOU, MORE = "you> ", "...> "
QUOTES = '"""'
CHOICES = ("1", "2", "=", "s")
CHOOSE = "better: 1 or 2, = equally good, s neither (the question is taken back)> "


class Session:
    """One conversation with one checkpoint or two.

    Args:
        speakers: Who answers.
        talk: The turns so far.
        terminal: Where the person is.
        pairs: Where preferences go; None keeps none.
    """

    def __init__(self, speakers: Sequence[Speaker], talk: Talk, terminal: Terminal, pairs: RowsFile | None) -> None:
        self.speakers, self.talk, self.terminal, self.pairs = speakers, talk, terminal, pairs
        self._commands = Commands(talk, terminal, speakers)
        self._num_asked = 0
        self._told_left_out = False

    def run(self) -> None:
        """Read and answer until the input ends or the person leaves."""
        while True:
            try:
                text = self._read()
                if text is None:
                    return
                if text.startswith("/"):
                    self._commands.do(text)
                elif text.strip():
                    self._ask(text)
            except Leave:
                return
            except KeyboardInterrupt:
                self.terminal.say("\n(Ctrl-D or /quit leaves)")

    def _read(self) -> str | None:
        """Read a line, or several between two triple quotes."""
        line = self.terminal.line(YOU)
        if line is None or not line.startswith(QUOTES):
            return line
        lines = [line.removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES):
            more = self.terminal.line(MORE)
            if more is None:
                return None
            lines.append(more)
        return " " + "\n".join(lines).rstrip().removesuffix(QUOTES)

    def _ask(self, question: str) -> None:
        question = question.strip()
        prompts = self._prompts(question)
        if prompts is None:
            return
        self._num_asked += 1
        with self.terminal.silent():
            answers = self._answers(prompts)
        best = answers[0] if len(answers) == 1 else self._choose(question, answers)
        if best is None:
            return
        if not best.text:
            self.terminal.say("(no answer: the question is taken back)")
            return
        self.talk.add(question, best.text, whole=best.ended == "whole")

    def _prompts(self, question: str) -> list[list[int]] | None:
        """Encode the conversation for each checkpoint, less its oldest turns where it is too long; None if it cannot be."""
        try:
            while True:
                messages = self.talk.messages(question)
                prompts = [speaker.prompt(messages) for speaker in self.speakers]
                over = [(s, len(p)) for s, p in zip(self.speakers, prompts, strict=True) if len(p) > s.room]
                if not over:
                    return prompts
                if not self.talk.leave_out_oldest():
                    speaker, length = over[0]
                    self.terminal.say(
                        f"(not asked: {length} tokens, and {speaker.label} takes {speaker.room} beside an answer. Say it "
                        "shorter, or start with a smaller max_new_tokens=)"
                    )
                    return None
                if not self._told_left_out:
                    self._told_left_out = True
                    self.terminal.say("(longer than the context: from now on the oldest turns are left out)")
        except RowRefused as refused:
            self.terminal.say(f"(not asked: {refused})")
            return None

    def _answers(self, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        display = self._display()
        try:
            return [
                self._answer(index, prompt, display, key=f"{self._num_asked}/{speaker.label}")
                for index, (speaker, prompt) in enumerate(zip(self.speakers, prompts, strict=True))
            ]
        finally:
            display.close()

    def _display(self) -> Display:
        names = [speaker.label for speaker in self.speakers]
        if len(names) == 1:
            return InTurn(self.terminal, names)
        numbered = [f"{number} {name}" for number, name in enumerate(names, start=1)]
        return SideBySide(self.terminal, numbered) if self.terminal.wide else InTurn(self.terminal, numbered)

    def _answer(self, index: int, prompt: Sequence[int], display: Display, *, key: str) -> Answer:
        display.begin(index)
        with CtrlC() as pressed:
            answer = self.speakers[index].answer(
                prompt, key=key, say=lambda piece: display.write(index, piece), stopped=pressed
            )
        display.end(index, answer)
        return answer

    def _choose(self, question: str, answers: Sequence[Answer]) -> Answer | None:
        """Ask which of two answers is better, keep the pair, and return the one to go on with."""
        one, other = answers
        if one.text == other.text:
            self.terminal.say("(both say the same)")
            return one
        try:
            key = self.terminal.key(CHOOSE, CHOICES)
        except KeyboardInterrupt:
            key = "s"
            self.terminal.say("s")
        if key is None:
            raise Leave
        if key == "s":
            return None
        if key == "=":
            return one
        chosen, rejected = (0, 1) if key == "1" else (1, 0)
        self._save(self.talk.messages(question), answers, chosen, rejected)
        return answers[chosen]

    def _save(self, prompt: Sequence[Message], answers: Sequence[Answer], chosen: int, rejected: int) -> None:
        if self.pairs is None:
            return
        if answers[chosen].ended != "whole":
            self.terminal.say("(not saved: the better answer was cut off, and training would teach to stop there)")
        elif not (answers[chosen].text and answers[rejected].text):
            self.terminal.say("(not saved: an answer is empty, and a pair needs two)")
        else:
            labels = (self.speakers[chosen].label, self.speakers[rejected].label)
            try:
                with CtrlC():
                    self.pairs.add_pair(prompt, answers[chosen].text, answers[rejected].text, labels=labels)
            except StorageError as error:
                self.terminal.say(f"({error})")
