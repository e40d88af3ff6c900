"""References between the values of a config: which may stand there, and what they lead to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fine_tune.checks import leaf_items

READABLE_ENVIRONMENT = ("HOSTNAME", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
RESOLVER = re.compile(r"\$\{\s*([A-Za-z_][\w.]*)\s*:\s*([^{}]*)")


def resolve(
    tree: DictConfig, raw: dict[str, Any], problems: list[str], refused: set[str]
) -> tuple[dict[str, Any], set[str]]:
    """Resolve references; keys without a value, or with a reference that leads nowhere, become problems."""
    bad: set[str] = set()
    for key, value in leaf_items(raw):
        sentence = _problem(key, value, raw["hints"])
        if sentence is None and isinstance(value, str) and "${" in value:
            try:
                OmegaConf.select(tree, key, throw_on_missing=False)
            except OmegaConfBaseException as error:
                # A reference to a missing value is reported where it is missing.
                missing = "MissingMandatoryValue" in str(error) or "InterpolationToMissing" in type(error).__name__
                sentence = "" if missing else f"{key} = {value}: refers to no key. Write a value, or ${{<known key>}}."
        if sentence is not None:
            bad.add(re.sub(r"\[\d+\]", "", key))
            OmegaConf.update(tree, key, None, force_add=True)
            problems += [sentence] if sentence and key not in refused else []
    return plain(tree, resolved=True), bad


def plain(tree: DictConfig, *, resolved: bool = False) -> dict[str, Any]:
    """Return the plain containers of a tree, its references resolved on request."""
    container = OmegaConf.to_container(tree, resolve=resolved)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _problem(key: str, value: Any, hints: Mapping[str, str]) -> str | None:
    if value == "???":
        return f"{key}: no value. {hints.get(key, f'Pass {key}=<value>.')}"
    for resolver, argument in RESOLVER.findall(value if isinstance(value, str) else ""):
        if resolver != "oc.env" or argument.split(",")[0].strip() not in READABLE_ENVIRONMENT:
            readable = ", ".join(READABLE_ENVIRONMENT)
            return f"{key}: ${{{resolver}:...}} is refused. Write the value; oc.env reads only {readable}."
    return None
