"""The fastest way to run a step that fits a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fine_tune.memory.estimate import Footprint
from fine_tune.models.execution import Execution

# From here on a larger micro-batch gains less than two percent (docs/performance.md).
ENOUGH_TOKENS = 8192
# Below this the host cannot launch kernels as fast as a large card runs them, and recomputing less no longer pays.
FEW_TOKENS = 3072
ROUND = 256
# Steps differ in tokens: most have at most so many times the mean.
SPREAD = 1.25
# Of the memory that is free at the start, what tensors may take; the rest is for libraries and for gaps between tensors.
USABLE = 0.92

Estimate = Callable[[Execution, int], Footprint]


@dataclass(frozen=True)
class Choice:
    """A speed by its name, the most tokens of a micro-batch, and what they take; ``fits`` tells whether all of it does."""

    speed: str
    tokens: int
    footprint: Footprint
    fits: bool


def choose(
    speeds: Mapping[str, Execution],
    estimate: Estimate,
    *,
    budget: float,
    longest: int,
    per_step: int,
    fixed: int | None,
    enough: int = ENOUGH_TOKENS,
) -> Choice:
    """Take the first speed that fits with enough tokens, else the one that fits with the most.

    Args:
        speeds: What may be chosen, the fastest first.
        estimate: The footprint of a micro-batch.
        budget: Bytes that tensors may take.
        longest: Tokens of the longest sample, which every micro-batch must hold.
        per_step: Tokens of a usual optimizer step; a much larger micro-batch would stay half empty.
        fixed: Tokens of a micro-batch where they are not to be chosen.
        enough: The most tokens that are tried.
    """
    largest = _rounded(int(SPREAD * per_step))
    wanted = max(longest, min(enough, largest))
    found = []
    for name, execution in speeds.items():
        tokens = fixed or _most_tokens(lambda n, e=execution: estimate(e, n).total <= budget, longest, wanted)  # type: ignore[misc]
        footprint = estimate(execution, min(tokens, max(longest, largest)))
        found.append(Choice(name, tokens, footprint, footprint.total <= budget))
        if found[-1].fits and tokens >= min(wanted, max(longest, min(FEW_TOKENS, _rounded(per_step)))):
            return found[-1]
    # Nothing runs as it should: what fits with the most tokens, else what is least too large.
    return max(found, key=lambda one: (one.fits, one.tokens if one.fits else -one.footprint.total))


def _rounded(tokens: int) -> int:
    return -(-tokens // ROUND) * ROUND


def _most_tokens(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Return the most tokens between ``low`` and ``high`` that fit, in whole rounds; ``low`` where even that does not."""
    if fits(high):
        return high
    sizes = range(-(-low // ROUND), high // ROUND)
    best = low
    for size in sizes:
        if not fits(size * ROUND):
            break
        best = size * ROUND
    return best
