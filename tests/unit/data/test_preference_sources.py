"""Rows of each preference format to pairs: the prompt once, one answer per side, a reason for every row left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fine_tune.data.pair_lint import Linter
from fine_tune.data.readers import read_local
from fine_tune.data.sources.registry import find_format, parse_options
from fine_tune.errors import ConfigError
from fine_tune.text.answers import is_correct
from fine_tune.text.conversation import Conversation, PreferencePair

from .pair_rows import ASK, BAD, GOOD, QUESTION, SYSTEM, TOLD, Rejected, plain, read_raw, run


def test_ultrafeedback_as_the_hub_has_it_and_as_texts() -> None:
    found, rejected = run(
        "ultrafeedback",
        {
            "prompt": "q",
            "prompt_id": "x",
            "chosen": [ASK, GOOD],
            "rejected": [ASK, BAD],
            "messages": [ASK, GOOD],
            "score_chosen": 8.5,
            "score_rejected": 3,
        },
        {"prompt": "q", "chosen": "good", "rejected": "bad", "score_chosen": 8.5, "score_rejected": 3.0},
        {
            "prompt": "q",
            "chosen": "good",
            "rejected": "bad",
            "metadata": {"score_chosen": 8.5, "score_rejected": 3.0},
        },
    )
    assert rejected == []
    assert [plain(pair) for pair in found] == [QUESTION] * 3
    assert [pair.scores for pair in found] == [(8.5, 3.0)] * 3
    assert (found[0].id, found[0].group, found[0].answer) == ("f:1", "q", None)


def test_a_system_column_of_ultrafeedback_opens_a_prompt_without_its_own() -> None:
    texts = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    own = {"prompt": "q", "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]}
    found, rejected = run(
        "ultrafeedback",
        {**texts, "system": "s"},
        {**own, "system": "another"},
        {**texts, "system": ""},
        {**texts, "system": 1},
    )
    assert [plain(pair) for pair in found] == [TOLD, TOLD, QUESTION]
    assert found[0].group == "q"
    assert rejected == [("wrong_type", "f:4 (system)")]


def test_ultrafeedback_rows_of_another_form_are_rejected_by_name() -> None:
    other = {"role": "user", "content": "another"}
    found, rejected = run(
        "ultrafeedback",
        {"chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": "good"},
        {"prompt": "q", "chosen": "good", "rejected": 3},
        {"prompt": "q", "chosen": [other, GOOD], "rejected": [other, BAD]},
        {"prompt": "q", "chosen": [ASK, GOOD], "rejected": [other, BAD]},
        {"prompt": "q", "chosen": [ASK, GOOD], "rejected": [ASK, BAD, ASK, BAD]},
        {"prompt": "q", "chosen": [ASK], "rejected": [ASK]},
        {"prompt": "q", "chosen": [], "rejected": "bad"},
        {"prompt": "q", "chosen": [ASK, {"role": "tool", "content": "x"}], "rejected": "bad"},
    )
    assert found == []
    assert rejected == [
        ("missing_field", "f:1 (prompt)"),
        ("missing_field", "f:2 (rejected)"),
        ("wrong_type", "f:3 (rejected)"),
        ("differing_prompts", "f:4 (prompt)"),
        ("differing_prompts", "f:5 (rejected)"),
        ("differing_prompts", "f:6 (rejected)"),
        ("no_assistant_turn", "f:7 (chosen)"),
        ("no_turns", "f:8 (chosen)"),
        ("unknown_role", "f:9 (tool)"),
    ]


@pytest.mark.parametrize("scores", [(None, 3.0), (True, 3.0), ("8", 3.0), (float("nan"), 3.0), (10**400, 3.0)])
def test_scores_count_only_where_both_are_numbers(scores: tuple[Any, Any]) -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    (pair,), _ = run("ultrafeedback", {**row, "score_chosen": scores[0], "score_rejected": scores[1]})
    assert pair.scores is None


def test_empty_sides_and_white_space_are_handed_on_to_the_linter() -> None:
    found, rejected = run("ultrafeedback", {"prompt": " q\n", "chosen": "", "rejected": " bad "})
    assert rejected == []
    assert plain(found[0]) == ([("user", " q\n")], "", " bad ")


def hh(chosen: str, rejected: str) -> dict[str, Any]:
    return {"chosen": chosen, "rejected": rejected}


def test_hh_transcripts_are_cut_at_their_common_turns() -> None:
    start = "\n\nHuman: q1\n\nwith a paragraph\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:"
    found, rejected = run(
        "hh_rlhf",
        hh(f"{start} good", f"{start} bad\n\nmore bad"),
        hh("\n\nHuman: Q1 \n\nAssistant: same", "\n\nHuman: Q1\n\nAssistant: same"),
        hh("\n\nHuman: q\n\nAssistant:", "\n\nHuman: q\n\nAssistant: bad"),
        hh("Human: q\n\nAssistant: good", "Human: q\n\nAssistant: bad"),
    )
    assert rejected == []
    assert [plain(pair) for pair in found] == [
        (
            [("user", "q1\n\nwith a paragraph"), ("assistant", "a1"), ("user", "q2")],
            "good",
            "bad\n\nmore bad",
        ),
        ([("user", "Q1")], "same", "same"),
        ([("user", "q")], "", "bad"),
        QUESTION,
    ]
    assert [pair.group for pair in found] == ["q1 with a paragraph", "q1", "q", "q"]


def test_hh_rows_of_another_form_are_rejected_by_name() -> None:
    ask = "\n\nHuman: q"
    good = f"{ask}\n\nAssistant: good"
    found, rejected = run(
        "hh_rlhf",
        hh(good, "\n\nHuman: r\n\nAssistant: bad"),
        # Cut one turn earlier on one side: the common turns end with an answer, or two turns follow them.
        hh(f"{good}\n\nHuman: r\n\nAssistant: x", f"{ask}\n\nAssistant: bad"),
        hh(f"{good}\n\nHuman: r", f"{good}\n\nHuman: s"),
        hh(f"{good}\n\nAssistant: x", f"{good}\n\nAssistant: y"),
        hh("\n\nAssistant: a\n\nHuman: q\n\nAssistant: x", "\n\nAssistant: a\n\nHuman: q\n\nAssistant: y"),
        hh("\n\nAssistant: x", "\n\nAssistant: y"),
        hh(f"Hi!{good}", good),
        hh("no marker", good),
        {"chosen": good},
        {"chosen": good, "rejected": [1]},
    )
    assert found == []
    assert rejected == [
        ("differing_prompts", "f:1 (rejected)"),
        ("differing_prompts", "f:2 (rejected)"),
        ("no_assistant_turn", "f:3 (chosen)"),
        ("roles_out_of_order", "f:4 (chosen)"),
        ("assistant_speaks_first", "f:5 (prompt)"),
        ("no_turns", "f:6 (prompt)"),
        ("text_before_first_turn", "f:7 (chosen)"),
        ("no_turns", "f:8 (chosen)"),
        ("missing_field", "f:9 (rejected)"),
        ("wrong_type", "f:10 (rejected)"),
    ]


def test_formats_without_options_say_so() -> None:
    for name in ("ultrafeedback", "hh_rlhf"):
        with pytest.raises(ConfigError, match=rf"data.options.beta: format {name} has no such option. Valid: none\."):
            parse_options(name, {"beta": 1})


def test_world_pairs_hold_out_the_questions_that_world_holds_out() -> None:
    wanted = {"num_train": 40, "num_heldout": 30, "seed": 3}
    pairs, rows = find_format("world_pairs"), find_format("world")
    assert pairs.heldout is not None
    assert rows.heldout is not None
    options = parse_options("world_pairs", wanted)
    heldout = list(pairs.heldout(options))
    asked = list(rows.heldout(parse_options("world", wanted)))
    assert len(heldout) == 30
    for pair, row in zip(heldout, asked, strict=True):
        assert isinstance(pair, PreferencePair)
        assert isinstance(row, Conversation)
        assert (pair.id, pair.group, pair.prompt, pair.answer) == (row.id, row.group, row.messages[:1], row.answer)
    train, rejected = read_raw_world(options)
    assert (len(train), rejected) == (40, [])
    assert not {pair.group for pair in train} & {pair.group for pair in heldout}
    for pair in train:
        assert pair.answer is not None
        assert is_correct(pair.chosen, pair.answer, "first_sentence")
        assert pair.rejected != pair.chosen


def read_raw_world(options: Any) -> tuple[list[PreferencePair], Rejected]:
    rejected: Rejected = []
    found = find_format("world_pairs").read((), options, lambda reason, row: rejected.append((reason, row)))
    return [row for row in found if isinstance(row, PreferencePair)], rejected


def test_world_pairs_name_their_format_when_they_refuse_an_option() -> None:
    with pytest.raises(ConfigError, match=r"data.options.num_train=0: .* \(format world_pairs\)"):
        parse_options("world_pairs", {"num_train": 0})


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "file", "read", "flaws"),
    [
        ("ultrafeedback", "ultrafeedback_train_1000.jsonl", 1000, {"identical_pair": 4, "empty_side": 2, "tie": 110}),
        ("ultrafeedback", "ultrafeedback_eval_200.jsonl", 200, {"identical_pair": 1, "tie": 24}),
        ("preferences", "ultrafeedback_train_1000.jsonl", 1000, {"identical_pair": 4, "empty_side": 2, "tie": 110}),
        ("preferences", "instruction-data-with-preference.json", 1100, {"identical_pair": 6}),
    ],
)
def test_real_preferences_are_all_read_and_their_flaws_found(
    real_data: Path, name: str, file: str, read: int, flaws: dict[str, int]
) -> None:
    pairs, rejected = read_raw(name, read_local(str(real_data / "preference" / file)))
    assert (len(pairs), rejected) == (read, [])
    assert all((pair.scores is not None) == file.startswith("ultra") for pair in pairs)
    found: dict[str, list[str]] = {}
    kept = Linter("drop").lint(pairs, on_reject=lambda reason, row: found.setdefault(reason, []).append(row))
    assert {reason: len(rows) for reason, rows in found.items()} == flaws
    assert len(kept) == read - sum(flaws.values())
    if name == "ultrafeedback" and read == 1000:
        assert [row.rpartition(":")[2] for row in found["identical_pair"]] == ["307", "656", "911", "998"]
