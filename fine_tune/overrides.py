"""Read `group=option` and `key=value` words the way Hydra does, but collect every mistake."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from fine_tune import safe_load
from fine_tune.problems import unknown_key, unknown_option
from fine_tune.redaction import is_secret, secret_in_override

# What a run may set of Hydra itself: launchers, and what Lightning passes to the processes it starts for DDP.
HYDRA_KEYS = re.compile(
    r"(hydra/launcher=\w+|hydra\.launcher\.(?!.*_target_)[\w.]+=.*|hydra\.sweeper\.max_batch_size=\d+|hydra\.verbose=.*"
    r"|hydra\.run\.dir=[\"']?\.[\"']?|hydra\.output_subdir=null|hydra\.job\.name=train_ddp_process_\d+"
    r"|hydra\.mode=(RUN|MULTIRUN))"
)


class Words(NamedTuple):
    """Overrides, sorted out.

    ``groups`` chosen options; ``values`` by dotted key; ``added`` keys that came with a plus; ``problems``
    of those that are no overrides at all, and ``refused`` the keys these seem to be about.
    """

    groups: dict[str, str | None]
    values: dict[str, Any]
    added: set[str]
    problems: list[str]
    refused: set[str]


@lru_cache(maxsize=8)
def group_options(folder: Path, primary_name: str = "train") -> dict[str, list[str]]:
    """Return the groups that a primary config chooses from, each with its options.

    Example:
        >>> from fine_tune.config import find_conf_dir
        >>> group_options(find_conf_dir())["objective"]
        ['dpo', 'sft']
    """
    primary = safe_load.yaml_text((folder / f"{primary_name}.yaml").read_text(encoding="utf-8"))
    entries = [name for entry in primary["defaults"] if isinstance(entry, dict) for name in entry]
    groups = [name for name in entries if " " not in name]
    return {group: sorted(file.stem for file in (folder / group).glob("*.yaml")) for group in groups}


def read_words(overrides: Sequence[str], groups: dict[str, list[str]], keys: Sequence[str]) -> Words:
    """Sort overrides into groups and values; whatever is no override becomes a problem and is left out."""
    words = Words({}, {}, set(), [], set())
    torn = 0
    for position, text in enumerate(overrides, start=1):
        if torn:
            torn -= 1
            continue
        if secret_in_override(text):
            words.problems.append(_secret_problem(text, position))
            words.refused.add(_key_of(text))
            continue
        try:
            parsed = OverridesParser.create().parse_overrides([text])[0]
        except HydraException:
            torn = _rest_of_list(text, overrides[position:])
            words.problems.append(_unreadable(" ".join([text, *overrides[position : position + torn]])))
            words.refused.add(_key_of(text))
            continue
        problem = _form_problem(parsed, groups, keys) or _take(parsed, words, groups)
        if problem:
            words.problems.append(problem)
            words.refused.add(parsed.key_or_group)
    return words


def for_hydra(overrides: Sequence[str], groups: Collection[str]) -> list[str]:
    """Write checked overrides so that Hydra takes them all: it refuses keys that only our schema knows.

    Example:
        >>> for_hydra(["+data=chat", "data.path=rows.jsonl"], ["data"])
        ['data=chat', '++data.path=rows.jsonl']
    """
    bare = [text.lstrip("+") for text in overrides]
    as_they_are = (*(f"{group}=" for group in groups), "hydra.", "hydra/")
    return [text if text.startswith(as_they_are) else f"++{text}" for text in bare]


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Return every combination of a sweep's values; words that cannot be read stay as they are."""
    choices: list[list[str]] = []
    for text in overrides:
        try:
            parsed = OverridesParser.create().parse_overrides([text])[0]
            listed = parsed.is_sweep_override() and parsed.is_discrete_sweep()
            values = list(parsed.sweep_string_iterator()) if listed else []
        except HydraException:
            values = []
        choices.append([f"{parsed.get_key_element()}={value}" for value in values] or [text])
    return [list(combination) for combination in itertools.product(*choices)]


class Varied(NamedTuple):
    """A key that a sweep varies: over listed ``values``, or between ``low`` and ``high``.

    ``log`` asks for steps of equal ratio, ``whole`` for whole numbers.
    """

    key: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    shuffled: bool = False


def varied(overrides: Sequence[str]) -> list[Varied]:
    """Return what words vary: ``a=1,2``, ``choice(..)``, ``range(..)`` and ``interval(..)``, each also in ``tag(log, ..)``.

    Example:
        >>> varied(["optim.lr=tag(log,interval(1e-5,1e-3))", "method.rank=8,16", "seed=1"])[1].values
        ('8', '16')
    """
    found = []
    for text in overrides:
        try:
            parsed = OverridesParser.create().parse_overrides([text])[0]
        except HydraException:
            continue
        key, value = parsed.get_key_element().lstrip("+"), parsed.value()
        if isinstance(value, IntervalSweep):
            low, high = value.start, value.end
            whole = isinstance(low, int) and isinstance(high, int)
            found.append(Varied(key, (), float(low or 0), float(high or 0), "log" in value.tags, whole))
        elif isinstance(value, ChoiceSweep | RangeSweep):
            listed = tuple(str(one) for one in parsed.sweep_string_iterator())
            found.append(Varied(key, listed, shuffled=bool(getattr(value, "shuffle", False))))
    return found


def _key_of(text: str) -> str:
    return text.partition("=")[0].lstrip("+~")


def _unreadable(text: str) -> str:
    key, separator, value = text.partition("=")
    if not separator or not re.fullmatch(r"[+~]*[\w./@]+", key):
        return f"{text}: not key=value. Write a key, =, and its value."
    if value.startswith("["):
        return f"{_key_of(text)} = {value}: a list that cannot be read. Quote it and what is in it: {_quoted_list(key, value)}."
    return f"{_key_of(text)} = {value}: special characters. Quote the value: {key}=\"'{value}'\"."


def _rest_of_list(text: str, following: Sequence[str]) -> int:
    """Count the words after one that opens a list, up to the one that closes it: the shell cut it at its spaces."""
    if not text.partition("=")[2].startswith("[") or text.endswith("]"):
        return 0
    ends = [number for number, word in enumerate(following, start=1) if word.endswith("]")]
    upto = ends[0] if ends else 0
    return 0 if any(re.match(r"[+~]*[\w./@]+=", word) for word in following[:upto]) else upto


def _quoted_list(key: str, value: str) -> str:
    """Write a list so that the shell hands it over whole and every part of it is one text.

    Example:
        >>> print(_quoted_list("ckpt", "[base, runs/my run]"))
        "ckpt=[base,'runs/my run']"
    """
    parts = [part.strip().strip("'\"") for part in value.removeprefix("[").removesuffix("]").split(",")]
    quoted = ["'" + part.replace("'", r"\'") + "'" for part in parts]
    plain = [re.fullmatch(r"[\w./:+-]+", part, re.ASCII) is not None for part in parts]
    listed = ",".join(part if bare else text for part, text, bare in zip(parts, quoted, plain, strict=True) if part)
    return f'"{key}=[{listed}]"'


def _secret_problem(text: str, position: int) -> str:
    key = text.partition("=")[0]
    name = f"override {position}" if is_secret(key) or "=" not in text else key.lstrip("+~")
    return (
        f"{name}: looks like a secret (not shown); it would end in files and process lists. "
        "Set HF_TOKEN or WANDB_API_KEY in the environment, or log in, and leave it out."
    )


def _form_problem(parsed: Override, groups: dict[str, list[str]], keys: Sequence[str]) -> str | None:
    key, text = parsed.key_or_group, str(parsed.input_line)
    if parsed.is_hydra_override():
        if HYDRA_KEYS.fullmatch(text.lstrip("+")):
            return None
        return f"{key}: not for you to set. Name the run's folder with run_name=, run_dir= or sweep_dir=."
    if parsed.is_delete():
        return f"~{key}: keys cannot be removed. Set {key}=null, or choose another option of its group."
    if parsed.package is not None:
        return unknown_key(f"{key}@{parsed.package}", [*keys, *groups])
    if parsed.is_sweep_override():
        value = text.partition("=")[2]
        return f"{key} = {value}: several values. Write a list as [{value}], or pass -m to train.py to sweep over them."
    return None


def _take(parsed: Override, words: Words, groups: dict[str, list[str]]) -> str | None:
    key, value = parsed.key_or_group, parsed.value()
    if parsed.is_hydra_override():
        return None
    if key in groups:
        if value is not None and not isinstance(value, str):
            return f"{key} = {value}: must be the name of one option. Choose one of {', '.join(groups[key])}."
        if value is None and key not in ("experiment", "debug", "sweep"):
            return f"{key} = null: a group needs an option. Choose one of {', '.join(groups[key])}."
        if value is not None and value not in groups[key]:
            return unknown_option(key, value, groups[key])
        words.groups[key] = value
        return None
    words.values[key] = value
    if parsed.is_add() or parsed.is_force_add():
        words.added.add(key)
    return None
