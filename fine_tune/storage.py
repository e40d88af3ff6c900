"""Files that are whole or absent: written beside their place, flushed to disk, renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fine_tune.errors import StorageError

TEMP_PREFIX = ".tmp-"


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file's content in one step."""
    temporary = path.with_name(f"{TEMP_PREFIX}{uuid.uuid4().hex[:8]}-{path.name}")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)


def append_text(path: Path, text: str) -> None:
    """Add text to a file; it is not made here: where it is gone, so is its folder, and a new one would hold half of it."""
    with storage_errors(path, every=True), os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8") as stream:
        stream.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that any parser reads: a number that is not finite becomes null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=True) + "\n")


def finite(value: Any) -> Any:
    """Replace NaN and infinities by None, at any depth."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``place``; it takes that name when the block ends well, and vanishes if not."""
    temporary = place.with_name(f"{TEMP_PREFIX}{uuid.uuid4().hex[:8]}-{place.name}")
    with storage_errors(place):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.iterdir():
                sync_file(file)
            sync_folder(temporary)
            if place.exists():
                shutil.rmtree(place)
            os.replace(temporary, place)
            sync_folder(place.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def storage_errors(place: Path, *, every: bool = False) -> Iterator[None]:
    """Turn a full disk or a refused write into one message.

    Args:
        place: What is written.
        every: Whatever else the system says of the place as well: it is no folder, a link to nowhere, a name too long.
    """
    try:
        yield
    except OSError as error:
        if not every and error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EROFS,
            errno.EACCES,
            errno.EIO,
            errno.ENAMETOOLONG,
            # A folder that may not change or is none, and no file handle left.
            errno.EPERM,
            errno.ENOTDIR,
            errno.EMFILE,
            errno.ENFILE,
        ):
            raise
        raise StorageError(
            f"cannot write {place}: {os.strerror(error.errno or errno.EIO)}. Earlier checkpoints are untouched; free space or set "
            "run_dir=."
        ) from error


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    if path.is_file():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_folder(path: Path) -> None:
    """Flush a folder's names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hash a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove_leftovers(folder: Path) -> int:
    """Delete temporary files and folders of a writer that was killed; call under the run's lock."""
    leftovers = list(folder.glob(f"{TEMP_PREFIX}*")) if folder.is_dir() else []
    for item in leftovers:
        shutil.rmtree(item) if item.is_dir() else item.unlink()
    return len(leftovers)

def read_lines(path: Path, *, up_to_step: int | None = None) -> list[dict[str, Any]]:
    """Read metrics (or previews) up to a step; a last line that was cut off by a kill is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if up_to_step is None or line["step"] <= up_to_step:
            lines.append(line)
    return lines
