"""Give added tokens a row in the embedding: a spare one where there is one, a new one where there is none."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def fit_vocabulary(model: PreTrainedModel, num_tokens: int, new_tokens: list[int]) -> bool:
    """Make every token id have an embedding; return whether the tables had to grow.

    Rows that are new or that will train start at the mean of the rows that were trained, so a new token begins as an
    average word and not as noise (Hewitt 2021, "Initializing new word embeddings"), the same in every run.

    Args:
        model: The base, before anything is attached.
        num_tokens: Length of the tokenizer.
        new_tokens: Ids that the user added; their rows will train.
    """
    table: nn.Embedding = model.get_input_embeddings()  # type: ignore[assignment]
    rows = table.weight.shape[0]
    known = min([rows, *new_tokens])
    grown = list(range(rows, num_tokens))
    if grown:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
        model.requires_grad_(False)
        for each in _distinct([model.get_input_embeddings(), model.get_output_embeddings()]):
            set_to_mean(each, grown, known)
    if new_tokens:
        for each in _distinct(list(trained_tables(model).values())):
            set_to_mean(each, new_tokens, known)
    return bool(grown)


def trained_tables(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Name the embeddings whose rows of new tokens train: the input's, and an untied output head's without a bias.

    PEFT's wrapper of a linear head drops the bias, so a head with one (Phi-2) keeps its rows as the base has them.
    """
    names = {id(module): name.split(".")[-1] for name, module in model.named_modules()}
    tables: list[Any] = [model.get_input_embeddings()]
    head: Any = model.get_output_embeddings()
    if not model.config.get_text_config().tie_word_embeddings and head.bias is None:
        tables.append(head)
    return {names[id(table)]: table for table in tables}


def _distinct(tables: list[Any]) -> list[Any]:
    """Tied tables share one weight: change it once."""
    return list({id(table.weight): table for table in tables}.values())


@torch.no_grad()
def set_to_mean(table: Any, rows: list[int], known: int) -> None:
    """Give rows of a table, and of its bias if it has one, the mean of its first ``known`` rows."""
    weight: torch.Tensor = table.weight
    weight[rows] = weight[:known].float().mean(0).to(weight.dtype)
    bias = getattr(table, "bias", None)
    if bias is not None:
        bias[rows] = bias[:known].float().mean().to(bias.dtype)
