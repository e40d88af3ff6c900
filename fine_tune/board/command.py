"""The words that repeat a run."""

from __future__ import annotations

import re
import shlex
from typing import Any

from fine_tune.board.rows import Row, masked
from fine_tune.redaction import MASK

# Where a run is kept, and how a sweep was made, is no part of what it computes.
LEFT_OUT = re.compile(r"(hydra[./]|sweep\.|(sweep|sweep_dir|run_dir|run_name|overwrite)=)")


def command_of(row: Row, sweep_command: Any) -> tuple[str, str]:
    """Return the command of a run and a sentence on what to know about it; either may be empty.

    Args:
        row: The run.
        sweep_command: What started its sweep: its words hold for every job that says nothing else.
    """
    if row.overrides is not None:
        own = [word for word in row.overrides if _is_word(word)]
        keys = {_key(word) for word in own}
        words = [*(word for word in _split(sweep_command) if _key(word) not in keys), *own]
    else:
        words = _split(row.manifest.get("command"))
        if not isinstance(row.manifest.get("command"), str):
            return "", "Its command is not recorded."
        if any(_key(word) == "resume" for word in words):
            return "", "It was resumed, so the words it began with are not recorded; its config.yaml has every value."
    words = [word for word in words if not LEFT_OUT.match(word.lstrip("+~"))]
    safe = [masked(word) for word in words]
    note = "Values that look like secrets are masked." if any(MASK in word for word in safe) else ""
    return shlex.join(["python", "train.py", *safe]), note


def _split(command: Any) -> list[str]:
    """Return the words of a recorded command line that set something."""
    if not isinstance(command, str):
        return []
    try:
        words = shlex.split(command)
    except ValueError:  # quotes that do not close: recorded without quoting
        words = command.split()
    return [word for word in words if _is_word(word)]


def _is_word(word: str) -> bool:
    return not word.startswith("-") and ("=" in word or word.startswith("~"))


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")
