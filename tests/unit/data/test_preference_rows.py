"""The format "preferences": every form of a pair that people keep, from every kind of file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fine_tune.data.readers import read_local

from .pair_rows import ASK, BAD, GOOD, QUESTION, SYSTEM, TOLD, plain, read_raw, run

PREFERENCES: list[tuple[dict[str, Any], tuple[list[tuple[str, str]], str, str]]] = [
    ({"prompt": "q", "chosen": "good", "rejected": "bad"}, QUESTION),
    ({"prompt": [ASK], "chosen": "good", "rejected": "bad"}, QUESTION),
    ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, QUESTION),
    ({"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, QUESTION),
    ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, QUESTION),
    ({"prompt": "q\n", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, QUESTION),
    (
        {"prompt": "q", "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]},
        ([("system", "s"), ("user", "q")], "good", "bad"),
    ),
    (
        {"prompt": [SYSTEM, ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        ([("system", "s"), ("user", "q")], "good", "bad"),
    ),
    (
        {"chosen": [ASK, GOOD, ASK, GOOD], "rejected": [ASK, GOOD, ASK, GOOD]},
        ([("user", "q"), ("assistant", "good"), ("user", "q")], "good", "good"),
    ),
    (
        {"prompt": "q", "chosen": [ASK, BAD, {**ASK, "content": "r"}, GOOD], "rejected": [ASK, BAD, {**ASK, "content": "r"}, BAD]},
        ([("user", "q"), ("assistant", "bad"), ("user", "r")], "good", "bad"),
    ),
    (
        {"instruction": " Sum up.", "input": "It rains.", "output": "x", "chosen": "good", "rejected": "bad"},
        ([("user", "Sum up.\n\n### Context:\nIt rains.")], "good", "bad"),
    ),
    ({"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}, QUESTION),
    (
        {
            "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        ([("system", "s"), ("user", "q")], "good", "bad"),
    ),
    ({"conversations": [{"from": "human", "value": "q"}], "chosen": GOOD, "rejected": BAD}, QUESTION),
    ({"messages": [ASK], "chosen": GOOD, "rejected": BAD}, QUESTION),
    ({"question": "q", "chosen": "good", "rejected": "bad"}, QUESTION),
    ({"question": "q", "prompt": None, "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, QUESTION),
    ({"question": "x", "prompt": "q", "chosen": "good", "rejected": "bad"}, QUESTION),
    ({"question": "x", "instruction": "q", "chosen": "good", "rejected": "bad"}, QUESTION),
    ({"system": "s", "question": "q", "chosen": "good", "rejected": "bad"}, TOLD),
    ({"system": "s", "instruction": "q", "chosen": "good", "rejected": "bad"}, TOLD),
    ({"system": "s", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, TOLD),
    ({"system": "x", "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]}, TOLD),
    ({"system": "x", "prompt": [SYSTEM, ASK], "chosen": "good", "rejected": "bad"}, TOLD),
    ({"system": " \n", "prompt": "q", "chosen": "good", "rejected": "bad"}, QUESTION),
    ({"system": None, "prompt": "q", "chosen": "good", "rejected": "bad"}, QUESTION),
]  # fmt: skip


@pytest.mark.parametrize(("row", "pair"), PREFERENCES)
def test_every_form_of_preferences(row: dict[str, Any], pair: Any) -> None:
    found, rejected = run("preferences", row)
    assert rejected == []
    assert [plain(one) for one in found] == [pair]
    first = next(text for role, text in pair[0] if role == "user")
    assert found[0].group == " ".join(first.split()).lower()


def test_preference_rows_of_another_form_are_rejected_by_name() -> None:
    found, rejected = run(
        "preferences",
        {"chosen": "good", "rejected": "bad"},
        {"instruction": 1, "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": "good", "rejected": None},
        {"prompt": [ASK], "chosen": BAD, "rejected": {"from": "human", "value": "bad"}},
        {"chosen": [ASK, GOOD], "rejected": [{**ASK, "content": "r"}, BAD]},
        {"prompt": [ASK], "chosen": [SYSTEM, GOOD], "rejected": [SYSTEM, BAD]},
        {"prompt": [ASK, GOOD], "chosen": "good", "rejected": "bad"},
        {"prompt": [ASK, SYSTEM], "chosen": "good", "rejected": "bad"},
        {"prompt": [GOOD, ASK], "chosen": "good", "rejected": "bad"},
        {"prompt": [SYSTEM], "chosen": "good", "rejected": "bad"},
        {"chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [{"role": "user", "content": [{"type": "image_url"}]}], "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": ["good"], "rejected": ["bad"]},
        {"prompt": 3, "chosen": "good", "rejected": "bad"},
    )
    assert found == []
    assert rejected == [
        ("missing_field", "f:1 (prompt)"),
        ("wrong_type", "f:2 (instruction)"),
        ("missing_field", "f:3 (rejected)"),
        ("no_assistant_turn", "f:4 (rejected)"),
        ("differing_prompts", "f:5 (rejected)"),
        ("differing_prompts", "f:6 (prompt)"),
        ("no_question", "f:7 (prompt)"),
        ("no_question", "f:8 (prompt)"),
        ("assistant_speaks_first", "f:9 (prompt)"),
        ("no_turns", "f:10 (prompt)"),
        ("no_turns", "f:11 (prompt)"),
        ("not_text", "f:12 (content)"),
        ("wrong_type", "f:13 (turn)"),
        ("wrong_type", "f:14 (prompt)"),
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen-rating", "rejected-rating")],
)
def test_each_name_of_the_scores(chosen: str, rejected: str) -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    (pair,), _ = run("preferences", {**row, chosen: 5, rejected: 1.5})
    assert pair.scores == (5.0, 1.5)


def test_the_heading_of_an_alpaca_input_is_an_option() -> None:
    row = {"instruction": "a", "input": "b", "chosen": "good", "rejected": "bad"}
    (pair,), _ = run("preferences", row, context_heading="")
    assert plain(pair)[0] == [("user", "a\n\nb")]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_preferences_are_read_from_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": "q", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "score_chosen": 2.0, "score_rejected": 1.0}]
    file = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text(json.dumps(rows if suffix == "json" else rows[0]))
    (pair,), rejected = read_raw("preferences", read_local(str(file)))
    assert (plain(pair), pair.scores, rejected) == (QUESTION, (2.0, 1.0), [])
