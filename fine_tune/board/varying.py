"""What differs between runs, found in their configs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from fine_tune.board.rows import Row
from fine_tune.report.leaves import leaf_text
from fine_tune.report.visible import brief
from fine_tune.run_folder import UNNAMED

MAX_KEYS = 12
# Longer numbers are shortened where they are shown.
MAX_DIGITS = 8
# Names that begin alike are told apart by their ends.
LEAST_SHARED = 8
MISSING = object()


def varying(rows: Sequence[Row], swept: Sequence[str]) -> tuple[str, ...]:
    """Return the keys whose values differ: those of the sweep first, then in the order of the configs.

    What the option of a group brings with it is told by the option's name.
    """
    keys = dict.fromkeys(key for row in rows for key in row.config)
    read = [row for row in rows if row.path is not None and row.config]
    differ = [key for key in keys if key.split(".")[0] not in UNNAMED and len({_text(row, key) for row in read}) > 1]
    first = [key for key in dict.fromkeys(swept) if any(value_of(row, key) is not MISSING for row in rows)]
    chosen = {key.removesuffix(".name") for key in (*first, *differ) if key.endswith(".name") or "." not in key}
    further = [key for key in differ if key not in first and not _told(key, first, chosen, read)]
    return (*first, *further)


def value_of(row: Row, key: str) -> Any:
    """Return a run's value of a key, of a group the name of its option; ``MISSING`` where it has none."""
    if key in row.config:
        return row.config[key]
    named = row.groups.get(key)
    return MISSING if named is None else named


def settings(row: Row, keys: Sequence[str]) -> dict[str, Any]:
    """Return a run's values of keys, without those that it has not."""
    found = {key: value_of(row, key) for key in keys}
    return {key: value for key, value in found.items() if value is not MISSING}


def _told(key: str, first: Sequence[str], chosen: set[str], rows: Sequence[Row]) -> bool:
    """Tell whether a group's option says this value already."""
    group = key.split(".")[0]
    if group not in chosen or group == key:
        return False
    if key == f"{group}.name":
        return group in first
    values: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        values[str(row.groups.get(group))].add(_text(row, key))
    return len(values) > 1 and all(len(found) == 1 for found in values.values())


def _text(row: Row, key: str) -> str:
    return leaf_text(row.config[key]) if key in row.config else "\0"


def number_of_values(rows: Sequence[Row], key: str) -> int:
    """Count the values that a key takes."""
    return len({text_of(row.settings, key) for row in rows if key in row.settings})


def text_of(values: Mapping[str, Any], key: str) -> str:
    """Write a value as the config has it; empty where there is none."""
    return leaf_text(values[key]) if key in values else ""


def shown_of(values: Mapping[str, Any], key: str) -> str:
    """Write a value for a reader: long numbers shortened, lists without quotes; empty where there is none.

    Example:
        >>> [shown_of({"a": v}, "a") for v in (0.00010611092694749513, 64, ["q_proj", "v_proj"])]
        ['0.0001061', '64', '[q_proj, v_proj]']
    """
    value = values.get(key)
    if isinstance(value, float) and len(repr(value)) > MAX_DIGITS:
        return f"{value:.4g}"
    if isinstance(value, list) and not any(isinstance(entry, list) for entry in value):
        return brief(f"[{', '.join(leaf_text(entry) for entry in value)}]", 120)
    return text_of(values, key)


def shared_beginning(names: Sequence[str]) -> str:
    """Return what all names begin with, up to a separator; empty if that is short.

    Example:
        >>> shared_beginning(["tiny-qlora-sft-1a", "tiny-qlora-sft-1b"]), shared_beginning(["a-1", "a-2"])
        ('tiny-qlora-sft-', '')
    """
    ends = (min(names), max(names)) if len(names) > 1 else ("", "")
    # What the first and the last by letter share, all between them share.
    begins = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False)))
    begins = begins[: max(begins.rfind("-"), begins.rfind("_")) + 1]
    return begins if len(begins) >= LEAST_SHARED else ""
