"""Trackers that are loggers of Lightning, driven in this process: TensorBoard, CSV, and others a config names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from fine_tune.targets import build, check_arguments
from fine_tune.tracking.context import Ending, RunContext


class LightningTracker:
    """A logger of Lightning as a tracker.

    Args:
        node: The logger's node of the config.
        seconds: How long the end of a run waits for it.

    Raises:
        ConfigError: The class cannot be imported or does not take the keys beside it.
    """

    def __init__(self, node: Mapping[str, Any], seconds: float = 10.0) -> None:
        check_arguments(node)
        self.node, self.finish_seconds = dict(node), seconds
        self.rewrites = node["_target_"].endswith(".CSVLogger")
        self.forgets = self.rewrites or node["_target_"].endswith(".TensorBoardLogger")
        self._logger: Any = None

    def start(self, context: RunContext) -> str | None:
        """Build the logger and open its files or connection."""
        extra: dict[str, Any] = {"save_dir": str(context.folder)}
        if self.rewrites:
            # A killed run keeps its table up to the last step.
            extra["flush_logs_every_n_steps"] = self.node.get("flush_logs_every_n_steps", 1)
        elif self.forgets and context.first_step:
            extra["purge_step"] = context.first_step + 1
        self._logger = build({**self.node, **extra})
        self._logger.experiment  # noqa: B018 - the connection is made by looking
        return None

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Hand the numbers on, into the file at once where it is a file."""
        self._logger.log_metrics(dict(numbers), step=step)
        self._flush()

    def rows(self, name: str, step: int, rows: list[dict[str, Any]]) -> None:
        """Show rows of text: a table where the logger has them, markdown in TensorBoard, nothing elsewhere."""
        if hasattr(self._logger, "log_text"):
            data = [list(row.values()) for row in rows]
            self._logger.log_text(name, columns=list(rows[0]), data=data, step=step)
        elif hasattr(self._logger.experiment, "add_text"):
            for index, row in enumerate(rows):
                # Indented text is shown as it is; a model's markup is not followed.
                parts = (f"{key}:\n\n    " + str(value).replace("\n", "\n    ") for key, value in row.items())
                self._logger.experiment.add_text(f"{name}/{index}", "\n\n".join(parts), step)
            self._flush()

    def _flush(self) -> None:
        if isinstance(self._logger, TensorBoardLogger):
            self._logger.experiment.flush()

    def finish(self, ending: Ending) -> None:
        """Write what is held back and close files."""
        if isinstance(self._logger, CSVLogger) and not self._logger.experiment.metrics:
            return  # nothing was told, and Lightning would write a table without columns
        self._logger.finalize("failed" if ending.failed else "success")

    def let_go(self) -> None:
        """Nothing runs for it."""
