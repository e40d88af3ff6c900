"""A nested config as single values under dotted keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from fine_tune.report.visible import brief, compact, plain

MAX_LEAVES = 2000
MAX_DEPTH = 12


def leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values of a config by dotted key; lists of plain values are one value.

    Example:
        >>> list(leaves({"method": {"rank": 8}, "seed": 1}))
        [('method.rank', 8), ('seed', 1)]
    """
    return islice(_walk(tree, "", 0), MAX_LEAVES)


def leaf_texts(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the values of a config by dotted key, each as text."""
    return ((key, leaf_text(value)) for key, value in leaves(tree))


def leaf_text(value: Any) -> str:
    """Write a value the way a config has it.

    Example:
        >>> [leaf_text(v) for v in (None, True, 2e-05, "all-linear", [1, 2])]
        ['null', 'true', '2e-05', 'all-linear', '[1, 2]']
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return brief(compact(value), 300)
    return (
        repr(value) if isinstance(value, int | float) else brief(value if isinstance(value, str) else plain(value), 300)
    )


def _walk(node: Any, key: str, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node and depth < MAX_DEPTH:
        for name, inner in node.items():
            yield from _walk(inner, f"{key}.{name}" if key else str(name), depth + 1)
    elif isinstance(node, list) and any(isinstance(inner, dict | list) for inner in node) and depth < MAX_DEPTH:
        # Never written out whole: a few aliases of YAML can stand for more text than there is memory.
        for index, inner in enumerate(node):
            yield from _walk(inner, f"{key}[{index}]", depth + 1)
    else:
        yield key, "..." if depth >= MAX_DEPTH else node
