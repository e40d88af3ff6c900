"""The allocator is set up only where the user has not done it."""

from __future__ import annotations

import os

import pytest

from fine_tune.allocator import VARIABLES, let_segments_grow


@pytest.mark.parametrize("theirs", [None, *VARIABLES])
def test_what_the_user_set_stays(theirs: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if theirs:
        monkeypatch.setenv(theirs, "max_split_size_mb:128")
    let_segments_grow()
    found = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    assert found == ({theirs: "max_split_size_mb:128"} if theirs else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
