"""Files that are whole or absent, also when the writer dies or the disk is full."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fine_tune import storage
from fine_tune.errors import StorageError

OPERATIONS = ("fsync", "replace")


class Killed(BaseException):
    """Stands for a process that ends here: nothing after it runs, no handler helps."""


def record(
    monkeypatch: pytest.MonkeyPatch, *, fail_at: int | None = None, error: BaseException | None = None
) -> list[str]:
    """Note every flush and rename in order, and raise at one of them."""
    calls: list[str] = []
    places: dict[int, str] = {}
    really_open = os.open

    def opened(path: Any, *rest: Any, **named: Any) -> int:
        handle = really_open(path, *rest, **named)
        places[handle] = str(path)
        return handle

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if fail_at == len(calls):
                raise error or Killed
            what = places.get(arguments[0], "content") if name == "fsync" else str(arguments[1])
            calls.append(f"{name} {'folder' if Path(what).is_dir() else Path(what).name}")
            return original(*arguments)

        return call

    monkeypatch.setattr(storage.os, "open", opened)
    for name in OPERATIONS:
        monkeypatch.setattr(storage.os, name, wrap(name, getattr(os, name)))
    return calls


def test_content_is_flushed_before_it_takes_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record(monkeypatch)
    storage.write_text(tmp_path / "a.txt", "new")
    assert calls == ["fsync content", "replace a.txt", "fsync folder"]
    assert (tmp_path / "a.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_flushed_file_by_file_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record(monkeypatch)
    with storage.new_folder(tmp_path / "place") as folder:
        assert folder.name.startswith(storage.TEMP_PREFIX)
        assert not (tmp_path / "place").exists()
        (folder / "x").write_text("1")
    assert calls == ["fsync x", "fsync folder", "replace place", "fsync folder"]
    assert (tmp_path / "place" / "x").read_text() == "1"


@pytest.mark.parametrize("fail_at", [0, 1])
def test_death_before_the_rename_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    file = tmp_path / "a.txt"
    storage.write_text(file, "old")
    record(monkeypatch, fail_at=fail_at)
    with pytest.raises(Killed):
        storage.write_text(file, "new")
    assert file.read_text() == "old"
    monkeypatch.undo()
    assert storage.remove_leftovers(tmp_path) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EPERM, errno.EMFILE])
@pytest.mark.parametrize("fail_at", [0, 1])
def test_a_full_disk_is_one_message_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fail_at: int
) -> None:
    file = tmp_path / "a.txt"
    storage.write_text(file, "old")
    record(monkeypatch, fail_at=fail_at, error=OSError(code, "full"))
    with pytest.raises(StorageError, match=os.strerror(code)) as told:
        storage.write_text(file, "new")
    assert str(told.value).startswith(f"cannot write {file}: ")
    assert told.value.exit_code == 8
    assert file.read_text() == "old"


def test_a_failing_block_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No space left"), storage.new_folder(tmp_path / "place") as folder:  # noqa: PT012
        (folder / "x").write_text("half")
        raise OSError(errno.ENOSPC, "full")
    assert list(tmp_path.iterdir()) == []


def test_another_error_of_the_system_is_not_dressed_up(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), storage.storage_errors(tmp_path):
        (tmp_path / "missing").read_text()


def test_a_folder_replaces_the_one_that_was_there(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with storage.new_folder(tmp_path / "place") as folder:
            (folder / text).write_text(text)
    assert [p.name for p in (tmp_path / "place").iterdir()] == ["new"]


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".tmp-1234-a.txt").write_text("half")
    (tmp_path / ".tmp-5678-step").mkdir()
    (tmp_path / ".tmp-5678-step" / "x").write_text("half")
    (tmp_path / "tmp-mine").write_text("whole")
    (tmp_path / ".lock").write_text("")
    assert storage.remove_leftovers(tmp_path) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "tmp-mine"]
    assert storage.remove_leftovers(tmp_path / "nowhere") == 0


def test_json_holds_no_number_that_parsers_refuse(tmp_path: Path) -> None:
    storage.write_json(
        tmp_path / "a.json", {"x": float("nan"), "y": [float("inf"), 1.5, (float("-inf"), "\u00e9")], 3: None}
    )

    def refuse(token: str) -> None:
        pytest.fail(f"{token} is no JSON")

    text = (tmp_path / "a.json").read_text(encoding="ascii")
    assert json.loads(text, parse_constant=refuse) == {"x": None, "y": [None, 1.5, [None, "\u00e9"]], "3": None}


def test_a_hash_is_of_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    shutil.copy(tmp_path / "a", tmp_path / "b")
    # The first test vector of FIPS 180-2.
    assert storage.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert storage.sha256(tmp_path / "a") == storage.sha256(tmp_path / "b")


def test_the_folder_of_a_file_is_made(tmp_path: Path) -> None:
    storage.write_text(tmp_path / "deep" / "er" / "a.txt", "x")
    assert (tmp_path / "deep" / "er" / "a.txt").read_text() == "x"
