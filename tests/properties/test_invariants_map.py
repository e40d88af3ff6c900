"""The map of invariants is whole: every one has tests and controls, all of them exist, and none here is forgotten."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from .invariants import INVARIANTS

HERE = Path(__file__).parent


@cache
def functions(file: Path) -> dict[str, ast.FunctionDef]:
    """Test functions of a file that are collected: those at its top level."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {
        node.name: node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def missing(repository: Path, node_id: str) -> bool:
    path, _, name = node_id.partition("::")
    file = repository / path
    return not file.is_file() or name not in functions(file)


def named(name: str) -> set[str]:
    """Invariants that a test is named after: ``test_n13_n14_...`` holds two."""
    prefix = re.match(r"test_((?:n\d\d_)+)", name)
    return {f"N{int(number)}" for number in re.findall(r"n(\d\d)_", prefix[1])} if prefix else set()


def test_all_of_them_are_there() -> None:
    assert list(INVARIANTS) == [f"N{number}" for number in range(1, 33)]


@pytest.mark.parametrize("name", INVARIANTS)
def test_each_has_tests_and_controls_that_exist(name: str, repository: Path) -> None:
    invariant = INVARIANTS[name]
    assert invariant.statement.endswith(".")
    assert invariant.tests
    assert invariant.controls
    assert [node_id for node_id in (*invariant.tests, *invariant.controls) if missing(repository, node_id)] == []


def test_every_test_here_that_is_named_after_one_is_in_the_map(repository: Path) -> None:
    found = set()
    for file in sorted(HERE.glob("test_*.py")):
        for name in functions(file):
            for number in named(name):
                kind = "controls" if "_control_" in name else "tests"
                node_id = f"{file.relative_to(repository).as_posix()}::{name}"
                assert node_id in getattr(INVARIANTS[number], kind), f"{node_id} is not among the {kind} of {number}"
                found.add(number)
    # Held elsewhere: two processes, and the formulas of the preference losses.
    assert set(INVARIANTS) - found == {"N6", "N15", "N18"}


def test_every_control_here_measures_its_error() -> None:
    """A control that only sees some difference would not say how far it is from what is allowed."""
    for file in sorted(HERE.glob("test_*.py")):
        for name, node in functions(file).items():
            if named(name) and "_control_" in name:
                called = {
                    call.func.id
                    for call in ast.walk(node)
                    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
                }
                measured = called & {"exceeds", "missed"} or "FACTOR" in ast.unparse(node)
                assert measured, f"{file.name}::{name} measures nothing"


def test_a_node_that_is_not_there_is_found(repository: Path) -> None:
    first = INVARIANTS["N1"].tests[0]
    assert not missing(repository, first)
    assert missing(repository, first + "_")
    assert missing(repository, first.replace("properties", "nowhere"))
