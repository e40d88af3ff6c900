"""Runs and checkpoints in one table: what they cost, what they reached, and how they compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fine_tune.report.evaluated import Asked
from fine_tune.report.reading import RunFiles
from fine_tune.report.tables import Cell, Table
from fine_tune.report.visible import number, plain
from fine_tune.summary import ROWS

# Of each evaluation, in the order they are told in, the figures that a comparison is about.
EVALUATED = {
    "exact_match": (
        ("accuracy", "exact match", "{:.3f}"),
        ("f1", "F1 of words", "{:.3f}"),
        ("mean_completion_tokens", "length of an answer", "{:.1f} tokens"),
        ("stop_rate", "answers that end by themselves", "{:.1%}"),
    ),
    "preference": (
        ("accuracy_sum", "chosen above rejected", "{:.3f}"),
        ("reward_accuracy", "the same by reward", "{:.3f}"),
    ),
    "mmlu": (("accuracy", "MMLU", "{:.4f}"), ("accuracy_macro", "MMLU, mean of subjects", "{:.4f}")),
    "gsm8k": (("accuracy", "GSM8K", "{:.3f}"),),
    "perplexity": (("perplexity", "perplexity", "{:.3f}"), ("nats_per_token", "nats per token", "{:.4f}")),
    "compare": (("mean_completion_tokens", "length of an answer", "{:.1f} tokens"),),
}
# What a run costs: first in the table, and as multiples of each other where there are two.
COSTS = ("peak_memory_gb", "reserved_memory_gb", "train_seconds", "wall_seconds", "tokens_per_second")
MULTIPLES = {*COSTS, "trainable_parameters", "total_parameters"}
# What the table says something about even if nothing was measured.
ALWAYS = "peak_memory_gb"


def comparison(runs: Sequence[RunFiles], found: Sequence[Asked], order: Sequence[str] = ()) -> Table | None:
    """Lay out runs and checkpoints, a column for each; None if there is only one.

    Args:
        runs: The runs, in order.
        found: What was asked of which checkpoint.
        order: Labels of all columns; empty: the runs, and their base where it was asked the same.
    """
    summarised = {run.label: run for run in runs if run.summary}
    base = ["base"] if any("base" in one.found and one.name in EVALUATED for one in found) else []
    labels = list(order or (*base, *summarised))
    if len(labels) < 2 or not (order or len(summarised) > 1):
        return None
    costs, results = _summary_rows(summarised, labels, costs=True), _summary_rows(summarised, labels, costs=False)
    rows = tuple([*costs, *_asked_rows(found, labels), *results])
    columns = ("", *labels)
    if len(summarised) != 2:
        return Table("runs", columns, tuple(cells for _, cells in rows))
    one, other = summarised.values()
    multiples = (_multiple(one.summary.get(key), other.summary.get(key), key) for key, _ in rows)
    cells = tuple((*cells, multiple) for (_, cells), multiple in zip(rows, multiples, strict=True))
    return Table("runs", (*columns, f"{other.label} / {one.label}"), cells)


# The key of the summary, empty for what was asked later, and the cells.
Row = tuple[str, tuple[Cell, ...]]


def _summary_rows(runs: Mapping[str, RunFiles], labels: Sequence[str], *, costs: bool) -> Iterator[Row]:
    told = {key: (label, form) for label, key, form in ROWS}
    for key in COSTS if costs else [key for key in told if key not in COSTS]:
        label, form = told[key]
        if any(key == ALWAYS or run.summary.get(key) is not None for run in runs.values()):
            yield key, (Cell(label), *(_summarised(runs.get(name), key, form) for name in labels))


def _summarised(run: RunFiles | None, key: str, form: str) -> Cell:
    if run is None:
        return Cell("", figure=True)
    value, unit = run.summary.get(key), run.summary.get("loss_unit")
    if value is None and key == ALWAYS:
        device = run.summary.get("device")
        return Cell(
            f"not measured ({device.split(',')[0]})" if isinstance(device, str) else "not measured", figure=True
        )
    form = form.replace("{unit}", unit.replace("{", "{{").replace("}", "}}") if isinstance(unit, str) else "")
    return Cell(plain(value, form), figure=True)


def _asked_rows(found: Sequence[Asked], labels: Sequence[str]) -> Iterator[Row]:
    for one in found:
        if sum(label in labels for label in one.found) < 2:
            continue
        for key, title, form in EVALUATED.get(one.name, ()):
            values = [one.metrics(label).get(key) if label in one.found else None for label in labels]
            if any(value is not None for value in values):
                yield "", (Cell(title), *(Cell("" if v is None else plain(v, form), figure=True) for v in values))


def _multiple(one: Any, other: Any, key: str) -> Cell:
    """Say how many times the first figure the second one is."""
    first, second = number(one), number(other)
    if key not in MULTIPLES or first is None or second is None or first <= 0 or second < 0:
        return Cell("", figure=True)
    return Cell(plain(second / first, "{:.3g} x"), figure=True)
