"""One run in full: its figures over steps, its data, its cost, and how to repeat it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fine_tune.report import panels
from fine_tune.report.data_account import account
from fine_tune.report.reading import RunFiles, section
from fine_tune.report.settings import differing
from fine_tune.report.visible import brief, plain

# Headline figures: label, key, format, and the key of the value before training, where there is one.
HEADLINES = (
    ("exact match", "exact_match", "{:.3f}", ("initial_exact_match", "base_exact_match")),
    ("preference accuracy", "preference_accuracy", "{:.3f}", ()),
    ("reward margin", "reward_margin", "{:.2f}", ()),
    ("validation loss", "final_loss", "{:.4f}", ()),
    ("validation perplexity", "final_perplexity", "", ()),
    ("answer length, tokens", "mean_completion_tokens", "{:.1f}",
     ("initial_mean_completion_tokens", "base_mean_completion_tokens")),
    ("optimizer steps", "steps", "{:,}", ()),
    ("training time, s", "train_seconds", "{:,.1f}", ()),
    ("tokens/s", "tokens_per_second", "{:,.0f}", ()),
    ("peak memory, GB", "peak_memory_gb", "{:.2f}", ()),
)  # fmt: skip
# Memory and speed, beside the figures every run's table has.
COSTS = (
    ("reserved memory", "reserved_memory_gb", "{:.2f} GB"),
    ("tokens per second", "tokens_per_second", "{:,.0f}"),
    ("learned tokens per second", "supervised_tokens_per_second", "{:,.0f}"),
    ("samples per second", "samples_per_second", "{:,.1f}"),
    ("hardware use (MFU)", "mfu", "{:.1%}"),
    ("operations", "total_flops", "{:.3g} FLOP"),
    ("training time", "train_seconds", "{:,.1f} s"),
    ("wall time", "wall_seconds", "{:,.1f} s"),
    ("trained parameters", "trainable_parameters", "{:,}"),
    ("all parameters", "total_parameters", "{:,}"),
)
NO_IDENTITY = ("versions", "command", "seed", "device")


def record(run: RunFiles) -> dict[str, Any]:
    """Return everything that the page tells of one run alone."""
    further, further_left_out = panels.further_charts(run)
    return {
        "run": run,
        "facts": list(facts_of(run)),
        "training": panels.charts_of(run),
        "further": further,
        "further_left_out": further_left_out,
        "account": account(run.ledger),
        "costs": list(_costs(run.summary)),
        "proofs": list(_proofs(run.checklist)),
        "settings": differing(run.config) if run.config else None,
        "command": _command(run.manifest.get("command")),
        "versions": [(str(name), plain(value)) for name, value in section(run.manifest, "versions").items()],
        "identity": [
            (key.replace("_", " "), plain(value)) for key, value in run.manifest.items() if key not in NO_IDENTITY
        ],
    }


def facts_of(run: RunFiles) -> Iterator[tuple[str, str]]:
    """Yield what a run is, for its head."""
    said = run.summary
    facts = (
        ("objective", run.objective or None),
        ("model", said.get("model") or section(run.config, "model").get("name")),
        ("method", said.get("method") or section(run.config, "method").get("name")),
        ("data", section(run.config, "data").get("name")),
        ("device", said.get("device") or run.manifest.get("device")),
        ("precision", said.get("precision")),
        ("seed", run.manifest.get("seed")),
        ("started from", run.config.get("init_from")),
        ("code run from", _foreign_code(section(run.config, "model"))),
        ("last written", run.written() or None),
    )
    return ((label, plain(value)) for label, value in facts if value is not None)


def _proofs(checklist: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what the run has proven about itself at its first steps: the item, and what was seen."""
    items = checklist.get("items")
    for item in items if isinstance(items, list) else []:
        if isinstance(item, dict):
            marks: dict[Any, str] = {True: "passed", False: "FAILED"}
            found = marks.get(item.get("passed"), "nothing to check")
            yield plain(item.get("name")), f"{found}: {plain(item.get('says'))}"


def _foreign_code(model: Mapping[str, Any]) -> str | None:
    """Say whose code ran; None where it was only that of the installed packages."""
    if not model.get("trust_remote_code"):
        return None
    pinned = model.get("revision")
    return f"{plain(model.get('path'))}, {f'commit {plain(pinned)}' if pinned else 'a folder'} (model.trust_remote_code)"


def tiles(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield label, value and the value before training of each headline figure that there is."""
    for label, key, form, befores in HEADLINES:
        if key in summary and summary[key] is not None:
            before = next((summary[name] for name in befores if summary.get(name) is not None), None)
            yield label, plain(summary[key], form), "" if before is None else plain(before, form)


def _command(recorded: Any) -> str:
    """Write the entry point with the words of the run, whichever door they came through."""
    if not isinstance(recorded, str):
        return plain(recorded) if recorded else ""
    _, _, overrides = recorded.partition(" ")
    return f"python train.py {brief(overrides)}" if recorded else ""


def _costs(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what was measured; memory is told of in any case, as only an accelerator measures it."""
    peak = summary.get("peak_memory_gb")
    if summary:
        yield "peak memory", "not measured on this device" if peak is None else plain(peak, "{:.2f} GB")
    for label, key, form in COSTS:
        if summary.get(key) is not None:
            yield label, plain(summary[key], form)
