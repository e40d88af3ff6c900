"""What a merge is told, as plain values; checked against the checkpoint before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fine_tune.device import DTYPES
from fine_tune.errors import ConfigError
from fine_tune.subjects import Named

# Largest difference of a logit that is the order of sums and not a mistake, by what was computed in: float32 wherever a whole
# model of it fits.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.5}
ORIGINAL, WHOLE = "bf16", "all"


@dataclass(frozen=True)
class MergeSettings:
    """The words of a merge.

    Attributes:
        out: The folder to write, None for ``merged`` in the run.
        base: ``nf4``, ``fp4``, ``int8`` (what the adapter was trained on), ``bf16`` (the base as its files hold it), or None
            for what it was trained on.
        dtype: Of the merged weights, None for that of the base's files.
        shard_gb: Largest file, in 1e9 bytes.
        tolerance: Largest logit gap after reloading, None for that of the dtype that is computed in.
        overwrite: Replace an earlier merge in ``out``.
    """

    out: Path | None = None
    base: str | None = None
    dtype: str | None = None
    shard_gb: float = 5.0
    tolerance: float | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Choice:
    """What is merged into what.

    Attributes:
        trained_on: The name of the weights that training stood on.
        base: The name of those that are merged into.
        dtype: Of the merged weights.
        out: The folder.
    """

    trained_on: str
    base: str
    dtype: torch.dtype
    out: Path

    @property
    def is_original(self) -> bool:
        """The adapter goes into other weights than it was trained on."""
        return self.base != self.trained_on


def choose(named: Named, settings: MergeSettings, config: Mapping[str, Any]) -> Choice:
    """Settle what the words leave open.

    Args:
        named: The checkpoint.
        settings: The words.
        config: The base's ``config.json``.

    Raises:
        ConfigError: The words do not fit the checkpoint or each other; all problems together.
    """
    problems = []
    if named.place is None or (named.whole and named.run is None):
        raise ConfigError(
            f"ckpt={named.label}: has no adapter to merge. Pass a run, a checkpoint in one, or an adapter folder."
        )
    method = named.cfg["method"]
    names = {4: method["quant_type"] or "nf4", 8: "int8", 16: ORIGINAL}
    trained_on = WHOLE if named.whole or method["trains"] == "all" else names[method["bits"]]
    base = settings.base or trained_on
    allowed = [WHOLE] if trained_on == WHOLE else list(dict.fromkeys((trained_on, ORIGINAL)))
    if base not in allowed:
        why = "every weight was trained" if trained_on == WHOLE else f"the adapter was trained on {trained_on}"
        rest = "Leave base out." if trained_on == WHOLE else f"Choose one of {', '.join(allowed)}."
        problems.append(f"base={base}: {why}. {rest}")
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    dtype = DTYPES.get(settings.dtype or stored)
    if dtype is None:
        problems.append(f"dtype={settings.dtype or stored}: choose one of {', '.join(DTYPES)}.")
    out = settings.out or (named.run / "merged" if named.run is not None else None)
    if out is None:
        problems.append("out: this adapter is in no run. Pass out=<folder>.")
    elif problem := _occupied(out, overwrite=settings.overwrite):
        problems.append(problem)
    if problems or dtype is None or out is None:
        raise ConfigError(problems)
    return Choice(trained_on, base, dtype, out)


def _occupied(out: Path, *, overwrite: bool) -> str | None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "merge_report.json").is_file():
        return f"out={out}: exists and is no merged model. Choose another folder."
    return None if overwrite else f"out={out}: exists. Replace it with overwrite=true, or choose another folder."
