"""Raw rows through a preference format."""

from __future__ import annotations

from typing import Any

from fine_tune.data.readers import RawRow
from fine_tune.data.sources.registry import find_format, parse_options
from fine_tune.text.conversation import PreferencePair

Rejected = list[tuple[str, str]]
ASK = {"role": "user", "content": "q"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
SYSTEM = {"role": "system", "content": "s"}


def read_raw(name: str, raw: list[RawRow], **options: Any) -> tuple[list[PreferencePair], Rejected]:
    rejected: Rejected = []
    own = find_format(name)
    found = list(own.read(raw, parse_options(name, options), lambda reason, row: rejected.append((reason, row))))
    pairs = [row for row in found if isinstance(row, PreferencePair)]
    assert len(pairs) == len(found)
    assert len(pairs) + len(rejected) == len(raw)
    return pairs, rejected


def run(name: str, *rows: dict[str, Any], **options: Any) -> tuple[list[PreferencePair], Rejected]:
    return read_raw(name, [RawRow(data, f"f:{index}") for index, data in enumerate(rows, start=1)], **options)


def plain(pair: PreferencePair) -> tuple[list[tuple[str, str]], str, str]:
    return [(message.role, message.content) for message in pair.prompt], pair.chosen, pair.rejected


QUESTION = ([("user", "q")], "good", "bad")
TOLD = ([("system", "s"), ("user", "q")], "good", "bad")
