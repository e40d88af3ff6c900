"""The rows of a run: prepared with a progress bar, and planned into optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fine_tune.assembly import prepare_spec
from fine_tune.callbacks.progress import progress_bar
from fine_tune.data.module import PackedDataModule
from fine_tune.memory_plan import Samples
from fine_tune.targets import build
from fine_tune.text.template import ChatTemplate

STEPS_LOOKED_AT = 200


def prepared_data(cfg: Mapping[str, Any], tokenizer: Any, template: ChatTemplate) -> PackedDataModule:
    """Prepare the rows of a checked config, or take them from the cache."""
    data: PackedDataModule = build(
        {"_target_": cfg["data"]["_target_"]},
        spec=prepare_spec(cfg),
        seed=cfg["seed"],
        global_batch_size=cfg["optim"]["global_batch_size"],
        num_workers=cfg["trainer"]["num_workers"],
    )
    with progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, note="")
            bar.update(tasks[what], completed=done, total=total)

        data.prepare_tables(tokenizer, template, progress)
    return data


def samples_of(cfg: Mapping[str, Any], data: PackedDataModule, *, num_ranks: int) -> Samples:
    """Tell what the prepared rows ask of a device's memory."""
    lengths = data.prepared.train.lengths.tolist()
    return Samples.of(lengths, global_batch_size=cfg["optim"]["global_batch_size"], num_ranks=num_ranks)


def fullest_step(data: PackedDataModule, *, first: int = 0, rank: int = 0) -> tuple[int, int]:
    """Find the step with the fullest micro-batch among the next ones, and how many tokens that has."""
    lengths = data.prepared.train.lengths
    found = []
    for number in range(first, min(data.num_steps, first + STEPS_LOOKED_AT)):
        micros = data.planner.step(number).micro_batches[rank]
        found.append((max((int(lengths[list(one)].sum()) for one in micros), default=0), -number))
    tokens, step = max(found)
    return -step, tokens


def plan_steps(cfg: Mapping[str, Any], data: PackedDataModule, *, num_ranks: int) -> None:
    """Plan the optimizer steps, once ``trainer.micro_batch_tokens`` is settled."""
    settled = {key: cfg["trainer"][key] for key in ("micro_batch_tokens", "max_steps", "max_epochs")}
    data.plan_steps(num_ranks=num_ranks, **settled)
