"""Whether a merged folder says what base and adapter say, and what either choice of base costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fine_tune.device import DTYPES, DevicePlan, fits
from fine_tune.merging.gaps import gap
from fine_tune.merging.reference import Reference, refer, refer_files, unquantised
from fine_tune.merging.reloaded import Reloaded, reload
from fine_tune.merging.settings import ORIGINAL, TOLERANCES, WHOLE, Choice
from fine_tune.merging.source import Source
from fine_tune.passport.replay import Said
from fine_tune.subjects import Named


@dataclass
class Proof:
    """What was compared.

    Attributes:
        own: Base and adapter, on the base that was merged into.
        exact: What the reloaded folder must equal but for the order of sums: ``own``, or, where the tensors were rounded, what
            they compute.
        reloaded: What the folder said.
        gaps: How far the folder is from ``own``.
        exact_gaps: How far it is from ``exact``.
        bases: Per choice of base, how far it is from what training stood on, or why that was not measured.
        tolerance: Largest logit gap to ``exact``.
    """

    own: Reference
    exact: Reference
    reloaded: Reloaded
    gaps: dict[str, Any]
    exact_gaps: dict[str, Any]
    bases: dict[str, Any]
    tolerance: float

    @property
    def problem(self) -> str | None:
        """Why the folder is no good; None where it is."""
        if self.own.problem is not None:
            return self.own.problem
        widest = self.exact_gaps["max_logit_gap"]
        if not widest <= self.tolerance:
            return f"reloaded, its logits are up to {widest:.3g} away from what they must be; tolerance={self.tolerance:g}."
        for asked, ours, theirs in zip(self.exact.asked, self.exact.said, self.reloaded.said, strict=True):
            place = first_difference(ours, theirs)
            # Where two tokens are as likely as each other, rounding decides.
            if place is not None and ours.margins[place] > 2 * self.tolerance:
                return f'reloaded, it continues "{asked.name}" with another token at place {place + 1}.'
        return None

    def report(self) -> dict[str, Any]:
        """Return plain values."""
        peak = self.reloaded.peak_rss_bytes
        return {
            "bases": self.bases,
            "against_base_and_adapter": self.gaps,
            "reloaded": self.exact_gaps,
            "tolerance": self.tolerance,
            "within_tolerance": self.problem is None,
            "problem": self.problem,
            "num_tensors_compared": self.own.num_compared,
            "num_prompts": len(self.own.asked),
            "reference_dtype": str(self.own.dtype).removeprefix("torch."),
            "reload_dtype": str(self.reloaded.dtype).removeprefix("torch."),
            "reload_peak_rss_gb": None if peak is None else round(peak / 1e9, 4),
        }


def first_difference(ours: Said, theirs: Said) -> int | None:
    """Return the first place where two continuations differ, their ends included.

    Example:
        >>> first_difference(Said([4, 5], 2, [], []), Said([4, 5], None, [], [])), first_difference(*[Said([4], 2, [], [])] * 2)
        (2, None)
    """
    left, right = ([*said.ids, said.stop_id] for said in (ours, theirs))
    return next((i for i, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), None)


def prove(place: Path, named: Named, choice: Choice, plan: DevicePlan, *, tolerance: float | None) -> Proof:
    """Compare a merged folder with base and adapter: every weight, then what it says when it is loaded in a fresh process.

    Args:
        place: The merged folder.
        named: The checkpoint.
        choice: What was merged into what.
        plan: Device; its precision is float32.
        tolerance: Largest logit gap, None for that of the coarsest dtype in use.
    """
    merged = Source(place)
    num_values = sum(math.prod(shape) for shape in merged.shapes.values())
    own = refer(unquantised(named) if choice.is_original else named, plan, merged, written=choice.dtype)
    model = named.cfg["model"]
    reloaded = reload(
        place,
        [one.ids for one in own.asked],
        own.sequences(),
        stop_ids=own.stop_ids,
        num_values=num_values,
        options={
            "device": plan.device,
            "dtype": choice.dtype,
            "pad_id": own.pad_id,
            "trust_remote_code": model["trust_remote_code"],
        },
    )
    # LLM.int8 rounds activations, too, which no merged model does.
    rounded = choice.dtype != torch.float32 or (choice.trained_on == "int8" and not choice.is_original)
    exact, coarse = own, choice.dtype if rounded else torch.float32
    if rounded and fits(4 * num_values, plan.device):
        exact, coarse = refer_files(named, plan, merged, own), torch.float32
    gaps, exact_gaps = (_compared(one, one.said, reloaded.logits, reloaded.said) for one in (own, exact))
    bases = _prices(named, choice, plan, own, reloaded, num_values)
    limit = (
        max(TOLERANCES[dtype] for dtype in (coarse, exact.dtype, reloaded.dtype)) if tolerance is None else tolerance
    )
    return Proof(own, exact, reloaded, gaps, exact_gaps, bases, limit)


def _compared(reference: Reference, said: list[Said], logits: list[Tensor], others: list[Said]) -> dict[str, Any]:
    equal = all(first_difference(*pair) is None for pair in zip(said, others, strict=True))
    return {**gap(reference.logits, logits), "greedy_equal": equal}


def _prices(
    named: Named, choice: Choice, plan: DevicePlan, own: Reference, reloaded: Reloaded, num_values: int
) -> dict[str, Any]:
    """Measure how far each choice of base is from what training stood on."""
    if choice.trained_on in (WHOLE, ORIGINAL):
        return {choice.base: _compared(own, own.said, reloaded.logits, reloaded.said)}
    if choice.is_original:
        trained = refer(named, plan, None, sequences=own.sequences())
        price = _compared(trained, trained.said, reloaded.logits, reloaded.said)
        return {choice.trained_on: {"reason": "not merged: it is what training stood on"}, choice.base: price}
    found = {choice.base: _compared(own, own.said, reloaded.logits, reloaded.said)}
    loaded = DTYPES[named.cfg["model"]["dtype"]]
    if not fits(num_values * loaded.itemsize, plan.device):
        reason = f"the unquantised base does not fit {plan.describe()}"
        return {**found, ORIGINAL: {"reason": reason}}
    other = refer(unquantised(named), plan, None, sequences=own.sequences())
    return {**found, ORIGINAL: _compared(own, own.said, other.logits, other.said)}
