"""summary.json and the table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import get_console
from rich.table import Table
from rich.text import Text

from fine_tune.visible import visible

KEYS = (
    "run_name", "objective", "method", "model", "epochs", "steps", "total_flops", "wall_seconds", "train_seconds",
    "samples_per_second", "tokens_per_second", "supervised_tokens_per_second", "mfu", "peak_memory_gb", "reserved_memory_gb",
    "train_loss", "final_loss", "final_perplexity", "grad_norm", "trainable_parameters", "total_parameters",
    "base_exact_match", "exact_match", "preference_accuracy", "mean_completion_tokens",
)  # fmt: skip
# Further figures, in every summary as well; null where they do not apply.
FURTHER = (
    "base_mean_completion_tokens", "initial_exact_match", "initial_mean_completion_tokens", "reward_margin", "kl", "loss_unit",
    "host_paged_gb", "memory_limit_gb",
)  # fmt: skip
# Rows of the terminal table: label, key, and how to print the value.
ROWS = (
    ("exact match, base", "base_exact_match", "{:.3f}"),
    ("exact match, at the start", "initial_exact_match", "{:.3f}"),
    ("exact match, tuned", "exact_match", "{:.3f}"),
    ("completion length, at the start", "initial_mean_completion_tokens", "{:.1f} tokens"),
    ("completion length, tuned", "mean_completion_tokens", "{:.1f} tokens"),
    ("preference accuracy", "preference_accuracy", "{:.3f}"),
    ("reward margin", "reward_margin", "{:.2f}"),
    ("KL to the reference", "kl", "{:.4f} nats/token"),
    ("validation loss", "final_loss", "{:.4f} {unit}"),
    ("validation perplexity", "final_perplexity", "{:.3f}"),
    ("train loss, mean", "train_loss", "{:.4f} {unit}"),
    ("optimizer steps", "steps", "{:,}"),
    ("epochs", "epochs", "{:.2f}"),
    ("trained parameters", "trainable_parameters", "{:,}"),
    ("all parameters", "total_parameters", "{:,}"),
    ("speed", "tokens_per_second", "{:,.0f} tokens/s"),
    ("hardware use (MFU)", "mfu", "{:.1%}"),
    ("peak memory", "peak_memory_gb", "{:.2f} GB"),
    ("reserved memory", "reserved_memory_gb", "{:.2f} GB"),
    ("paged optimizer state", "host_paged_gb", "{:.2f} GB"),
    ("memory limit", "memory_limit_gb", "{:.2f} GB"),
    ("training time", "train_seconds", "{:.1f} s"),
    ("wall time", "wall_seconds", "{:.1f} s"),
)


def complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """Order the values as the contract lists them, with None for what does not apply, and further ones after."""
    named = (*KEYS, *FURTHER)
    return {key: values.get(key) for key in named} | {k: v for k, v in values.items() if k not in named}


def show(summary: Mapping[str, Any], folder: str) -> None:
    """Print the run's figures; a row without a value is left out."""
    table = Table(title=Text(visible(str(summary["run_name"]))), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for label, key, form in ROWS:
        if summary.get(key) is not None:
            table.add_row(label, Text(visible(form.format(summary[key], unit=summary["loss_unit"]))))
    console = get_console()
    console.print(table)
    console.print(visible(f"everything is in {folder}"), markup=False, highlight=False)
