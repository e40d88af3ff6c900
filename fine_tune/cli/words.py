"""The words of a verb: its own settings read, those of a run checked, and every mistake told at once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fine_tune.config import check_config
from fine_tune.errors import ConfigError
from fine_tune.redaction import secret_in_override

Reader = Callable[[str], Any]


@dataclass
class Words:
    """Words of a verb, read.

    Attributes:
        values: Its own settings, by key.
        rest: Words of ``model`` and ``method``, for what no run describes.
    """

    values: dict[str, Any] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)


def read_words(
    words: Sequence[str], readers: Mapping[str, Reader], *, needed: Sequence[str], groups: Sequence[str] = ()
) -> Words:
    """Read the words of a verb.

    Args:
        words: As typed.
        readers: Per key, what turns its text into a value, or raises ``ValueError`` with the rule.
        needed: Keys that must be given.
        groups: Config groups whose words are passed on.

    Raises:
        ConfigError: All problems together.

    Example:
        >>> read_words(["n=3"], {"n": above_zero}, needed=["n"]).values
        {'n': 3.0}
    """
    found, problems = Words(), []
    for word in words:
        key, equals, text = word.partition("=")
        if secret_in_override(word):
            problems.append(_secret(key))
        elif key.partition(".")[0] in groups and equals:
            found.rest.append(word)
        elif key not in readers or not equals:
            close = difflib.get_close_matches(key, readers, n=1)
            problems.append(
                f"{word}: no such setting. " + (f"Did you mean {close[0]}=?" if close else _choices(readers))
            )
        elif key in found.values:
            problems.append(f"{key}: given twice.")
        else:
            try:
                found.values[key] = readers[key](text)
            except ValueError as rule:
                problems.append(f"{key}={text}: {rule}.")
                found.values[key] = None
    problems += [f"{key}: no value. Pass {key}=<value>." for key in needed if key not in found.values]
    if problems:
        raise ConfigError(problems)
    return found


def read_beside_config(
    words: Sequence[str], readers: Mapping[str, Reader], *, rule: Callable[[Mapping[str, Any]], str | None] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part a verb's own words from those of a run, and check all of them before any is acted on.

    Args:
        words: As typed; what is not the verb's own is the config's.
        readers: Per key of the verb's own, what turns its text into a value, or raises ``ValueError`` with the rule.
        rule: Takes the verb's own values, where all were read, and returns what is wrong with them together.

    Returns:
        The verb's own values by key, and the checked config.

    Raises:
        ConfigError: All problems together, the verb's own first.
    """
    own: dict[str, Any] = {}
    rest, problems = [], []
    for word in words:
        key, _, value = word.partition("=")
        if key not in readers:
            rest.append(word)
        elif secret_in_override(word):
            problems.append(_secret(key))
        elif key in own:
            problems.append(f"{key}: given twice.")
        else:
            try:
                own[key] = readers[key](value)
            except ValueError as reason:
                problems.append(f"{word}: {reason}.")
    if rule is not None and not problems and (broken := rule(own)):
        problems.append(broken)
    try:
        cfg = dict(check_config(rest).cfg)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if problems:
        raise ConfigError(problems)
    return own, cfg


def _secret(key: str) -> str:
    return f"{key.partition('://')[0][:20]}: holds a secret. Secrets are read from the environment only."


def _choices(readers: Mapping[str, Reader]) -> str:
    return f"Choose from {', '.join(f'{key}=' for key in readers)}."


def text(value: str) -> str:
    """Take any text but an empty one."""
    if not value:
        raise ValueError("must not be empty")
    return value


def path(value: str) -> Path:
    """Take a path; ``~`` is the home folder."""
    return Path(text(value)).expanduser()


def flag(value: str) -> bool:
    """Take true or false."""
    if value not in ("true", "false"):
        raise ValueError("must be true or false")
    return value == "true"


def above_zero(value: str) -> float:
    """Take a finite number above zero."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (number > 0 and math.isfinite(number)):
        raise ValueError("must be a number above 0")
    return number


def one_of(*choices: str) -> Reader:
    """Take one of a few words."""

    def read(value: str) -> str:
        if value not in choices:
            raise ValueError(f"choose one of {', '.join(choices)}")
        return value

    return read
