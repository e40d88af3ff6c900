"""The first speed that fits with enough tokens; else what fits best."""

from __future__ import annotations

import pytest

from fine_tune.memory.choice import ENOUGH_TOKENS, FEW_TOKENS, Choice, choose
from fine_tune.memory.estimate import Footprint
from fine_tune.models.execution import Execution

FIRST, SECOND = Execution("selective"), Execution("full")
SPEEDS = {"balanced": FIRST, "lean": SECOND}
# Bytes per token, on top of a base of 1,000.
COST = {FIRST: 10, SECOND: 1}


def estimate(execution: Execution, tokens: int) -> Footprint:
    return Footprint(base=1000, trained=0, kept=COST[execution] * tokens, working=0)


def chosen(budget: float, *, longest: int = 512, per_step: int = 100_000, fixed: int | None = None) -> Choice:
    return choose(SPEEDS, estimate, budget=budget, longest=longest, per_step=per_step, fixed=fixed)


@pytest.mark.parametrize(
    ("budget", "speed", "tokens", "fits"),
    [
        (1000 + 10 * ENOUGH_TOKENS, "balanced", ENOUGH_TOKENS, True),
        (10_000_000, "balanced", ENOUGH_TOKENS, True),
        (1000 + 10 * ENOUGH_TOKENS - 1, "balanced", ENOUGH_TOKENS - 256, True),
        (1000 + 10 * FEW_TOKENS, "balanced", FEW_TOKENS, True),
        # Too few tokens with the first: the second takes less for each.
        (1000 + 10 * FEW_TOKENS - 1, "lean", ENOUGH_TOKENS, True),
        (1000 + 600, "lean", 512, True),
        (1000 + 511, "lean", 512, False),
        (10, "lean", 512, False),
    ],
)
def test_what_a_budget_allows(budget: float, speed: str, tokens: int, fits: bool) -> None:
    found = chosen(budget)
    assert (found.speed, found.tokens, found.fits) == (speed, tokens, fits)
    assert (found.footprint.total <= budget) is fits


def test_no_more_than_a_step_has() -> None:
    assert chosen(1e9, per_step=3000).tokens == 3840, "a quarter more than usual: steps differ"
    assert chosen(1e9, per_step=100).tokens == 512, "a micro-batch holds the longest sample"
    small = chosen(1000 + 10 * 1024, per_step=1000)
    assert (small.speed, small.tokens) == ("balanced", 1024), "a step of few tokens needs no more"


def test_long_samples_are_held_whatever_is_enough() -> None:
    assert chosen(1e9, longest=20_000).tokens == 20_000
    tight = chosen(1000 + 20_500, longest=20_000)
    assert (tight.speed, tight.tokens, tight.fits) == ("lean", 20_000, True)


def test_fixed_tokens_leave_only_the_speed() -> None:
    assert chosen(1000 + 10 * 5000, fixed=5000).speed == "balanced"
    assert chosen(1000 + 10 * 5000 - 1, fixed=5000).speed == "lean"
    assert chosen(1000, fixed=5000).fits is False


def test_fixed_tokens_that_no_step_fills_cost_nothing() -> None:
    found = chosen(1000 + 10 * 4000, per_step=3000, fixed=16_384)
    assert (found.speed, found.tokens, found.fits) == ("balanced", 16_384, True)
    assert found.footprint.kept == 10 * 3840


def test_few_fixed_tokens_do_not_ask_for_another_speed() -> None:
    assert chosen(1e9, fixed=600).speed == "balanced"
