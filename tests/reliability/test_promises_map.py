"""The table of promises names every promise once, and every test in it is there."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from .promises import PROMISES
from .security import SECURITY

TESTS = Path(__file__).resolve().parent.parent
ALL = {**PROMISES, **SECURITY}


@cache
def names_in(file: Path) -> frozenset[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def missing(nodes: tuple[str, ...]) -> list[str]:
    found = [(node, TESTS / node.split("::")[0], node.split("::")[1]) for node in nodes]
    return [node for node, file, name in found if not file.is_file() or name not in names_in(file)]


def test_every_promise_is_there_once() -> None:
    assert list(PROMISES) == [f"P{i}" for i in range(1, 29)]
    assert list(SECURITY) == [f"S{i}" for i in range(1, 13)]
    assert len({promise.text for promise in ALL.values()}) == len(ALL)


def test_every_test_that_is_named_exists() -> None:
    assert {name: gone for name, promise in ALL.items() if (gone := missing(promise.tests))} == {}
    assert all(promise.tests for promise in ALL.values())


def test_a_test_that_is_not_there_is_noticed() -> None:
    assert missing(("reliability/test_promises_map.py::test_nothing", "reliability/gone.py::test_x")) == [
        "reliability/test_promises_map.py::test_nothing", "reliability/gone.py::test_x"
    ]  # fmt: skip
    assert missing(("reliability/test_promises_map.py::test_a_test_that_is_not_there_is_noticed",)) == []
