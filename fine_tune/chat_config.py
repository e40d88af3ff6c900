"""From the words of `chat` to one checked config: plain values, every mistake told at once, torch not imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from fine_tune.errors import ConfigError
from fine_tune.evaluation_config import check_words, checkpoints
from fine_tune.evaluation_schema import TopP
from fine_tune.schema import Method, Model
from fine_tune.schema_types import AtLeast1, Node, NotNegative, Seed, Text


def _one_or_two(value: Any) -> Any:
    if isinstance(checkpoints(value), list) and len(value) > 2:
        raise ValueError("must be one or two checkpoints: more do not stand side by side")
    return value


class ChatConfig(Node):
    """A whole resolved config of a conversation."""

    ckpt: Annotated[Any, AfterValidator(_one_or_two)]
    system: Text | None
    max_new_tokens: AtLeast1
    temperature: NotNegative
    top_p: TopP
    top_k: AtLeast1 | None
    seed: Seed
    save: Text | None
    accelerator: Literal["auto", "cpu", "gpu"]
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
    hints: dict[str, str]
    model: Model
    method: Method


def check_chat(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose, resolve and check a conversation; ``ckpt`` becomes a list.

    Raises:
        ConfigError: All problems together.

    Example:
        >>> check_chat(["ckpt=base"])["ckpt"]
        ['base']
        >>> check_chat(["ckpt=base", "temprature=1"])
        Traceback (most recent call last):
        fine_tune.errors.ConfigError: 1 problem(s) in the config:
          - temprature: unknown key. Did you mean temperature?
    """
    cfg = check_words(overrides, "chat", ChatConfig)
    cfg["ckpt"] = [cfg["ckpt"]] if isinstance(cfg["ckpt"], str) else cfg["ckpt"]
    if cfg["save"] and len(cfg["ckpt"]) < 2:
        raise ConfigError(
            f"save = {cfg['save']}: one checkpoint gives no pairs. Pass two, such as ckpt=[base,runs/sft]; /save <file> in "
            "the chat keeps a conversation."
        )
    return cfg
