"""Several refusals at once: all are told, briefly, and the first one's exit code counts."""

from __future__ import annotations

import pickle

import pytest

from fine_tune.errors import ConfigError, DataError, EnvironmentProblem, SeveralProblems
from fine_tune.interrupts import Interrupted
from fine_tune.preflight.findings import Findings


def test_nothing_found_refuses_nothing_and_names_what_was_looked_at() -> None:
    findings = Findings()
    for name in ("device", "data"):
        with findings.of(name):
            pass
    findings.refuse()
    assert findings.looked_at == ["device", "data"]


def test_one_problem_is_raised_as_it_is() -> None:
    findings, problem = Findings(), DataError("no row is left")
    with findings.of("data"):
        raise problem
    with pytest.raises(DataError) as raised:
        findings.refuse()
    assert raised.value is problem


def test_several_are_told_together_with_the_first_ones_code() -> None:
    findings = Findings()
    for problem in (
        EnvironmentProblem("no GPU"),
        ConfigError(["a = 1: no.", "b = 2: neither."]),
        DataError("damaged:\n" + "\n".join(f"  - row {i}" for i in range(20))),
    ):
        with findings.of("x"):
            raise problem
    with pytest.raises(SeveralProblems) as raised:
        findings.refuse()
    error = raised.value
    assert error.exit_code == 5
    told = str(error).splitlines()
    assert told[0] == "3 problems, found before anything was loaded:"
    assert told[1:4] == ["  - no GPU", "  - a = 1: no.", "  - b = 2: neither."]
    assert told[4:] == ["  - damaged:", *(f"    - row {i}" for i in range(4)), "    ... and 16 more lines"]
    assert len(told) <= 15
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.exit_code) == (str(error), 5)


def test_the_same_problem_is_told_once() -> None:
    findings = Findings()
    for _ in range(2):
        with findings.of("x"):
            raise DataError("no such file")
    with pytest.raises(DataError, match="no such file"):
        findings.refuse()


def test_a_signal_and_a_bug_are_no_findings() -> None:
    findings = Findings()
    with pytest.raises(Interrupted), findings.of("data"):
        raise Interrupted(15, "stopped")
    with pytest.raises(ZeroDivisionError), findings.of("data"):
        raise ZeroDivisionError
    findings.refuse()
