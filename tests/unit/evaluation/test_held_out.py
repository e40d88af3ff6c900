"""Exact match over held-out items, and files that can be read back."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fine_tune.data.prepare import EvalItem
from fine_tune.evaluation.answers import Completion
from fine_tune.evaluation.held_out import HeldOut, evaluate_held_out, read_held_out, write_held_out
from fine_tune.text.conversation import Message

SAID = [
    Completion("Paris", 1, True), Completion("It is Rome.", 4, True), Completion("", 0, True),
    Completion("\u00e9 Oslo", 3, False),
]  # fmt: skip
TARGETS = ["Paris", "Rome", "Bern", "Oslo"]
ITEMS = [EvalItem(id=f"q{i}", messages=(Message("user", f"Where {i}?"),), answer=t) for i, t in enumerate(TARGETS)]


def answerer() -> Any:
    return SimpleNamespace(answer=lambda conversations, **_: SAID[: len(conversations)])


@pytest.mark.parametrize("num", [1, 4])
def test_the_share_of_right_answers_and_the_mean_length(num: int) -> None:
    found = evaluate_held_out(answerer(), ITEMS[:num], rule="whole", max_new_tokens=8)
    assert found.exact_match == (1.0 if num == 1 else 0.25)
    assert found.mean_completion_tokens == (1.0 if num == 1 else 2.0)


def test_without_a_rule_nothing_is_judged() -> None:
    found = evaluate_held_out(answerer(), ITEMS, rule=None, max_new_tokens=8)
    assert found.exact_match is None
    assert found.mean_completion_tokens == 2.0


@pytest.mark.parametrize("rule", ["whole", None])
def test_what_is_written_is_read_back(tmp_path: Path, rule: str | None) -> None:
    result = HeldOut(0.25 if rule else None, 2.0, tuple(SAID))
    write_held_out(tmp_path / "held_out", result, ITEMS, rule=rule, checkpoint="final", started=time.perf_counter() - 5)
    assert read_held_out(tmp_path / "held_out") == result
    lines = [json.loads(line) for line in (tmp_path / "held_out" / "items.jsonl").read_text("ascii").splitlines()]
    assert lines[1] == {
        "id": "q1", "prompt": "Where 1?", "completion": "It is Rome.", "target": "Rome", "correct": False if rule else None,
        "num_tokens": 4, "stopped": True,
    }  # fmt: skip
    assert [line["correct"] for line in lines] == ([True, False, False, False] if rule else [None] * 4)
    metrics = json.loads((tmp_path / "held_out" / "metrics.json").read_text())
    assert (metrics["name"], metrics["checkpoint"], metrics["num_items"]) == ("held_out", "final", 4)
    assert metrics["metrics"]["stop_rate"] == 0.75
    assert 5 <= metrics["seconds"] < 60


def test_what_an_earlier_version_wrote_is_read_with_nothing_known_of_how_answers_ended(tmp_path: Path) -> None:
    write_held_out(tmp_path, HeldOut(0.25, 2.0, tuple(SAID)), ITEMS, rule="whole", checkpoint="final", started=0.0)
    file = tmp_path / "items.jsonl"
    text = file.read_text("ascii").replace(', "stopped": true', "").replace(', "stopped": false', "")
    assert "stopped" not in text
    file.write_text(text, "ascii")
    found = read_held_out(tmp_path)
    assert found.completions == tuple(Completion(c.text, c.num_tokens, None) for c in SAID)
    write_held_out(tmp_path, found, ITEMS, rule="whole", checkpoint="final", started=0.0)
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"]["stop_rate"] is None
