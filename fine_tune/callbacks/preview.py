"""Greedy answers to fixed prompts while training, beside the base model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich import get_console
from rich.table import Table
from rich.text import Text

from fine_tune.evaluation.answers import Answerer
from fine_tune.modules.step import stepping
from fine_tune.rng import untouched_rng
from fine_tune.storage import append_text, finite, read_lines, write_text
from fine_tune.text.conversation import Message
from fine_tune.tracking.mailbox import Mailbox
from fine_tune.visible import blanked


class GenerationPreview(pl.Callback):
    """Every n optimizer steps, and at the last, answer the same prompts greedily.

    Rows go to the terminal, to ``previews.jsonl`` and, as a table, to trackers that take one.

    Args:
        every_n_steps: Optimizer steps between previews.
        num_prompts: Prompts taken from the held-out items when ``prompts`` is None.
        prompts: The user's own prompts, one user turn each.
        max_new_tokens: Most tokens of an answer.
    """

    def __init__(
        self, every_n_steps: int, num_prompts: int = 3, prompts: list[str] | None = None, max_new_tokens: int = 64
    ) -> None:
        self.every_n_steps, self.num_prompts = every_n_steps, num_prompts
        self.prompts, self.max_new_tokens = prompts, max_new_tokens
        self._base: list[str] = []
        self._done: set[int] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fix the prompts, take the base model's answers, and drop what an interrupted run wrote after its checkpoint."""
        self._path = Path(trainer.default_root_dir) / "previews.jsonl"
        step = stepping(pl_module).step
        kept = read_lines(self._path, up_to_step=step) if step else []
        self._done = {line["step"] for line in kept}
        if trainer.is_global_zero:
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._conversations = self._choose(trainer)
        self._base = [line["base_completion"] for line in kept if line["step"] == max(self._done)]
        if not self._base and self._conversations:
            self._base = self._answers(pl_module, base=stepping(pl_module).answerer.has_adapter())
        self._every_step(trainer, pl_module, step, due=step == 0)

    def _choose(self, trainer: pl.Trainer) -> list[tuple[Message, ...]]:
        if self.prompts is not None:
            return [(Message("user", prompt),) for prompt in self.prompts]
        data: Any = getattr(trainer, "datamodule")  # noqa: B009 - set by Lightning without a declaration
        items = data.prepared.eval_items
        return [tuple(item.messages) for item in items[: self.num_prompts]]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Preview when the step is a multiple of ``every_n_steps``."""
        step = stepping(pl_module).step
        self._every_step(trainer, pl_module, step, due=step % self.every_n_steps == 0)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Preview the final adapter, unless its step has been previewed."""
        self._every_step(trainer, pl_module, stepping(pl_module).step, due=True)

    def _every_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, *, due: bool) -> None:
        if not due or step in self._done or not self._conversations:
            return
        self._done.add(step)
        said = self._answers(pl_module, base=False)
        if trainer.is_global_zero:
            self._publish(trainer, step, said)

    def _answers(self, pl_module: pl.LightningModule, *, base: bool) -> list[str]:
        answerer: Answerer = stepping(pl_module).answerer
        with stepping(pl_module).clock.paused(), untouched_rng():
            said = answerer.answer(self._conversations, max_new_tokens=self.max_new_tokens, base=base)
        return [completion.text for completion in said]

    def _publish(self, trainer: pl.Trainer, step: int, said: list[str]) -> None:
        prompts = [conversation[-1].content for conversation in self._conversations]
        rows = [
            {"step": step, "prompt": prompt, "completion": text, "base_completion": base}
            for prompt, text, base in zip(prompts, said, self._base, strict=True)
        ]
        append_text(self._path, "".join(json.dumps(finite(row)) + "\n" for row in rows))
        _show(step, rows)
        for logger in trainer.loggers:
            # Only trackers of ours take rows.
            if isinstance(logger, Mailbox):
                logger.log_rows("previews", rows, step)


def _show(step: int, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"step {step}", title_justify="left", show_lines=True, expand=False)
    for column in ("prompt", "base", "now"):
        table.add_column(column, overflow="fold", ratio=1)
    for row in rows:
        # Text, not markup: a model's square brackets are its own.
        table.add_row(*(Text(_brief(row[key])) for key in ("prompt", "base_completion", "completion")))
    get_console().print(table)


def _brief(text: str, limit: int = 240) -> str:
    printable = blanked(text, kept="\n")
    return printable if len(printable) <= limit else printable[: limit - 3] + "..."
