"""Load who is to answer, and begin the conversation."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import rich
from rich.text import Text

from fine_tune.chat.commands import system_problem
from fine_tune.chat.rows_file import TRAINS, RowsFile
from fine_tune.chat.session import Session
from fine_tune.chat.speaker import SharedStage, Speaker
from fine_tune.chat.talk import Talk
from fine_tune.chat.terminal import Terminal
from fine_tune.device import DevicePlan, plan_device
from fine_tune.errors import ConfigError
from fine_tune.evaluation.sampling import Sampling
from fine_tune.interrupts import Interrupted
from fine_tune.quiet import quiet_libraries
from fine_tune.report.visible import visible
from fine_tune.rng import untouched_rng
from fine_tune.subjects import Named, Stage, find


def run_chat(cfg: Mapping[str, Any], pairs: RowsFile | None = None, terminal: Terminal | None = None) -> None:
    """Hold the conversation that a checked config of ``chat`` asks for.

    Args:
        cfg: The config.
        pairs: The file of ``save``.
        terminal: Where the person is; None takes standard input and output.

    Raises:
        FineTuneError: Whatever stops it, with the exit code for it.
    """
    quiet_libraries()
    plan = plan_device(accelerator=cfg["accelerator"], devices=1, num_nodes=1, precision=cfg["precision"])
    named = find(cfg["ckpt"], cfg)
    terminal = terminal or Terminal()
    # Attaching an adapter draws its first values; the caller's random states are its own.
    with _terminable(), untouched_rng():
        speakers = _load(named, cfg, plan)
        if cfg["system"] and (problem := system_problem(cfg["system"], speakers)):
            raise ConfigError(f"system = {cfg['system']}: {problem}. Leave it out.")
        for speaker in speakers:
            terminal.say(
                f"{speaker.label} on {plan.describe()}, template {speaker.template.name}, context {speaker.context:,} tokens"
            )
        terminal.say("/help shows the commands, Ctrl-D leaves.")
        try:
            Session(speakers, Talk(cfg["system"]), terminal, pairs).run()
        finally:
            if pairs is not None and pairs.num_added:
                noun = "pair" if pairs.num_added == 1 else "pairs"
                terminal.say(f"{pairs.num_added} {noun} added to {pairs.path}: {TRAINS['pair']} data.path={pairs.path}")


def _load(named: Sequence[Named], cfg: Mapping[str, Any], plan: DevicePlan) -> list[Speaker]:
    """Load each base once and find who stands on it."""
    sampling = Sampling(cfg["temperature"], cfg["top_p"], cfg["top_k"], cfg["seed"])
    stages: dict[str, SharedStage] = {}
    speakers = []
    for one in named:
        with rich.get_console().status(Text(visible(f"loading {one.label}"))):
            key = one.base_key()
            stages[key] = stages.get(key) or SharedStage(Stage(one, plan))
            speakers.append(Speaker(one, stages[key], sampling, cfg["max_new_tokens"]))
    return speakers


@contextmanager
def _terminable() -> Iterator[None]:
    """Leave in good order on SIGTERM: the terminal gets its settings back."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum, "stopped by SIGTERM.")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
