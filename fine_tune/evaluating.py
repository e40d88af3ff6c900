"""Evaluate checkpoints on identical items: resumable, cached by everything that decides an answer, compared pairwise."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import rich
from rich.table import Table
from rich.text import Text

from fine_tune.callbacks.progress import progress_bar
from fine_tune.device import DevicePlan, plan_device
from fine_tune.errors import RunLocked
from fine_tune.evaluation.protocol import Evaluation, Subject, score_each
from fine_tune.evaluation.record import Record, Result
from fine_tune.evaluation.same_items import check_same_items, what_is_asked
from fine_tune.evaluation.verdict import Verdict, compare, verdict_table
from fine_tune.evaluation_parts import build_evaluation
from fine_tune.interrupts import StopSignals
from fine_tune.quiet import quiet_libraries
from fine_tune.report.visible import brief, visible
from fine_tune.rng import untouched_rng
from fine_tune.run_folder import open_folder, versions
from fine_tune.storage import finite, write_json
from fine_tune.subjects import Named, Stage, find

VERDICT = "verdict.json"


def run_evaluation(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Do what a checked config of ``evaluate`` asks for, and return metrics by checkpoint and the verdicts.

    Raises:
        FineTuneError: Whatever stops it, with the exit code for it.
    """
    quiet_libraries()
    plan = plan_device(accelerator=cfg["accelerator"], devices=1, num_nodes=1, precision=cfg["precision"])
    words = [cfg["ckpt"]] if isinstance(cfg["ckpt"], str) else list(cfg["ckpt"])
    named = find(words, cfg)
    evaluation = build_evaluation(cfg["eval"], named, seed=cfg["seed"])
    run = next((one.run for one in reversed(named) if one.run is not None), Path("runs") / named[-1].label)
    place = (Path(cfg["run_dir"]).expanduser() if cfg["run_dir"] else run) / "eval" / evaluation.name
    # Attaching an adapter draws its first values; the caller's random states are its own.
    with StopSignals(), untouched_rng(), _locked(place):
        if len(named) > 1:
            # One of an earlier list; it must not stand beside results that it does not speak of.
            (place / VERDICT).unlink(missing_ok=True)
        results = evaluate(named, evaluation, {"eval": cfg["eval"], "seed": cfg["seed"]}, place=place, plan=plan)
        show(results, evaluation)
        verdicts = judge(results, evaluation, seed=cfg["seed"])
        if verdicts:
            write_json(place / VERDICT, [verdict.as_dict() for verdict in verdicts])
    _tell(f"everything is in {place}")
    return {
        "results": {result.label: result.metrics for result in results},
        "verdicts": [verdict.as_dict() for verdict in verdicts],
        "folder": str(place),
    }


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Let one process at a time write the results of a place."""
    try:
        opened = open_folder(place)
    except RunLocked as error:
        raise RunLocked(
            f"{place} is in use by another evaluation. Wait for it, or write elsewhere with run_dir=<folder>."
        ) from error
    try:
        yield
    finally:
        opened.close()


def _tell(line: str) -> None:
    """Print a line whole, so that a path in it can be copied, and with nothing hidden in it."""
    rich.get_console().print(Text(visible(line)), soft_wrap=True)


def judge(results: Sequence[Result], evaluation: Evaluation, *, seed: int) -> list[Verdict]:
    """Compare neighbours, and the last with the first, and print each verdict."""
    if evaluation.compares is None or len(results) < 2:
        return []
    pairs = list(pairwise(results))
    if len(results) > 2:
        pairs.append((results[0], results[-1]))
    verdicts = []
    for one, other in pairs:
        settings: dict[str, Any] = {"field": evaluation.compares, "better": evaluation.better, "seed": seed}
        verdict = compare(one.lines, other.lines, group_of=evaluation.groups, **settings).named(one.label, other.label)
        verdict = verdict.calling(getattr(evaluation, "score_is", ""))
        verdicts.append(verdict)
        rich.get_console().print(verdict_table(verdict))
    return verdicts


def evaluate(
    named: Sequence[Named], evaluation: Evaluation, settings: Mapping[str, Any], *, place: Path, plan: DevicePlan
) -> list[Result]:
    """Evaluate each checkpoint, loading every base once, and return the results in the order asked for.

    Args:
        named: The checkpoints.
        evaluation: What to do.
        settings: Its settings as plain values, part of the key under which results are kept.
        place: Folder of the results: of the one checkpoint, or with one folder per label below it.
        plan: Device and precision.
    """
    found: dict[str, Result] = {}
    first: tuple[str, list[dict[str, Any]]] | None = None
    for key in dict.fromkeys(one.base_key() for one in named):
        group = [one for one in named if one.base_key() == key]
        with rich.get_console().status(Text(visible(f"loading {group[0].cfg['model']['path']}"))):
            stage = Stage(group[0], plan)
        # The base last: PEFT then has an adapter to switch off, or there never was one.
        for one in sorted(group, key=lambda one: one.weights is None):
            folder = place if len(named) == 1 else place / one.label
            subject = stage.show(one)
            items = list(evaluation.prepare(subject.tokenizer, subject.template))[: settings["eval"].get("num_items")]
            asked = (one.label, what_is_asked(items))
            first = first or asked
            if evaluation.compares is not None and len(named) > 1:
                # Now, not when everything has been computed.
                check_same_items(first[1], asked[1], names=(first[0], asked[0]))
            identity = {**settings, **stage.identity(one)}
            found[one.label] = _evaluate(one, subject, evaluation, items, identity=identity, folder=folder)
        # Before the next base is loaded: two of them need not fit.
        del stage, subject
    return [found[one.label] for one in named]


def _evaluate(
    named: Named, subject: Subject, evaluation: Evaluation, items: Sequence[Any], *, identity: Mapping[str, Any], folder: Path
) -> Result:
    chunks = evaluation.chunks(items)
    if (note := getattr(evaluation, "note", None)) is not None:
        _tell(note(items, subject.tokenizer))
    content = [(item.id, item.prompt, getattr(item, "digest", None), getattr(item, "target", None)) for item in items]
    digest = hashlib.sha256(json.dumps([content, chunks]).encode()).hexdigest()
    key = {**identity, "template": subject.template.sha256, "items": digest, "versions": versions()}
    record = Record(folder, key, evaluation.compares)
    if (done := record.finished()) is not None:
        _tell(f"{named.label}: {len(done.lines)} items are there already ({folder}); delete the folder to do them again.")
        return done
    started = time.perf_counter()
    lines = _score(named.label, subject, evaluation, items, chunks, record)
    report = {
        "name": evaluation.name,
        "checkpoint": named.label,
        "num_items": len(lines),
        "metrics": evaluation.metrics(lines),
        "seconds": time.perf_counter() - started,
    }
    return record.finish(report, lines)


def _score(
    label: str, subject: Subject, evaluation: Evaluation, items: Sequence[Any], chunks: list[list[int]], record: Record
) -> list[dict[str, Any]]:
    """Score the chunks that are not there yet; each is on disk before the next one's lines are asked for."""
    known = record.start(chunks)
    missing = [index for index in range(len(chunks)) if index not in known]
    with progress_bar() as bar:
        task = bar.add_task(label, total=len(items), note="")
        bar.advance(task, sum(len(chunks[index]) for index in known))
        with closing(score_each(evaluation, subject, items, [chunks[index] for index in missing])) as scored:
            for index, lines in zip(missing, scored, strict=True):
                known[index] = [finite(line) for line in lines]
                record.add(index, known[index])
                bar.advance(task, len(lines))
    by_item = {i: line for index, lines in known.items() for i, line in zip(chunks[index], lines, strict=True)}
    return [by_item[i] for i in range(len(items))]


def show(results: Sequence[Result], evaluation: Evaluation) -> None:
    """Print one column per checkpoint; where nothing is judged, also what each of them said."""
    if evaluation.compares is None:
        _show_answers(results)
    table = Table(title=evaluation.name, title_justify="left")
    table.add_column("")
    for result in results:
        table.add_column(result.label, justify="right")
    names = [name for name in results[0].metrics if all(_is_number(result.metrics.get(name)) for result in results)]
    for name in names:
        table.add_row(name, *(f"{result.metrics[name]:,.4g}" for result in results))
    rich.get_console().print(table)


def _show_answers(results: Sequence[Result]) -> None:
    table = Table(show_lines=True)
    for name in ("prompt", *(result.label for result in results)):
        table.add_column(name, overflow="fold", ratio=1)
    for lines in zip(*(result.lines for result in results), strict=True):
        said = [lines[0]["prompt"], *(line["completion"] for line in lines)]
        # Text, not markup: a model's square brackets are its own, and so are its control characters.
        table.add_row(*(Text(visible(brief(text))) for text in said))
    rich.get_console().print(table)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
