"""Replay a passport and say where the replay first leaves it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fine_tune.device import plan_device
from fine_tune.errors import FineTuneError
from fine_tune.passport.document import read_passport
from fine_tune.quiet import quiet_libraries
from fine_tune.rng import untouched_rng
from fine_tune.verifying.endpoint import Endpoint
from fine_tune.verifying.finding import STAGES, Finding
from fine_tune.verifying.folder import verify_folder
from fine_tune.verifying.served import verify_served


class Diverges(FineTuneError):
    """What is served is not what was made."""

    exit_code = 10


def verify(words: Mapping[str, Any], defaults: dict[str, Any]) -> list[Finding]:
    """Do what the words ask for and return one finding per prompt.

    Args:
        words: ``passport``, and ``model`` or ``url`` with its settings.
        defaults: ``model``, ``method`` and ``accelerator`` for adapters that no run describes.
    """
    quiet_libraries()
    passport = read_passport(words["passport"])
    tolerance = words.get("tolerance")
    if "url" in words:
        server = Endpoint(
            words["url"],
            model=words.get("model_name"),
            key_env=words.get("key_env"),
            timeout=words.get("timeout_seconds", 120.0),
        )
        return verify_served(passport, server, tolerance=tolerance)
    folder: Path = words["model"]
    if not (folder / "config.json").is_file() and (folder / "adapter").is_dir():
        folder = folder / "adapter"
    plan = plan_device(accelerator=defaults["accelerator"], devices=1, num_nodes=1, precision="32-true")
    with untouched_rng():
        return verify_folder(passport, folder, plan=plan, defaults=defaults, tolerance=tolerance)


def conclusion(findings: Sequence[Finding]) -> str | None:
    """Name the earliest difference in one sentence; None where there is none."""
    counts = Counter(finding.stage for finding in findings)
    stage = next((stage for stage in STAGES if counts[stage]), None)
    if stage is None:
        return None
    first = next(finding for finding in findings if finding.stage == stage)
    where = {"later": "later in the answer"}.get(stage, f"at the {stage}")
    return f'diverges {where} ({counts[stage]} of {len(findings)} prompts), first in "{first.name}": {first.detail}'
