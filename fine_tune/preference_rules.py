"""Rules of preference training: what the reference needs, and what pairs need."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from fine_tune.rules import Rules

RULES = Rules()
# References that need no file.
NAMED_REFERENCES = ("initial", "base")
SMOOTHED_LOSSES = ("sigmoid", "robust")


@RULES.on("objective.name", "method.trains")
def _reference_is_an_adapter(objective: str, trains: str) -> str | None:
    if objective != "dpo" or trains == "adapter":
        return None
    return (
        f"method.trains = {trains}: with objective=dpo the reference is a frozen adapter on the same base. "
        "Use method=lora or method=qlora."
    )


@RULES.on("objective.name", "method.dropout")
def _reference_sees_what_the_policy_sees(objective: str, dropout: float | None) -> str | None:
    if objective != "dpo" or not dropout:
        return None
    return (
        f"method.dropout = {dropout}: with objective=dpo dropout would make policy and reference differ. "
        "Pass method.dropout=0.0."
    )


@RULES.on("objective.loss", "objective.label_smoothing")
def _loss_is_smoothed(loss: str | None, smoothing: float | None) -> str | None:
    if not smoothing or loss in SMOOTHED_LOSSES:
        return None
    return (
        f"objective.label_smoothing = {smoothing}: loss {loss} does not take it. "
        "Pass objective.label_smoothing=0.0, or objective.loss=sigmoid."
    )


@RULES.on("objective.reference", "resume")
def _reference_exists(reference: str | None, resume: str | None) -> str | None:
    # A run keeps a copy of its reference, so a resumed one no longer needs the folder it came from.
    if reference is None or reference in NAMED_REFERENCES or resume is not None:
        return None
    if Path(reference).expanduser().is_dir():
        return None
    named = ", ".join(NAMED_REFERENCES)
    return (
        f"objective.reference = {reference}: no such folder. "
        f"Pass {named}, or the folder of a run, checkpoint or PEFT adapter on this machine."
    )


@RULES.on("objective.reference", "init_from", "objective.allow_other_start", "resume")
def _training_starts_at_the_reference(
    reference: str | None, init_from: str | None, other_start: bool | None, resume: str | None
) -> str | None:
    if reference != "base" or init_from is None or other_start or resume is not None:
        return None
    return (
        f"objective.reference = base: training starts from init_from={init_from}, which is not the base, so step 0 would be "
        "refused. Pass objective.reference=initial, or objective.allow_other_start=true if that is meant."
    )


@RULES.on("data.batch", "trainer.micro_batch_tokens", "data.max_seq_len")
def _micro_batch_holds_a_pair(batch: str, micro: int | str, longest: int) -> str | None:
    if batch != "pairs" or isinstance(micro, str) or micro >= 2 * longest:
        return None
    return (
        f"trainer.micro_batch_tokens = {micro}: a pair is a prompt and two completions, so it must be at least "
        f"twice data.max_seq_len ({longest}). Pass trainer.micro_batch_tokens={2 * longest} or a smaller data.max_seq_len."
    )


@RULES.on("data.batch", "data.lint", "objective.accepts")
def _pairs_are_linted(batch: str, lint: str | None, accepts: Collection[str]) -> str | None:
    # Rows that the objective does not take are reported as such.
    if batch not in accepts or (batch == "pairs") == (lint is not None):
        return None
    if batch == "pairs":
        return "data.lint = null: pairs need a policy. Pass data.lint=drop, report or error."
    return f"data.lint = {lint}: only for pairs, and data.batch is {batch}. Leave it null."
