"""Which figures a run's measurements are shown in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from fine_tune.report.charts import Chart, draw, series_of
from fine_tune.report.reading import RunFiles
from fine_tune.report.visible import number

# Further measurements that nobody chose a place for.
MAX_FURTHER = 24


class Line(NamedTuple):
    """One measurement in a figure."""

    key: str
    label: str
    colour: int = 0
    dashed: bool = False


class Panel(NamedTuple):
    """One figure; ``unit`` in braces is a key of the summary."""

    title: str
    unit: str
    lines: tuple[Line, ...]


def both(name: str) -> tuple[Line, ...]:
    """Return a measurement of training and of validation, the second dashed."""
    return (Line(f"train/{name}", "train"), Line(f"val/{name}", "validation", 1, True))


def sides(name: str) -> tuple[Line, ...]:
    """Return a measurement of both answers of a pair, in training and in validation."""
    return tuple(
        Line(f"{stage}/{name}/{side}", f"{side}{said}", colour, bool(said))
        for stage, said in (("train", ""), ("val", ", validation"))
        for side, colour in (("chosen", 2), ("rejected", 1))
    )


TRAINING = (
    Panel("Loss", "{loss_unit}", both("loss")),
    Panel("Learning rate", "", (Line("learning_rate", "per step"),)),
    Panel("Gradient norm", "before clipping", (Line("grad_norm", "per step"),)),
    Panel("Speed", "tokens/s", (Line("tokens_per_second", "per step"),)),
)
PREFERENCES = (
    Panel("Rewards", "beta x nats", sides("rewards")),
    Panel("Reward margin", "chosen - rejected", both("rewards/margins")),
    Panel("Reward accuracy", "share of pairs", both("rewards/accuracies")),
    Panel("Log-probability per token", "nats", sides("mean_logps")),
    Panel("KL to the reference", "nats/token", both("kl")),
)
# Counts that are no curve, and what is shown elsewhere.
NO_CURVES = {"step", "epoch", "samples", "tokens", "supervised_tokens"}


def charts_of(run: RunFiles) -> list[Chart]:
    """Return every figure of a run's own objective, as far as it was measured; those of pairs only where there are pairs."""
    return _charts(run, (*TRAINING, *PREFERENCES))


def further_charts(run: RunFiles) -> tuple[list[Chart], int]:
    """Return the measurements that have no place of their own, and how many more were left out."""
    known = {line.key for panel in (*TRAINING, *PREFERENCES) for line in panel.lines} | NO_CURVES
    keys = dict.fromkeys(
        key for entry in run.metrics for key, value in entry.items() if key not in known and number(value) is not None
    )
    names = list(dict.fromkeys(key.removeprefix("train/").removeprefix("val/") for key in keys))
    panels = [Panel(name, "", (*both(name), Line(name, "per step", 2))) for name in islice(names, MAX_FURTHER)]
    return _charts(run, panels), max(0, len(names) - MAX_FURTHER)


def compared_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """Return the losses of several runs on one scale, where at least two are counted in the same unit."""
    charts: list[Chart | None] = []
    for unit in dict.fromkeys(_unit(run) for run in runs):
        same = [run for run in runs if _unit(run) == unit]
        if len(same) < 2:
            continue
        for key, title, dashed in (("train/loss", "Training loss", False), ("val/loss", "Validation loss", True)):
            lines = [series_of(run.metrics, key, run.name, colour=i % 6, dashed=dashed) for i, run in enumerate(same)]
            charts.append(draw(title, lines, unit=unit))
    return [chart for chart in charts if chart is not None]


def _unit(run: RunFiles) -> str:
    named = run.summary.get("loss_unit")
    return named if isinstance(named, str) else ""


def _charts(run: RunFiles, panels: Sequence[Panel]) -> list[Chart]:
    drawn = (_chart(run, panel) for panel in panels)
    return [chart for chart in drawn if chart is not None]


def _chart(run: RunFiles, panel: Panel) -> Chart | None:
    unit: Any = run.summary.get(panel.unit[1:-1]) if panel.unit.startswith("{") else panel.unit
    lines = [series_of(run.metrics, key, label, colour=c, dashed=dashed) for key, label, c, dashed in panel.lines]
    return draw(panel.title, lines, unit=unit if isinstance(unit, str) else "")
