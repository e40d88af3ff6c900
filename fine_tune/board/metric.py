"""What runs are ranked by, which way is up, and how sure a figure is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from fine_tune.board.rows import Row
from fine_tune.errors import ConfigError
from fine_tune.report.reading import RunFiles, read_mapping
from fine_tune.report.visible import number
from fine_tune.summary import ROWS

LEVEL = 0.05
# What measurements of steps are called in the summary.
IN_SUMMARY = {
    "val/loss": "final_loss",
    "val/rewards/accuracies": "preference_accuracy",
    "val/rewards/margins": "reward_margin",
    "val/kl": "kl",
}
SMALL_IS_GOOD = re.compile(r"loss|perplexity|nats|seconds|memory|(^|[/_])kl$|grad_norm|completion_tokens$|error")
FORMS = {key: form.split()[0] for _, key, form in ROWS}


@dataclass(frozen=True)
class Metric:
    """A figure of the summary, or the last one of a name in metrics.jsonl."""

    name: str
    lower_is_better: bool

    @property
    def way(self) -> str:
        """Which way is up, in words."""
        return "lower is better" if self.lower_is_better else "higher is better"

    @property
    def form(self) -> str:
        """How its figures are printed; empty: four significant digits."""
        return FORMS.get(self.name, "")

    def worth(self, value: float) -> float:
        """Return a number that is smaller for a better figure."""
        return value if self.lower_is_better else -value

    def of(self, row: Row) -> float | None:
        """Return a run's figure, None where it has no finite one."""
        return number(row.summary[self.name] if self.name in row.summary else row.last(self.name))


def choose(rows: Sequence[Row], sweep: Mapping[str, Any], wanted: str | None) -> Metric:
    """Choose what to rank by: what is wanted, what the sweep looked at, exact match if all have it, else the loss.

    Raises:
        ConfigError: No finished run has the wanted figure.
    """
    done = [row for row in rows if row.finished]
    named = sweep.get("metric")
    of_sweep = IN_SUMMARY.get(named, named) if isinstance(named, str) else None
    if wanted is not None:
        name = IN_SUMMARY.get(wanted, wanted)
        if done and not any(_has(row, name) for row in done):
            raise ConfigError(f"metric = {wanted}: no finished run has it. Choose from {', '.join(_names(done))}.")
    elif of_sweep and (not done or any(_has(row, of_sweep) for row in done)):
        name = of_sweep
    elif done and all(_has(row, "exact_match") for row in done):
        name = "exact_match"
    else:
        name = "final_loss"
    direction = sweep.get("direction") if name == of_sweep else None
    lower = direction == "minimize" if direction in ("minimize", "maximize") else bool(SMALL_IS_GOOD.search(name))
    return Metric(name, lower)


def interval_of(row: Row, metric: Metric) -> tuple[float, float] | None:
    """Return the 95 % interval of a run's figure where the number of its items is known: that of its exact match."""
    if metric.name != "exact_match" or row.value is None or row.path is None:
        return None
    record = read_mapping(RunFiles(row.path), row.path / "eval" / "held_out" / "metrics.json")
    asked, scores = record.get("num_items"), record.get("metrics")
    same = isinstance(scores, dict) and number(scores.get("exact_match")) == row.value
    if not same or not isinstance(asked, int) or isinstance(asked, bool) or asked < 1:
        return None
    return wilson(row.value, asked) if 0 <= row.value <= 1 else None


def wilson(share: float, items: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of independent items.

    Example:
        >>> [round(end, 4) for end in wilson(0.9, 200)]
        [0.8506, 0.9343]

    Source: Wilson 1927, JASA 22, the score interval; unlike the normal one it has a width at 0 and 1.
    """
    z = NormalDist().inv_cdf(1 - LEVEL / 2)
    centre = (share + z * z / (2 * items)) / (1 + z * z / items)
    spread = z / (1 + z * z / items) * math.sqrt(share * (1 - share) / items + z * z / (4 * items * items))
    return max(0.0, centre - spread), min(1.0, centre + spread)


def _has(row: Row, name: str) -> bool:
    return Metric(name, False).of(row) is not None


def _names(rows: Sequence[Row]) -> list[str]:
    """Name what can be ranked by, the figures of results before those of cost."""
    known = [key for _, key, _ in ROWS]
    found = dict.fromkeys(key for row in rows for key in row.summary if number(row.summary[key]) is not None)
    return sorted(found, key=lambda key: known.index(key) if key in known else len(known)) or [
        "none: no figure is there"
    ]
