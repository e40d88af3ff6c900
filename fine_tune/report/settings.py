"""What a run was told that the options in ``conf/`` do not say by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fine_tune.config import check_config, find_conf_dir
from fine_tune.errors import FineTuneError
from fine_tune.overrides import group_options
from fine_tune.report.leaves import leaf_texts

# Sentences for people, not settings.
NOT_COMPARED = ("hints",)
# Groups whose option's name the config keeps.
NAMED_GROUPS = ("model", "method", "objective", "data", "optim")


@dataclass(frozen=True)
class Difference:
    """One key whose value is not what the options say."""

    key: str
    default: str
    here: str


@dataclass(frozen=True)
class Settings:
    """What differs, and the words whose config it was compared with; no words where that could not be composed."""

    differences: tuple[Difference, ...]
    against: str


def differing(config: Mapping[str, Any]) -> Settings:
    """Compare a run's config with what its options say in ``conf/``."""
    default, against = _defaults(config)
    if default is None:
        return Settings((), "")
    said, here = dict(leaf_texts(default)), dict(leaf_texts(config))
    keys = [key for key in dict.fromkeys((*here, *said)) if key.split(".")[0] not in NOT_COMPARED]
    found = (Difference(key, said.get(key, "(no such key)"), here.get(key, "(no such key)")) for key in keys)
    return Settings(tuple(d for d in found if d.default != d.here), against)


def _defaults(config: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """Compose the options that the config names, or as many of them as can stand without the user's own values."""
    options = group_options(find_conf_dir())
    named = {group: (config.get(group) or {}) for group in NAMED_GROUPS}
    chosen = [
        f"{group}={node['name']}"
        for group, node in named.items()
        if isinstance(node, dict) and isinstance(node.get("name"), str) and node["name"] in options[group]
    ]
    without_data = [word for word in chosen if not word.startswith("data=")]
    # data.path= stands for a path that some options demand.
    for words in (chosen, [*chosen, "data.path=unset"], without_data, []):
        if (default := _composed(tuple(words))) is not None:
            return default, " ".join(words) or "no words"
    return None, ""


@lru_cache(maxsize=16)
def _composed(words: tuple[str, ...]) -> dict[str, Any] | None:
    try:
        return check_config(words).cfg
    except FineTuneError:
        return None
