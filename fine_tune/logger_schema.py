"""The typed schema of ``logger``: trackers by name, each with its class."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fine_tune.schema_types import Node, Plugin, Positive, Text

# W&B's own bounds.
Label = Annotated[str, Field(min_length=1, max_length=64)]
Group = Annotated[str, Field(min_length=1, max_length=128)]


class Wandb(Node):
    """Weights & Biases; what runs of earlier versions do not have is as conf/logger/wandb.yaml has it."""

    target: Text = Field(alias="_target_")
    project: Group
    entity: Text | None
    offline: bool
    tags: list[Label]
    group: Group | None = None
    job_type: Label | None = "train"
    log_adapter: bool = True
    init_seconds: Positive = 30.0
    finish_seconds: Positive = 10.0


class Loggers(BaseModel):
    """Trackers by name; null is off, and a name not listed here must bring its own ``_target_``."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, Plugin | None]
    wandb: Wandb | None = None
    csv: Plugin | None = None
    tensorboard: Plugin | None = None
