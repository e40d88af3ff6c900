"""report.html: a run and its evaluations as one file that loads nothing and runs nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fine_tune.report import charts, histogram, panels, tables
from fine_tune.report.answers import SideBySide, checkpoints_beside, in_order, side_by_side
from fine_tune.report.comparison import EVALUATED, comparison
from fine_tune.report.evaluated import Asked, asked, card
from fine_tune.report.flips import flipped
from fine_tune.report.held_out import held_out_verdicts
from fine_tune.report.previews import previews
from fine_tune.report.reading import RunFiles, read_run
from fine_tune.report.record import record, tiles
from fine_tune.report.visible import clean
from fine_tune.storage import write_text

TEMPLATES = Path(__file__).resolve().parent / "templates"


@dataclass(frozen=True)
class Study:
    """A page about a comparison, instead of one about a run.

    Attributes:
        title: What is compared.
        lead: A sentence about it; empty: none.
        labels: The checkpoints, in order.
        runs: The runs among them, by label.
        places: Folders of the evaluations that belong to it; others in the runs' folders are left out.
        command: The words that repeat it.
    """

    title: str
    lead: str
    labels: tuple[str, ...]
    runs: Mapping[str, Path]
    places: tuple[Path, ...]
    command: str


def write_report(
    run_dir: Path, out: Path | None = None, *, others: Sequence[Path] = (), study: Study | None = None
) -> Path:
    """Write the report of a run and return its path.

    Args:
        run_dir: The run's folder. What is missing in it is left out with a word.
        out: The file to write; None: report.html in the run's folder.
        others: Runs to set beside it, such as the one it started from.
        study: What the page is about, if not about that run; its evaluations are in ``run_dir``.

    Raises:
        ConfigError: A folder is missing or holds nothing of a run.
        StorageError: The file cannot be written.
    """
    run = read_run(run_dir)
    runs = in_order([*(other for folder in others if (other := read_run(folder)).path != run.path), run])
    text = render(run, runs, study)
    target = run.path / "report.html" if out is None else out
    write_text(target, text)
    return target


def render(run: RunFiles, runs: Sequence[RunFiles], study: Study | None = None) -> str:
    """Return the page of ``run``, compared with all of ``runs``, which are in order and include it."""
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    # By its hash, the page's own style sheet is the only one a browser applies.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    if study is not None:
        _keep(study, runs)
    else:
        _sort(runs)
    content = _content(run, runs, study)
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            style=Markup(style),  # a file of this package
            style_hash=digest,
            drawing=charts,
            high=histogram.HIGH,
            wide=histogram.WIDE,
            **content,
            # Read last: reading items for the tables may have found more of it.
            damaged=[f"{one.name}/{line}" for one in runs for line in dict.fromkeys(one.damaged)],
        )
    )


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _keep(study: Study, runs: Sequence[RunFiles]) -> None:
    """Call runs what the study calls them, forget evaluations of another time, and put its own in its order."""
    labels = {folder: label for label, folder in study.runs.items()}
    for run in runs:
        run.alias = labels.get(run.path, "")
        run.evaluations = [e for place in study.places for e in run.evaluations if place in (e.path, e.path.parent)]


def _sort(runs: Sequence[RunFiles]) -> None:
    """Put the evaluations that people ask first before the others."""
    places = {name: place for place, name in enumerate(EVALUATED)}
    for run in runs:
        run.evaluations.sort(key=lambda e: places.get(e.name.partition("/")[0], len(places)))


def _content(run: RunFiles, runs: Sequence[RunFiles], study: Study | None) -> dict[str, Any]:
    order = study.labels if study else tuple(one.label for one in runs)
    found = asked(runs, order)
    trained = [one for one in runs if one.is_trained]
    alone = None if study or not run.is_trained else record(run)
    return {
        "run": run,
        "study": study,
        "title": study.title if study else run.name,
        "several": len(runs) > 1,
        "verdicts": _verdicts(runs),
        "tiles": [] if study else list(tiles(run.summary)),
        "loss_unit": run.summary.get("loss_unit") or "",
        "comparison": comparison(runs, found, order if study else ()),
        "compared_charts": panels.compared_charts(trained),
        "alone": alone,
        "records": [record(one) for one in trained if alone is None or one is not run],
        "beside": _beside(runs, found, 2 if study else min(3, len(runs) + 1)),
        "previews": previews(runs),
        "evaluations": [card(one) for one in found],
    }


def _beside(runs: Sequence[RunFiles], found: Sequence[Asked], wanted: int) -> list[SideBySide]:
    """Take what was answered in one evaluation; what runs said by themselves only where it has too few columns."""
    together = [beside for one in found for beside in checkpoints_beside(one)]
    return together if any(len(one.columns) >= wanted for one in together) else [*together, *side_by_side(runs)]


def _verdicts(runs: Sequence[RunFiles]) -> list[tables.Verdict]:
    told = [(one, found, tree) for one in runs for found in one.evaluations for tree in found.verdicts]
    several = len({one.path for one, _, _ in told}) > 1
    found = [
        tables.verdict(
            _source(one.name if several else "", evaluation.name, tree), tree, flipped(one, evaluation, tree)
        )
        for one, evaluation, tree in told
    ]
    return found or [verdict for one in runs for verdict in held_out_verdicts(one)]


def _source(run: str, evaluation: str, tree: Mapping[str, Any]) -> str:
    """Say where a verdict comes from, and of scores which way is up."""
    name = f"{run}: {tables.words(evaluation)}" if run else tables.words(evaluation)
    if tree.get("binary") is not False:
        return name
    return f"{name}, {'lower' if tree.get('higher_is_better') is False else 'higher'} is better"
