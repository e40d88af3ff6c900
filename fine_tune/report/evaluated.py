"""Evaluations of several checkpoints as one table each: a row per metric, a column per checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fine_tune.report import tables
from fine_tune.report.reading import EvaluationFiles, RunFiles, section
from fine_tune.report.visible import number, plain

# What a run asks by itself: before it starts, where it starts from an adapter, and when it has ended.
HELD_OUT = {"held_out_base": "base", "held_out_initial": "at the start", "held_out": "tuned"}
KNOWN = ("name", "checkpoint", "num_items", "seconds", "metrics")


@dataclass(frozen=True)
class Asked:
    """One evaluation in one run's folder: what was found of each checkpoint, by its label."""

    run: RunFiles
    name: str
    found: Mapping[str, EvaluationFiles]

    def metrics(self, label: str) -> dict[str, Any]:
        """Return the metrics of one checkpoint."""
        return section(self.found[label].metrics, "metrics")


def asked(runs: Sequence[RunFiles], order: Sequence[str] = ()) -> list[Asked]:
    """Put together what was asked together; the base comes first, then the labels of ``order``, then all others."""
    together: dict[tuple[int, str], dict[str, EvaluationFiles]] = {}
    for position, run in enumerate(runs):
        for evaluation in run.evaluations:
            if evaluation.metrics:
                name, label = _name_and_label(run, evaluation)
                together.setdefault((position, name), {})[label] = evaluation
    return [Asked(runs[position], name, _ordered(found, order)) for (position, name), found in together.items()]


def _name_and_label(run: RunFiles, evaluation: EvaluationFiles) -> tuple[str, str]:
    name, _, label = evaluation.name.rpartition("/")
    if label in HELD_OUT and not name:
        return "held_out", HELD_OUT[label]
    if name or not run.is_run:
        return name or "evaluation", label
    return label, plain(evaluation.metrics.get("checkpoint"))


def _ordered(found: Mapping[str, EvaluationFiles], order: Sequence[str]) -> dict[str, EvaluationFiles]:
    places = {label: place for place, label in enumerate(("base", "at the start", *order))}
    return {label: found[label] for label in sorted(found, key=lambda label: places.get(label, len(places)))}


def card(one: Asked) -> dict[str, Any]:
    """Lay out one evaluation for the page: its figures in one table, and what is nested in them below."""
    told = {label: dict(_told(found.metrics)) for label, found in one.found.items()}
    rows = dict.fromkeys(key for values in told.values() for key in values)
    figures = tuple((tables.Cell(key), *(values.get(key, tables.Cell("")) for values in told.values())) for key in rows)
    nested = {label: tables.show(_whole(found.metrics)).tables for label, found in one.found.items()}
    return {
        "run": one.run.name,
        "name": one.name,
        "figures": tables.Table(one.name, ("", *told), figures),
        "nested": [(label, table) for label, found in nested.items() for table in found],
    }


def _told(metrics: Mapping[str, Any]) -> Iterator[tuple[str, tables.Cell]]:
    """Yield every single value of a metrics.json; those inside it are tables of their own."""
    yield "items", tables.cell(metrics.get("num_items"))
    whole = _whole(metrics)
    figures = {tables.words(key) for key, value in whole.items() if number(value) is not None}
    for key, text in tables.show(whole).facts:
        yield key, tables.Cell(text, key in figures)
    yield "seconds", tables.Cell(plain(metrics.get("seconds"), "{:,.1f}"), figure=True)


def _whole(metrics: Mapping[str, Any]) -> dict[str, Any]:
    further = {key: value for key, value in metrics.items() if key not in KNOWN}
    return {**section(dict(metrics), "metrics"), **further}
