"""Turns that are kept, left out and taken back."""

from __future__ import annotations

import json
from pathlib import Path

from fine_tune.chat.talk import Talk
from fine_tune.text.conversation import Message

from .scripted import Scripted, said, talk


def full(num: int) -> Talk:
    """A conversation of which everything has been left out."""
    made = Talk("S")
    for number in range(num):
        made.add(f"q{number}", f"a{number}", whole=True)
    while made.leave_out_oldest():
        assert made.left_out <= num
    return made


def test_left_out_turns_are_there_but_not_shown_to_the_model() -> None:
    made = full(2)
    assert [m.content for m in made.messages("q2")] == ["S", "q2"]
    assert [m.content for m in made.messages("q2", everything=True)] == ["S", "q0", "a0", "q1", "a1", "q2"]


def test_what_is_said_after_taking_back_or_forgetting_left_out_turns_is_seen() -> None:
    undone, reset = full(2), full(2)
    undone.undo()
    reset.reset()
    for made in (undone, reset):
        made.add("new", "answer", whole=True)
        assert made.messages() == (Message("system", "S"), Message("user", "new"), Message("assistant", "answer"))


def test_a_conversation_is_saved_with_the_turns_that_no_longer_fit(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    talk(["aaaa", "bbbb", f"/save {file}"], Scripted("sft", said("1111", "2222"), room=8))
    [row] = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    assert [turn["content"] for turn in row["messages"]] == ["aaaa", "1111", "bbbb", "2222"]
