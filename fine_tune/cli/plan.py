"""`plan`: what a run will take of its device, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fine_tune.allocator import let_segments_grow
from fine_tune.cli.verb import run_verb
from fine_tune.cli.words import above_zero, flag, read_beside_config
from fine_tune.errors import MemoryExhausted
from fine_tune.threads import wait_politely

USAGE = """usage: fine-tune plan [key=value ...] [card_gb=<GB>] [rehearse=true] [json=true]

Takes the words of `train`, prepares the same rows, and adds up what a training step takes: weights, what trains,
activations, the head; and how many tokens of a micro-batch fit at each speed. No weights are loaded.
  fine-tune plan model=llama2_7b method=qlora data=oasst1
  fine-tune plan model=llama2_7b method=lora data=oasst1 card_gb=24

card_gb=<GB>    plan for a card that is not here (1 GB = 1e9 bytes; Ampere's generation or later)
rehearse=true   then load the model here and run the fullest step twice: predicted beside measured
json=true       figures for machines

Exit code 7 if the step does not fit."""
OWN = {"card_gb": above_zero, "rehearse": flag, "json": flag}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the plan verb and return its exit code.

    Args:
        argv: Words after the verb; None takes those of the process.
    """
    return run_verb(argv, USAGE, _plan, needs_words=False)


def _plan(typed: list[str]) -> None:
    own, cfg = read_beside_config(typed, OWN, rule=_together)
    let_segments_grow()
    wait_politely()
    # The first import of torch, after everything that can be refused without it.
    import rich

    from fine_tune.planning import plan_run
    from fine_tune.planning_table import render

    # Progress and notes are for people; as JSON the figures are alone on stdout.
    rich.reconfigure(stderr=bool(own.get("json")))
    try:
        found = plan_run(cfg, card_gb=own.get("card_gb"), rehearse=own.get("rehearse", False))
    finally:
        rich.reconfigure()
    if own.get("json"):
        figures = asdict(found)
        figures.pop("cfg")
        print(json.dumps(figures, indent=2))
    else:
        rich.get_console().print(render(found))
    if not found.chosen.fits:
        raise MemoryExhausted("this step is not expected to fit. Lower data.max_seq_len or method.rank, or use method=qlora.")


def _together(own: Mapping[str, Any]) -> str | None:
    """Say what is wrong with the verb's own settings together."""
    if own.get("rehearse") and own.get("card_gb"):
        return "rehearse=true: needs the device itself. Leave card_gb out."
    return None
