"""When a drill has passed, what it shows, and what it leaves."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from fine_tune.drills.finding import Differs, Drilled, Finding

SAME = Finding("adapter", {"": 0.0}, {"": 0.0}, "3 compared")
NOISE = Finding("gradients", {"loss": 0.0, "gradients": 2e-6}, {"loss": 1e-5, "gradients": 1e-4}, group="float32")
TOO_FAR = Finding("rows alone", {"loss": 0.0, "gradients": 2e-3}, {"loss": 1e-5, "gradients": 1e-4}, "step 1: v_proj")
LOST = Finding("random states", {"": math.inf}, {"": 0.0})
TOLD_APART = Finding("control", {"loss": 0.0, "gradients": 0.6}, {"loss": 1e-3, "gradients": 1e-2}, is_control=True)
BLIND = Finding("control", {"": 0.0}, {"": 0.0}, is_control=True)
LEFT_OUT = Finding("two processes", skipped="there is one GPU")


@pytest.mark.parametrize("finding", [SAME, NOISE, TOLD_APART, LEFT_OUT])
def test_what_is_as_it_must_be(finding: Finding, tmp_path: Path) -> None:
    assert finding.passed
    Drilled("resume", tmp_path, [finding]).refuse()


@pytest.mark.parametrize(
    ("finding", "told"),
    [
        (TOO_FAR, r"rows alone: loss none, gradients 2.0e-03; allowed: 1.0e-05 / 1.0e-04. step 1: v_proj"),
        (LOST, r"random states: inf; allowed: none"),
        (BLIND, r"control: none; allowed: must differ"),
    ],
)
def test_what_is_not_ends_with_its_numbers(finding: Finding, told: str, tmp_path: Path) -> None:
    with pytest.raises(Differs, match="1 of 2 are not as they must be") as error:
        Drilled("resume", tmp_path, [SAME, finding]).refuse()
    assert told in str(error.value)
    assert error.value.exit_code == 1


def test_a_control_within_rounding_proves_nothing() -> None:
    within = Finding("control", {"loss": 1e-6, "gradients": 5e-3}, {"loss": 1e-3, "gradients": 1e-2}, is_control=True)
    assert within.verdict == "NOT TOLD APART"


def test_the_table_and_the_record_say_the_same(tmp_path: Path) -> None:
    drilled = Drilled("equivalence", tmp_path, [NOISE, TOO_FAR, LEFT_OUT], {"device": "CPU"}, ["dropout 0."])
    console = Console(file=io.StringIO(), width=120)
    drilled.show(console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("float32", "2.0e-06", "1.0e-05 / 1.0e-04", "DIFFERS", "Skipped: two processes: there is one GPU.", "dropout 0."):
        assert part in shown
    record = json.loads(drilled.write("fine-tune drill equivalence").read_text(encoding="utf-8"))
    assert record["passed"] is False
    assert record["device"] == "CPU"
    assert [finding["passed"] for finding in record["findings"]] == [True, False, True]
    assert record["findings"][1]["gaps"]["gradients"] == 2e-3


def test_infinity_is_written_as_a_word(tmp_path: Path) -> None:
    record = json.loads(Drilled("resume", tmp_path, [LOST]).write("x").read_text(encoding="utf-8"))
    assert record["findings"][0]["gaps"] == {"": "infinite"}
