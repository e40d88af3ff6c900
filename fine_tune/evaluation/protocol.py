"""What an evaluation is: fixed items, scored a chunk at a time, so that a killed one goes on where it stopped."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from fine_tune.rng import untouched_rng
from fine_tune.text.template import ChatTemplate


class Item(Protocol):
    """One thing to answer or to score."""

    @property
    def id(self) -> str:
        """Its name, the same for every checkpoint."""

    @property
    def prompt(self) -> str:
        """What a person would read as the question."""


@dataclass
class Subject:
    """A model under evaluation: its adapter is attached and switched on, packed attention is set.

    ``precision`` is what products are computed in (autocast), float32 for none. ``base`` runs it with the adapter off.
    """

    network: nn.Module
    tokenizer: Any
    template: ChatTemplate
    device: torch.device
    precision: torch.dtype = torch.float32
    base: bool = False


class Evaluation(Protocol):
    """One kind of evaluation with its settings.

    Attributes:
        name: Folder under ``eval/``.
        compares: The field of a line by which two checkpoints are compared: ``correct``, ``score``, or None for none.
        better: Whether a higher or a lower score is better.
    """

    name: str
    compares: str | None
    better: Literal["higher", "lower"]

    def prepare(self, tokenizer: Any, template: ChatTemplate) -> Sequence[Item]:
        """Return the items; everything that needs no model is done here."""

    def chunks(self, items: Sequence[Any]) -> list[list[int]]:
        """Divide item indices into chunks that are computed together, the same way every time."""

    def score(self, subject: Subject, items: Sequence[Any], chunk: list[int]) -> list[dict[str, Any]]:
        """Return one line of plain values per item of the chunk, in its order."""

    def metrics(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Sum all lines up."""

    def groups(self, line: Mapping[str, Any]) -> str | None:
        """Name the group that a line is reported in, None for no groups."""


def score_each(
    evaluation: Evaluation, subject: Subject, items: Sequence[Any], chunks: Sequence[list[int]]
) -> Generator[list[dict[str, Any]], None, None]:
    """Score chunk after chunk; an evaluation with a ``score_each`` of its own may have the next ones under way meanwhile."""
    own = getattr(evaluation, "score_each", None)
    if own is not None:
        yield from own(subject, items, chunks)
    else:
        yield from (evaluation.score(subject, items, chunk) for chunk in chunks)


@contextmanager
def evaluating(subject: Subject) -> Iterator[None]:
    """Run a block in evaluation mode, without gradients, under the subject's precision; modes and RNG come back."""
    training = [module for module in subject.network.modules() if module.training]
    subject.network.eval()
    half = subject.precision != torch.float32
    try:
        with torch.no_grad(), untouched_rng(), torch.autocast(subject.device.type, subject.precision, enabled=half):
            yield
    finally:
        for module in training:
            module.training = True
