"""Run folders in odd places work, or are refused in one message before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fine_tune
from fine_tune import assembly
from fine_tune.errors import ConfigError, FineTuneError, StorageError

JOB = [
    "trainer=cpu", "trainer.max_steps=2", "data.num_eval_items=0", "data.max_examples=64", "data.max_val_examples=8",
    "callbacks.preview=null",
]  # fmt: skip


class Reached(Exception):
    """The weights would be loaded now."""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Start a run in a folder of this name; its weights are never loaded."""

    def load(*_: Any, **__: Any) -> Any:
        raise Reached

    monkeypatch.setattr(assembly, "load_network", load)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINE_TUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "deeper")
    (tmp_path / "loop").symlink_to("loop")
    return lambda name, *more: fine_tune.train([*JOB, f"run_dir='{name}'", *more])


REFUSED = {
    "a file": ("file", ConfigError),
    "below a file": ("file/run", StorageError),
    "a name too long": ("d" * 256, StorageError),
    "a name too long below": (f"a/{'d' * 300}", StorageError),
    "too many bytes": ("\u00e9" * 128, StorageError),
    "a link to nowhere": ("nowhere", StorageError),
    "a link to itself": ("loop", StorageError),
    "below it": ("loop/x", StorageError),
    "where nobody may make a folder": ("/proc/run", StorageError),
    "no name at all": ("a\0b", ConfigError),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_where_no_run_can_be_is_told_before_a_weight_is_loaded(start: Callable[[str], Any], kind: str) -> None:
    name, error = REFUSED[kind]
    with pytest.raises(FineTuneError) as refused:
        start(name)
    assert type(refused.value) is error
    assert name.split("\0")[0][:40] in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 15


def test_a_cache_that_cannot_be_is_told_in_the_same_message_as_the_folder(start: Callable[..., Any]) -> None:
    with pytest.raises(FineTuneError) as refused:
        start("file/run", "data.cache_dir=file")
    told = str(refused.value)
    assert "data.cache_dir=" in told
    assert "is a file. Name a folder" in told
    assert "file/run" in told


@pytest.mark.parametrize("name", ["a b", "\u00fc \U0001f600 \u202ex", "-x", "d" * 255, "a'b".replace("'", "\\'"), "$HOME;`x`"])
def test_other_names_are_names(start: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    with pytest.raises(Reached):
        start(name)
    assert (tmp_path / name.replace("\\'", "'") / "config.yaml").is_file()
