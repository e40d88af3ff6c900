"""Rows that a chat adds to a file which trains as it is: whole lines or nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fine_tune.errors import ConfigError, StorageError
from fine_tune.storage import sync_folder
from fine_tune.text.conversation import Message

SUFFIX = ".jsonl"
# What tells the two kinds of rows apart, and what trains on each.
FIELDS = {"pair": "chosen", "conversation": "messages"}
TRAINS = {"pair": "data=preferences", "conversation": "data=chat"}


class RowsFile:
    """A file of preference pairs or of conversations, JSON lines.

    Args:
        path: Its place; it is made with the first row.
        kind: What its rows are.

    Raises:
        ConfigError: It cannot be such a file, or holds something else.
    """

    def __init__(self, path: Path, kind: Literal["pair", "conversation"]) -> None:
        self.path, self.kind = path, kind
        self.num_added = 0
        if path.suffix != SUFFIX:
            raise ConfigError(
                f"save = {path}: its name must end in {SUFFIX}, which data.path= reads. Pass {path}{SUFFIX}."
            )
        if path.is_dir():
            raise ConfigError(f"save = {path}: is a folder. Pass the name of a file.")
        if problem := self._problem():
            raise ConfigError(f"save = {path}: {problem}")

    def add_pair(self, prompt: Sequence[Message], chosen: str, rejected: str, *, labels: tuple[str, str]) -> None:
        """Add a preference; ``labels`` name who said the chosen and the rejected answer.

        Raises:
            StorageError: It was not written; the file is as it was.
        """
        sides = {"chosen": chosen, "rejected": rejected}
        self._append({"prompt": _plain(prompt), **sides, "chosen_from": labels[0], "rejected_from": labels[1]})

    def add_conversation(self, messages: Sequence[Message]) -> None:
        """Add a conversation.

        Raises:
            StorageError: It was not written; the file is as it was.
        """
        self._append({"messages": _plain(messages)})

    def _append(self, row: dict[str, Any]) -> None:
        # ASCII: nothing that a model said acts on the terminal in which someone looks at the file.
        line = json.dumps(row, ensure_ascii=True).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if problem := self._problem():
                raise StorageError(f"{self.path}: {problem}")
            self._write(line)
        except OSError as error:
            raise StorageError(
                f"{self.path}: not saved, {os.strerror(error.errno or 0)}. The file is as it was."
            ) from error
        self.num_added += 1

    def _write(self, line: bytes) -> None:
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(handle).st_size
            # One write: lines of two chats do not mix.
            if (written := os.write(handle, line)) < len(line):
                if os.fstat(handle).st_size == before + written:
                    os.ftruncate(handle, before)
                raise StorageError(f"{self.path}: not saved, the disk is full. The file is as it was.")
            os.fsync(handle)
        finally:
            os.close(handle)
        sync_folder(self.path.parent)

    def _problem(self) -> str | None:
        """Say why no row can be added: the last line is cut off, or the rows are others."""
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return None
        lines = self.path.read_bytes().splitlines(keepends=True)
        if not lines[-1].endswith(b"\n"):
            return f"line {len(lines)} has no end. Complete it, or delete it."
        try:
            row = json.loads(lines[-1])
        except ValueError:
            return f"line {len(lines)} is not JSON. Pass another file."
        if not isinstance(row, dict) or FIELDS[self.kind] not in row:
            return f"its rows are no {self.kind}s (line {len(lines)} has no {FIELDS[self.kind]}). Pass another file."
        return None


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
