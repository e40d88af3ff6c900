"""What a secret looks like: refused on the command line, masked in everything that is written."""

from __future__ import annotations

import os
import re
from typing import Any

MASK = "***"
# Words of a key that say its value is a secret. "token" only as a whole name: pad_token is none.
SECRET_KEYS = re.compile(
    r"(^|[._-])(api_?key|secret|password|passwd|credentials?)$"
    r"|(^|[._-])(access|auth|hf|hub|api|bearer)_?token$"
    r"|(^|\.)(token|key)$",
    re.IGNORECASE,
)
SECRET_VALUES = re.compile(
    r"hf_[A-Za-z0-9]{16,}"
    r"|(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{16,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|AKIA[0-9A-Z]{16}"
    r"|wandb_v\d_[A-Za-z0-9_]{16,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\."
    r"|[a-z][a-z0-9+.-]*://[^/\s@]+@"
)
# In running text: a name and its value, as in an address.
NAMED = re.compile(r"\b([\w.-]+)=([^\s&'\",;)]+)")
SHORTEST_SECRET = 6
# A W&B key is 40 hexadecimal digits, and so is a commit: the key tells them apart.
FORTY_HEX = re.compile(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])")
# In running text: what a commit follows, in a hub cache's path, behind a model's name, or in a sentence of ours.
BEFORE_COMMITS = ("snapshots/", "@", "revision ", "revision=", "commit ", "model.revision: ")
COMMIT_KEYS = re.compile(r"(^|[._])(revision|git_commit|commit|sha|fingerprint)$")


def is_secret(value: str, *, key: str = "") -> bool:
    """Tell whether a text is or holds a secret.

    Example:
        >>> is_secret("0" * 40, key="logger.wandb.id"), is_secret("0" * 40, key="model.revision")
        (True, False)
    """
    if SECRET_VALUES.search(value):
        return True
    # Only as the whole value: cache folders of the hub are named by commits.
    return bool(value) and not COMMIT_KEYS.search(key) and bool(FORTY_HEX.fullmatch(value.strip("'\" ")))


def secret_in_override(override: str) -> bool:
    """Tell whether an override (or any word of a command line) carries a secret in its key or value."""
    key, separator, value = override.partition("=")
    key = key.lstrip("+~")
    if is_secret(override.strip(), key=key) or is_secret(key):
        return True
    if separator and SECRET_KEYS.search(key):
        return value not in ("", "null")
    # Mappings and lists: "revision:" inside a mapping is a commit, anything else of that form is not.
    words = re.finditer(r"(?:(?P<key>\w+)\s*:\s*)?(?P<value>[^\s,:{}\[\]'\"]+)", value)
    return any(is_secret(word["value"], key=word["key"] or key) for word in words)


def redact(tree: Any, *, key: str = "") -> Any:
    """Return a copy of a tree of plain values with every secret replaced by ``***``.

    Example:
        >>> redact({"api_key": "x", "path": "https://me:pw@host/x", "rank": 8})
        {'api_key': '***', 'path': '***', 'rank': 8}
    """
    if isinstance(tree, dict):
        return {name: redact(value, key=str(name)) for name, value in tree.items()}
    if isinstance(tree, list):
        return [redact(value, key=key) for value in tree]
    if isinstance(tree, str) and (is_secret(tree, key=key) or SECRET_KEYS.search(key)):
        return MASK
    return tree


def masked(text: str) -> str:
    """Return a text in which whatever looks like a secret is replaced by ``***``, and the rest stays readable.

    Example:
        >>> masked("no route to https://me:pw@host/x")
        'no route to ***host/x'
        >>> masked("cache/snapshots/" + "0" * 40), masked("key " + "0" * 40)
        ('cache/snapshots/0000000000000000000000000000000000000000', 'key ***')
    """
    text = NAMED.sub(lambda found: f"{found[1]}={MASK}" if SECRET_KEYS.search(found[1]) else found[0], text)
    text = FORTY_HEX.sub(_unless_commit, SECRET_VALUES.sub(MASK, text))
    for value in sorted(_environment_secrets(), key=len, reverse=True):
        text = text.replace(value, MASK)
    return text


def _unless_commit(found: re.Match[str]) -> str:
    return found[0] if found.string[: found.start()].endswith(BEFORE_COMMITS) else MASK


def _environment_secrets() -> set[str]:
    """Values of environment variables whose names say that they are secrets; short ones would mask ordinary words."""
    named = (value for name, value in os.environ.items() if SECRET_KEYS.search(name))
    return {value for value in named if len(value) >= SHORTEST_SECRET}
