"""Rows are added whole or not at all, and only to a file of their kind."""

from __future__ import annotations

import json
import re
import resource
import signal
from pathlib import Path
from typing import Literal

import pytest

from fine_tune.chat.rows_file import RowsFile
from fine_tune.data.readers import read_local
from fine_tune.data.sources import chat, preferences
from fine_tune.errors import ConfigError, StorageError
from fine_tune.text.conversation import Message

PROMPT = (
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Yes?"),
    Message("user", "Go\non \u202e"),
)


def never(reason: str, where: str) -> None:
    raise AssertionError(f"{where}: {reason}")


def test_pairs_read_as_the_preferences_they_are(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    pairs = RowsFile(file, "pair")
    pairs.add_pair(PROMPT, "Sure.\n", "\x9bNo\u2028 \U0001f600", labels=("sft", "base"))
    RowsFile(file, "pair").add_pair(PROMPT[1:2], "b", "a", labels=("base", "sft"))
    assert file.read_bytes().isascii()
    one, two = preferences.read(read_local(str(file)), preferences.PreferencesOptions(), never)
    assert (one.prompt, one.chosen, one.rejected) == (PROMPT, "Sure.\n", "\x9bNo\u2028 \U0001f600")
    assert (two.prompt, two.chosen, two.rejected, two.scores) == (PROMPT[1:2], "b", "a", None)
    assert pairs.num_added == 1


def test_conversations_read_as_the_conversations_they_are(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    turns = (*PROMPT, Message("assistant", "Gone."))
    RowsFile(file, "conversation").add_conversation(turns)
    [found] = chat.read(read_local(str(file)), chat.ChatOptions(), never)
    assert found.messages == turns


@pytest.mark.parametrize(
    ("name", "content", "kind", "told"),
    [
        ("p.txt", None, "pair", "its name must end in .jsonl, which data.path= reads. Pass"),
        ("p.jsonl", "", "pair", None),
        ("p.jsonl", '{"chosen": "a"', "pair", "line 1 has no end. Complete it, or delete it."),
        ("p.jsonl", '{"chosen": "a"}\n{"cho', "pair", "line 2 has no end. Complete it, or delete it."),
        ("p.jsonl", "chosen\n", "pair", "line 1 is not JSON. Pass another file."),
        ("p.jsonl", '{"messages": []}\n', "pair", "its rows are no pairs (line 1 has no chosen). Pass another file."),
        ("p.jsonl", '{"chosen": ""}\n', "conversation", "its rows are no conversations (line 1 has no messages)."),
        ("p.jsonl", "[1]\n", "pair", "its rows are no pairs (line 1 has no chosen). Pass another file."),
    ],
)
def test_a_file_of_something_else_is_refused_before_anybody_speaks(
    name: str, content: str | None, kind: Literal["pair", "conversation"], told: str | None, tmp_path: Path
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_text(content, encoding="utf-8")
    if told is None:
        assert RowsFile(file, kind).num_added == 0
        return
    with pytest.raises(ConfigError, match=re.escape(told)):
        RowsFile(file, kind)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"p\.jsonl: is a folder"):
        RowsFile(tmp_path / "p.jsonl", "pair")


def test_half_a_row_never_stays(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    pairs = RowsFile(file, "pair")
    pairs.add_pair(PROMPT, "a", "b", labels=("x", "y"))
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # The disk takes ten more bytes: the kernel writes these and no more.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
        with pytest.raises(StorageError, match=r"pairs\.jsonl: not saved, the disk is full\. The file is as it was\."):
            pairs.add_pair(PROMPT, "c", "d", labels=("x", "y"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), hard))
        with pytest.raises(StorageError, match=r"not saved, File too large\. The file is as it was\."):
            pairs.add_pair(PROMPT, "c", "d", labels=("x", "y"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read_bytes() == before
    pairs.add_pair(PROMPT, "c", "d", labels=("x", "y"))
    assert [json.loads(line)["chosen"] for line in file.read_text(encoding="utf-8").splitlines()] == ["a", "c"]
    assert pairs.num_added == 2
