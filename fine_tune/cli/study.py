"""`study`: finished runs compared in one command, from the evaluations to one page."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fine_tune.cli.verb import run_verb
from fine_tune.errors import ConfigError
from fine_tune.evaluation_config import check_evaluation
from fine_tune.evaluation_schema import EVALUATIONS
from fine_tune.report.visible import visible

USAGE = """usage: fine-tune study <study> ckpt=[...] [<evaluation>.<key>=value ...] [key=value ...] [out=<file>]

  side_by_side   the same questions to base, SFT and DPO: answers prompt by prompt, exact match, verdicts
                 fine-tune study side_by_side ckpt=[base,runs/sft,runs/dpo]
  adapters       QLoRA against LoRA: peak memory, time, loss, perplexity and, with mmlu.path=, MMLU
                 fine-tune study adapters ckpt=[runs/lora,runs/qlora] mmlu.path=mmlu

Each evaluation is asked as `fine-tune evaluate` does, and what is there already is not done again. Naming a value of
another evaluation, such as compare.prompts=[Hi.], asks that one, too; eval=[exact_match,preference] chooses all of them.
run_dir=, seed=, precision= and accelerator= are those of evaluate. The page is written into the folder of the last run,
or to out=<file>."""


@dataclass(frozen=True)
class Kind:
    """What a study asks if it is not told otherwise, and how its page begins."""

    title: str
    asks: tuple[str, ...]
    lead: str


KINDS = {
    "side_by_side": Kind("Side by side", ("exact_match",), "The same questions to every checkpoint, item by item."),
    "adapters": Kind(
        "Adapters compared",
        ("perplexity",),
        "What each way of adapting the same base costs, and what it reaches on the same items.",
    ),
}
# A study of adapters without it says how to get it.
MMLU, NO_MMLU = "mmlu", "MMLU was not asked: add mmlu.path=<folder>."
# An evaluation's key as its own check names it, and no file's name.
OWN_KEY = re.compile(r"(?<![\w/.-])eval\.")


@dataclass
class Words:
    """The words of a study, sorted: what goes to every evaluation, and what to one."""

    out: Path | None = None
    chosen: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    own: dict[str, list[str]] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study verb and return its exit code.

    Args:
        argv: Words after the verb; None takes those of the process.
    """
    return run_verb(argv, USAGE, lambda words: print(visible(f"the report: {study(words[0], words[1:])}")))


def study(name: str, overrides: Sequence[str]) -> Path:
    """Ask what a study asks and write its page; return the page's file.

    Raises:
        ConfigError: A word is refused; all problems are told together, before torch is imported.
        FineTuneError: An evaluation stopped.
    """
    if name not in KINDS:
        raise ConfigError([f"{name}: no such study. Choose one of {', '.join(KINDS)}."])
    kind, words = KINDS[name], _sort(overrides)
    asked = words.chosen or list(dict.fromkeys((*kind.asks, *words.own)))
    checkpoints = _check(asked, words)
    import fine_tune
    from fine_tune.report.page import Study, write_report

    results = [fine_tune.evaluate(_words_of(one, words)) for one in asked]
    places = tuple(Path(result["folder"]).resolve() for result in results)
    labels = tuple(results[0]["results"])
    folders = [_run_of(word) for word in checkpoints]
    named = zip(labels, folders, checkpoints, strict=True)
    page = Study(
        title=f"{kind.title}: {', '.join(labels)}",
        lead=kind.lead if name != "adapters" or MMLU in asked else f"{kind.lead} {NO_MMLU}",
        labels=labels,
        runs={label: run for label, run, word in named if run is not None and _is_end(word, run)},
        places=places,
        command=f"fine-tune study {shlex.join([name, *overrides])}",
    )
    root = places[0].parent.parent
    others = list(dict.fromkeys(run for run in folders if run is not None))
    return write_report(root, words.out or root / f"{name}.html", others=others, study=page)


def _sort(overrides: Sequence[str]) -> Words:
    """Part the words by where they go; those that are nobody's are refused by the evaluations' own check."""
    found = Words()
    for word in overrides:
        key, _, value = word.partition("=")
        group, dot, _ = key.partition(".")
        if key == "out" and value:
            found.out = Path(value).expanduser()
        elif key == "eval":
            found.chosen = [one.strip() for one in value.strip("[] ").split(",") if one.strip()]
        elif dot and group in EVALUATIONS:
            found.own.setdefault(group, []).append(f"eval.{word.removeprefix(group + '.')}")
        else:
            found.shared.append(word)
    return found


def _words_of(evaluation: str, words: Words) -> list[str]:
    return [*words.shared, f"eval={evaluation}", *words.own.get(evaluation, [])]


def _check(asked: Sequence[str], words: Words) -> list[str]:
    """Check the words of every evaluation, and return the checkpoints that they name.

    Raises:
        ConfigError: Problems of all of them together.
    """
    problems: list[str] = []
    cfg: dict[str, Any] = {}
    for name in asked:
        try:
            cfg = check_evaluation(_words_of(name, words))
        except ConfigError as error:
            problems += [OWN_KEY.sub(f"{name}.", problem) for problem in error.problems]
    left = [f"{name}: eval= does not name this evaluation. Add it there." for name in words.own if name not in asked]
    if words.out is not None and words.out.is_dir():
        left.append(f"out = {words.out}: is a folder. Pass the name of a file, such as {words.out / 'study.html'}.")
    if cfg and (isinstance(cfg["ckpt"], str) or len(cfg["ckpt"]) < 2):
        left.append("ckpt: a study compares. Pass two checkpoints or more, such as ckpt=[base,runs/sft].")
    if problems or left:
        raise ConfigError(list(dict.fromkeys([*problems, *left])))
    return list(cfg["ckpt"])


def _run_of(checkpoint: str) -> Path | None:
    """Find the run folder that a checkpoint is, or is in; None for the base, and for what is of no run."""
    folder = Path(checkpoint).expanduser().resolve()
    inside = (folder, *folder.parents[:2]) if checkpoint != "base" else ()
    return next((place for place in inside if (place / "config.yaml").is_file()), None)


def _is_end(checkpoint: str, run: Path) -> bool:
    """Tell whether the figures of a run are those of this checkpoint: the run, or its final adapter."""
    return Path(checkpoint).expanduser().resolve() in (run, run / "adapter")
