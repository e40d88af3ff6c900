"""The words of a drill's runs: the user's own, but for how long, where, and what a drill can do without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Keys whose values are the drill's: folders, trackers, answers and previews, which cost time and prove nothing here.
REPLACED = (
    "run_dir", "run_name", "overwrite", "logger", "trainer.max_steps", "trainer.max_epochs", "data.num_eval_items",
    "data.max_val_examples", "callbacks.preview", "callbacks.checkpoint.every_n_steps",
)  # fmt: skip
# Rows of validation, which runs before the first step and after the last.
MOST_VAL = 16


def run_words(words: Sequence[str], cfg: Mapping[str, Any], *, steps: int, save_every: int) -> list[str]:
    """Return the words of a short run of the same config.

    Args:
        words: As typed for `train`.
        cfg: The checked config that they make.
        steps: Optimizer steps.
        save_every: Optimizer steps between checkpoints.

    Example:
        >>> cfg = {"callbacks": {"checkpoint": {}}, "data": {"max_val_examples": 500}}
        >>> run_words(["optim.lr=1e-4", "trainer.max_epochs=2"], cfg, steps=6, save_every=2)[:2]
        ['optim.lr=1e-4', 'logger=none']
    """
    kept = [word for word in words if not _replaced(word)]
    if "checkpoint" not in cfg["callbacks"]:
        # What saves nothing cannot be resumed.
        kept = [*(word for word in kept if not _is(word, "callbacks")), "callbacks=default"]
    most = cfg["data"]["max_val_examples"]
    return [
        *kept, "logger=none", f"trainer.max_steps={steps}", "data.num_eval_items=0",
        f"data.max_val_examples={MOST_VAL if most is None else min(most, MOST_VAL)}", "callbacks.preview=null",
        f"callbacks.checkpoint.every_n_steps={save_every}",
    ]  # fmt: skip


def _replaced(word: str) -> bool:
    return any(_is(word, key) for key in REPLACED)


def _is(word: str, key: str) -> bool:
    """Tell whether a word sets a key or something below it."""
    name = word.lstrip("+").partition("=")[0]
    return name == key or name.startswith(f"{key}.")
