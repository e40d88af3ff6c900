"""A step that did not fit the device is done again in smaller micro-batches: the same sum, added in another order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch

from fine_tune.packing.batches import MicroBatch
from fine_tune.packing.halves import at_most


class Replay:
    """Runs the backward passes of steps, and remembers how large a micro-batch may be.

    Attributes:
        most_tokens: Most tokens of a micro-batch since memory ran out; None before. Single rows may be longer.
        num_halvings: How often memory ran out.
    """

    def __init__(self) -> None:
        self.most_tokens: int | None = None
        self.num_halvings = 0

    def run(
        self,
        micros: Sequence[MicroBatch],
        *,
        begin: Callable[[], None],
        backward: Callable[[MicroBatch], None],
        device: torch.device,
    ) -> None:
        """Run every micro-batch; where memory runs out, begin again with halves, and with the random states of the start.

        Args:
            micros: This rank's micro-batches of a step.
            begin: Takes back what an attempt has left: gradients, and sums of loss and metrics.
            backward: Forward and backward of one micro-batch.
            device: Where they run.

        Raises:
            OutOfMemoryError: There is no room for a single row, of which no half would be the same mathematics.
        """
        states = _random_states(device)
        while True:
            begin()
            too_large = self._attempt(at_most(list(micros), self.most_tokens), backward)
            if too_large is None:
                return
            # Here the error is gone, and with it the tensors that its frames held.
            self._halve(too_large, device)
            _set_random_states(device, states)

    def _attempt(self, micros: Sequence[MicroBatch], backward: Callable[[MicroBatch], None]) -> int | None:
        """Return the tokens of the micro-batch that did not fit; None if all did."""
        for micro in micros:
            try:
                backward(micro)
            except torch.OutOfMemoryError:
                if len(micro.samples) == 1:
                    raise
                return micro.num_tokens
        return None

    def _halve(self, tokens: int, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self.most_tokens = max(1, tokens // 2)
        self.num_halvings += 1
        warnings.warn(
            f"memory ran out with {tokens:,} tokens per forward. The step is done again with at most {self.most_tokens:,}, and so "
            f"are those that follow: the same result, more slowly. trainer.micro_batch_tokens={self.most_tokens} begins with it.",
            stacklevel=2,
        )


def _random_states(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_states(device: torch.device, states: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
