"""Means over a whole step or validation, kept as sums so that micro-batches and ranks of any size add up exactly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fine_tune.modules.parallel import sum_scalars


class Ratios:
    """Named quotients of two sums, in float64 on one device.

    Args:
        names: Every name there will be: all ranks must agree on them, also one without work.
        device: Where the sums live.

    Example:
        >>> import torch
        >>> ratios = Ratios(["loss"], torch.device("cpu"))
        >>> ratios.add("loss", torch.tensor(3.0), 2)
        >>> ratios.add("loss", torch.tensor(1.0), 2)
        >>> ratios.means()
        {'loss': 1.0}
    """

    def __init__(self, names: Iterable[str], device: torch.device) -> None:
        self.names = tuple(names)
        self.sums = torch.zeros(len(self.names), 2, dtype=torch.float64, device=device)

    def add(self, name: str, amount: Tensor, count: Tensor | int) -> None:
        """Add to a name's numerator and denominator; nothing is asked of the device."""
        cell = self.sums[self.names.index(name)]
        cell[0] += amount.detach().double()
        cell[1] += count

    def means(self) -> dict[str, float]:
        """Add up all ranks and divide; a name that nothing was added to is left out."""
        if not self.names:
            return {}
        return self.quotients(sum_scalars(self.sums.flatten().clone()).tolist())

    def quotients(self, sums: Sequence[float]) -> dict[str, float]:
        """Divide sums that were read from the device, ``[2 * names]``: numerator and denominator of each name in turn."""
        found = zip(self.names, sums[::2], sums[1::2], strict=True)
        return {name: over / under for name, over, under in found if under}
