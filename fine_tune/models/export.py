"""Write the trained adapter as a folder that PEFT, transformers and the next run can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from fine_tune.models.adapter import ADAPTER, save_adapter_folder
from fine_tune.text.template import ChatTemplate


def export_adapter(
    network: nn.Module,
    folder: Path,
    *,
    identity: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
) -> None:
    """Write weights, identity of the base, tokenizer and the chat template that was trained with."""
    if isinstance(network, PeftModel):
        # The name a person can load again, not the cache folder it happened to be read from.
        network.peft_config[ADAPTER].base_model_name_or_path = identity["model"]
        network.peft_config[ADAPTER].revision = identity["revision"]
    save_adapter_folder(network, folder, identity)
    write_tokenizer(folder, tokenizer, template)


def carried(template: ChatTemplate) -> str:
    """Return a template's text for other programs: they pass no end_of_turn to it, so it is written into it."""
    return f"{{%- set end_of_turn = {template.end_of_turn!r} -%}}\n{template.source}"


def carry_template(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
    """Give a tokenizer the chat template that was trained with."""
    tokenizer.chat_template = carried(template)


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
    """Write a tokenizer with the chat template that was trained with."""
    carry_template(tokenizer, template)
    tokenizer.save_pretrained(str(folder))
