"""What a line typed into a chat does: asked, answered, kept, taken back, or refused in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fine_tune.chat.rows_file import RowsFile
from fine_tune.chat.session import CHOOSE
from fine_tune.chat.speaker import Answer
from fine_tune.text.conversation import Message, RowRefused

from .scripted import Scripted, said, talk


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def rows(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_each_question_is_asked_after_what_was_said_before() -> None:
    one = Scripted("sft", said("Yes.", "No."))
    session, shown = talk(["First?", "", "  ", "Second?"], one, system="Be brief.")
    system = Message("system", "Be brief.")
    assert one.asked == [
        (system, user("First?")),
        (system, user("First?"), assistant("Yes."), user("Second?")),
    ]
    assert session.talk.messages()[-1] == assistant("No.")
    assert "you> First?\nsft> Yes. \n" in shown
    assert len(set(one.keys)) == 2, "an answer that is sampled again is another one"


def test_several_lines_go_between_quotes_and_a_space_takes_the_slash() -> None:
    one = Scripted("sft", said("a", "b", "c"))
    talk(['"""one', "", "/two", 'three"""', '"""single"""', " /path is what?"], one)
    assert [asked[-1].content for asked in one.asked] == ["one\n\n/two\nthree", "single", "/path is what?"]


def test_reset_undo_and_system_change_what_is_asked_next() -> None:
    one = Scripted("sft", said("a1", "a2", "a3", "a4"))
    _, shown = talk(
        ["q1", "q2", "/undo", "q3", "/system Be kind.", "/system", "/reset", "/undo", "q4", "/system off", "/system"],
        one,
    )
    asked = [turns for turns in one.asked if turns[-1].content.startswith("q")]
    assert asked == [
        (user("q1"),),
        (user("q1"), assistant("a1"), user("q2")),
        (user("q1"), assistant("a1"), user("q3")),
        (Message("system", "Be kind."), user("q4")),
    ]
    for line in (
        "(taken back: q2)",
        "(system: Be kind.)",
        "(a new conversation)",
        "(nothing to take back)",
        "(no system turn)",
    ):
        assert shown.count(line) == 1, line


def test_quit_leaves_and_what_follows_is_not_asked() -> None:
    one = Scripted("sft", said("a1"))
    talk(["q1", "/quit", "q2"], one)
    assert len(one.asked) == 1


def test_a_wrong_command_is_told_with_the_right_one() -> None:
    one = Scripted("sft", [])
    _, shown = talk(["/sytem Be kind.", "/", "/help"], one)
    assert "(/sytem: no such command. Did you mean /system?" in shown
    assert "(/: no such command. /help shows them" in shown
    assert "/undo           take the last question and its answer back" in shown
    assert one.asked == []


def test_a_system_turn_that_the_template_refuses_or_swallows_is_not_set() -> None:
    class Refusing(Scripted):
        def prompt(self, messages: list[Message]) -> list[int]:
            if messages[0].content == "refuse":
                raise RowRefused("template_mismatch", "no system turn here")
            return super().prompt([message for message in messages if message.role != "system"])

    one = Refusing("sft", said("a"))
    session, shown = talk(["/system refuse", "/system swallow", "q"], one)
    assert session.talk.system is None
    assert "(not set: template_mismatch: no system turn here)" in shown
    assert "(not set: template scripted has no place for a system turn)" in shown


def test_what_a_model_says_does_not_act_in_the_terminal() -> None:
    hostile = "\x1b[2J\x1b]0;mine\x07 \u202ereversed\u2066 \x9b31m a\rb\x00"
    _, shown = talk([f"say {hostile}", "/undo"], Scripted("sft", said(hostile)))
    assert shown.isprintable() or set(c for c in shown if not c.isprintable()) == {"\n"}
    assert "sft> \\x1b[2J\\x1b]0;mine\\x07 \\u202ereversed\\u2066 \\x9b31m a\\x0db\\x00" in shown


def test_the_oldest_turns_go_when_the_context_is_full_and_that_is_said_once() -> None:
    one = Scripted("sft", said("1111", "2222", "3333", "4444", "5555"), room=20)
    session, shown = talk(["aaaa", "bbbb", "cccc", "dddd", "eeee"], one)
    answered = [turns for turns in one.asked if sum(len(t.content) for t in turns) <= 20]
    assert [[t.content for t in turns] for turns in answered] == [
        ["aaaa"],
        ["aaaa", "1111", "bbbb"],
        ["aaaa", "1111", "bbbb", "2222", "cccc"],
        ["bbbb", "2222", "cccc", "3333", "dddd"],
        ["cccc", "3333", "dddd", "4444", "eeee"],
    ]
    assert shown.count("the oldest turns are left out") == 1
    assert len(session.talk.messages(everything=True)) == 10


def test_the_checkpoint_with_the_least_room_decides_for_both_what_they_see(tmp_path: Path) -> None:
    one, other = Scripted("a", said("1111", "2222")), Scripted("b", said("1111", "3333"), room=9)
    file = tmp_path / "pairs.jsonl"
    session, _ = talk(["qqqq", "rrrr", "1"], one, other, pairs=RowsFile(file, "pair"))
    assert [row["prompt"] for row in rows(file)] == [[{"role": "user", "content": "rrrr"}]], "what they answered"
    assert one.asked[-1] == other.asked[-1] == (user("rrrr"),)
    assert session.talk.left_out == 1


def test_a_question_longer_than_the_context_is_refused_and_forgotten() -> None:
    one = Scripted("sft", said("ok"), room=5)
    session, shown = talk(["far too long", "short"], one)
    assert "(not asked: 12 tokens, and sft takes 5 beside an answer." in shown
    assert session.talk.messages() == (user("short"), assistant("ok"))


@pytest.mark.parametrize("text", ["", "s"])
def test_no_answer_takes_the_question_back(text: str) -> None:
    session, shown = talk(["q"], Scripted("sft", said(text)))
    assert ("(no answer: the question is taken back)" in shown) is (not text)
    assert len(session.talk.exchanges) == bool(text)


@pytest.mark.parametrize(
    ("ended", "note"),
    [
        ("limit", "sft> so  (cut off at max_new_tokens)"),
        ("context", "sft> so  (cut off: the context is full)"),
        ("stopped", "sft> so  (stopped)"),
    ],
)
def test_how_an_answer_ended_is_said_and_a_cut_one_is_not_saved(ended: str, note: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    _, shown = talk(["q", f"/save {file}"], Scripted("sft", [Answer("so", ended)]))  # type: ignore[arg-type]
    assert note in shown
    assert "(not saved: an answer was cut off" in shown
    assert not file.exists()


def test_an_answer_that_reads_otherwise_in_the_end_is_shown_again() -> None:
    session, shown = talk(["q"], Scripted("sft", [Answer("as it is", "whole", read_again=True)]))
    assert "\n(read as a whole:) as it is\n" in shown
    assert session.talk.exchanges[0].answer == "as it is"


def test_a_conversation_is_saved_as_a_row_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "chat.jsonl"
    _, shown = talk(["/save", f"/save {file}", "q", f"/save {file}", f"/save {file}.txt"], Scripted("sft", said("a")))
    assert rows(file) == [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    assert "(/save <file>: no file)" in shown
    assert "(nothing to save yet)" in shown
    assert f"(added to {file}: data=chat data.path={file})" in shown
    assert "its name must end in .jsonl" in shown


@pytest.mark.parametrize(
    ("key", "kept", "pair"),
    [
        ("1", "one", ("one", "two", "a", "b")),
        ("2", "two", ("two", "one", "b", "a")),
        ("=", "one", None),
        ("s", None, None),
    ],
)
def test_a_key_decides_what_is_saved_and_how_the_talk_goes_on(
    key: str, kept: str | None, pair: tuple[str, ...] | None, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.jsonl"
    one, other = Scripted("a", said("one", "next")), Scripted("b", said("two", "next"))
    session, shown = talk(["q", "x", key, "more"], one, other, pairs=RowsFile(file, "pair"), system="S")
    assert f"(one of 1 2 = s)\n{CHOOSE}" in shown
    before = () if kept is None else (user("q"), assistant(kept))
    assert one.asked[-1] == other.asked[-1] == (Message("system", "S"), *before, user("more"))
    assert "(both say the same)" in shown
    prompt = [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}]
    names = ("chosen", "rejected", "chosen_from", "rejected_from")
    expected = [] if pair is None else [{"prompt": prompt, **dict(zip(names, pair, strict=True))}]
    assert (rows(file) if file.exists() else []) == expected
    assert session.pairs is not None
    assert session.pairs.num_added == len(expected)


def test_the_end_of_the_input_at_the_choice_ends_the_chat() -> None:
    session, _ = talk(["q"], Scripted("a", said("one")), Scripted("b", said("two")))
    assert session.talk.exchanges == []


@pytest.mark.parametrize(
    ("one", "other", "key", "note"),
    [
        (Answer("one", "limit"), Answer("two", "whole"), "1", "the better answer was cut off"),
        (Answer("one", "whole"), Answer("", "whole"), "1", "an answer is empty"),
        (Answer("one", "limit"), Answer("two", "whole"), "2", None),
    ],
)
def test_a_pair_that_would_teach_the_wrong_thing_is_not_saved(
    one: Answer, other: Answer, key: str, note: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.jsonl"
    session, shown = talk(["q", key], Scripted("a", [one]), Scripted("b", [other]), pairs=RowsFile(file, "pair"))
    assert file.exists() is (note is None)
    assert "(not saved: " in shown if note else "(not saved: " not in shown
    assert note is None or note in shown
    assert len(session.talk.exchanges) == 1, "the talk goes on with it all the same"


def test_a_file_that_cannot_be_written_is_told_and_the_talk_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    pairs = RowsFile(file, "pair")
    file.write_text('{"chosen": "cut', encoding="utf-8")
    session, shown = talk(["q", "1"], Scripted("a", said("one")), Scripted("b", said("two")), pairs=pairs)
    assert "line 1 has no end. Complete it, or delete it." in shown
    assert session.talk.messages()[-1] == assistant("one")
    assert file.read_text(encoding="utf-8") == '{"chosen": "cut'


class Torn(Scripted):
    """Is interrupted in the middle of its first answer, for the second time."""

    def answer(self, prompt: Sequence[int], **options: Any) -> Answer:
        if len(self.asked) == 1:
            raise KeyboardInterrupt
        return super().answer(prompt, **options)


def test_a_second_ctrl_c_takes_the_question_back_and_the_chat_goes_on() -> None:
    session, shown = talk(["torn", "q"], Torn("sft", said("a")))
    assert "(Ctrl-D or /quit leaves)" in shown
    assert session.talk.messages() == (user("q"), assistant("a"))


def test_ctrl_c_at_the_choice_prefers_neither(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def pressed(*arguments: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("fine_tune.chat.terminal.Terminal.key", pressed)
    file = tmp_path / "pairs.jsonl"
    session, shown = talk(["q"], Scripted("a", said("one")), Scripted("b", said("two")), pairs=RowsFile(file, "pair"))
    assert session.talk.exchanges == []
    assert not file.exists()
    assert "leaves" not in shown
