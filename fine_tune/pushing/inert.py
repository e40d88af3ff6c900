"""Text from elsewhere as it may stand in a model card: shown, never acted on."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from fine_tune.redaction import redact
from fine_tune.report.visible import brief, plain, visible

# Paths of a person's machine: from a root, a home, or a drive on.
PATH = re.compile(r"(?<![\w.:/-])(?:~|[A-Za-z]:)?[/\\](?:[\w.@+ -]+[/\\])*")
MAX_CHARACTERS = 300


def code(value: Any, *, key: str = "") -> str:
    r"""Put a value into a code span: no markup, HTML, link or mention in it does anything, and a table keeps its cells.

    ``key`` says what it is: a commit looks like a secret.

    Example:
        >>> print(code("a|`b` <img>"))
        `` a\|`b` <img> ``
    """
    text = one_line(value, key=key).replace("|", "\\|")
    fence = "`" * (_longest_run(text) + 1)
    # The blanks beside the fences are taken off by readers; they part a backtick of the text from them.
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def one_line(value: Any, *, key: str = "") -> str:
    """Write a value on one line, without what acts instead of showing: a line of its own could end the card's front matter."""
    return brief(" ".join(_safe(value, key=key).split()) or "-", MAX_CHARACTERS)


def block(value: Any) -> str:
    """Put a text into a code block that nothing in it can end."""
    text = brief(_safe(value))
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}text\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _safe(value: Any, *, key: str = "") -> str:
    return str(redact(visible(value if isinstance(value, str) else plain(value)), key=key))


def without_folders(text: str) -> str:
    """Keep the last name of every path: where a person keeps files is nobody's business.

    Example:
        >>> without_folders("train.py data.path=/home/me/rows.jsonl model=qwen")
        'train.py data.path=rows.jsonl model=qwen'
    """
    return PATH.sub("", text)


def short_name(path: str) -> str:
    """Return a model's or file's name without the folders above it, a hub id whole.

    Example:
        >>> short_name("owner/name"), short_name("/home/me/models/name"), short_name("builtin:tiny")
        ('owner/name', 'name', 'builtin:tiny')
    """
    return path if is_hub_id(path) or path.startswith("builtin:") else PurePath(path.replace("\\", "/")).name


def is_hub_id(path: str) -> bool:
    """Tell whether a text has the form of a hub id, owner/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None
