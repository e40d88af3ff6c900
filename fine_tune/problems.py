"""Sentences for what is wrong with a config: key, value, rule, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic_core import ErrorDetails

# What people call our keys after other tools.
SYNONYMS = {
    "learning_rate": "optim.lr",
    "epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "batch_size": "optim.global_batch_size",
    "per_device_train_batch_size": "optim.global_batch_size",
    "gradient_accumulation_steps": "optim.global_batch_size",
    "max_length": "data.max_seq_len",
    "max_seq_length": "data.max_seq_len",
    "seq_len": "data.max_seq_len",
    "r": "method.rank",
    "lora_r": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lr_scheduler_type": "optim.schedule",
    "warmup_ratio": "optim.warmup_share",
    "model_name_or_path": "model.path",
    "output_dir": "run_dir",
    "gradient_checkpointing": "trainer.recompute",
    "loss_type": "objective.loss",
    "rpo_alpha": "objective.nll_weight",
    "ref_model": "objective.reference",
    "precompute_ref_log_probs": "objective.reference_store",
}
EXPECTED = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "list_type": "must be a list such as [a,b]",
    "dict_type": "must be a group of keys such as {a:1}",
    "model_type": "must be a group of keys",
    "missing": "no value",
    "string_too_short": "must not be empty",
}
BOUNDS = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}


def nearest(word: str, candidates: Sequence[str]) -> str | None:
    """Return the candidate a mistyped key or option most likely means.

    Example:
        >>> [nearest(word, ["optim.lr", "seed"]) for word in ("lr", "sed", "qqq")]
        ['optim.lr', 'seed', None]
    """
    last = word.rsplit(".", 1)[-1]
    if SYNONYMS.get(last) in candidates:
        return SYNONYMS[last]
    same_last = [candidate for candidate in candidates if candidate.rsplit(".", 1)[-1] == last]
    if same_last:
        return max(same_last, key=lambda candidate: difflib.SequenceMatcher(None, word, candidate).ratio())
    # A beginning that was typed right, such as bf16 of bf16-mixed, is nearer than one letter's difference.
    if longer := [candidate for candidate in candidates if len(word) > 2 and candidate.startswith(word)]:
        return longer[0]
    by_whole = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if by_whole:
        return by_whole[0]
    by_last = difflib.get_close_matches(
        last, [candidate.rsplit(".", 1)[-1] for candidate in candidates], n=1, cutoff=0.75
    )
    return next((c for c in candidates if by_last and c.rsplit(".", 1)[-1] == by_last[0]), None)


def unknown_key(key: str, candidates: Sequence[str]) -> str:
    """Say that a key does not exist, with the one that was probably meant."""
    close = nearest(key, candidates)
    if close:
        return f"{key}: unknown key. Did you mean {close}?"
    return f"{key}: unknown key. See every key with --cfg job."


def unknown_option(group: str, option: str, options: Sequence[str]) -> str:
    """Say that a group has no such option, and list those it has."""
    close = nearest(option, options)
    meant = f" Did you mean {group}={close}?" if close else ""
    return f"{group} = {option}: no such option.{meant} Choose one of {', '.join(options)}."


def field_problem(key: str, error: ErrorDetails) -> str:
    """Turn one error of pydantic into our sentence."""
    value, kind, context = shown(error["input"]), error["type"], error.get("ctx", {})
    if kind == "missing":
        return f"{key}: no value. Pass {key}=<value>."
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        # The group as a whole is refused, for the value that says which of several forms it has.
        name = str(context["discriminator"]).strip("'")
        return _not_among(f"{key}.{name}", shown(error["input"].get(name)), str(context.get("expected_tags", "")))
    if kind == "literal_error":
        return _not_among(key, value, str(context["expected"]).replace(" or ", ", "))
    if kind == "string_type" and error["input"] is None:
        return f"{key} = null: must be text. Pass {key}=<value>."
    if kind == "string_type":
        return f"{key} = {value}: must be text. Quote it: {key}=\"'{value}'\"."
    if kind in BOUNDS:
        sign, name = BOUNDS[kind]
        return f"{key} = {value}: must be {sign} {context[name]}. Pass another value."
    if kind == "value_error":
        return f"{key} = {value}: {context['error']}. Pass another value."
    if kind in ("too_short", "too_long"):
        length = context.get("min_length", context.get("max_length"))
        return f"{key} = {value}: must have {length} items. Pass another list."
    return f"{key} = {value}: {EXPECTED.get(kind, error['msg'])}. Pass another value."


def _not_among(key: str, value: str, listed: str) -> str:
    options = [word.strip("'\"") for word in listed.split(", ")]
    close = nearest(value, options)
    return f"{key} = {value}: must be one of {', '.join(options)}." + (f" Did you mean {close}?" if close else "")


def shown(value: Any) -> str:
    """Write a value the way a user types it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def unique(lines: Iterable[str]) -> list[str]:
    """Drop repeated lines, keeping the order."""
    return list(dict.fromkeys(lines))
