"""Forward and backward passes that change nothing: what the first step must give however it is divided."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fine_tune.checklist.item import Item
from fine_tune.models.adapter import adapter_off, trainable
from fine_tune.models.forward import supervised_logps
from fine_tune.modules.dpo import DPOModule
from fine_tune.modules.ratios import Ratios
from fine_tune.modules.step import StepModule
from fine_tune.packing.batches import MicroBatch, StepBatch, pack
from fine_tune.packing.halves import at_most

# Relative difference of all gradients together that counts as none, by what is computed in: the same sums in another order.
# bf16 rounds each product to 8 bits; docs/reliability.md has what was measured, and what a wrong division gives (over 0.1).
SAME = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Keeps gradients in fp16's range; a power of two changes no digit.
SCALE = 1024.0
MOST_PARTS = 32


@dataclass(frozen=True)
class Passes:
    """Runs micro-batches of a module outside its training step.

    Attributes:
        module: The objective's module.
        context: What the trainer computes under, such as autocast.
    """

    module: StepModule
    context: Callable[[], AbstractContextManager[None]]

    def _add(self, micro: MicroBatch, batch: StepBatch, *, sign: float = 1.0) -> float:
        """Add a micro-batch's gradients to those that are there; return its share of the step's loss."""
        with self.context():
            share = self.module.micro_loss(micro, batch, Ratios(self.module.metric_names, self.module.device))
        (share * (sign * SCALE)).backward()
        return share.item()

    def _forget(self) -> None:
        for parameter in trainable(self.module.network).values():
            parameter.grad = None
        self.module.before_attempt()

    def division(self, micro: MicroBatch, batch: StepBatch) -> Item:
        """Compare one micro-batch with the same rows in smaller ones.

        Packing, masks and the loss's denominator are all in it: a neighbour that is seen, or a mean of means, changes the
        gradient.
        """
        name = "division"
        parts = at_most([micro], max(1, micro.num_tokens // MOST_PARTS))
        if len(parts) < 2:
            return Item(name, None, "the first micro-batch is a single row")
        self._forget()
        with without_dropout(self.module.network):
            loss = self._add(micro, batch)
            size = self._norm()
            # Taken away again: what is left is the difference, and no copy of the gradients is needed.
            divided_loss = sum(self._add(part, batch, sign=-1.0) for part in parts)
        gap, same = self._norm() / size if size else 1.0, SAME[self._dtype()]
        self._forget()
        told = (
            f"{len(micro.samples)} rows at once and in {len(parts)} parts: loss {loss:.6g} and {divided_loss:.6g}, gradients "
            f"{gap:.1e} apart (at most {same:g})"
        )
        return Item(name, gap <= same, told)

    def fits(self, micro: MicroBatch, batch: StepBatch) -> Item:
        """Run the fullest micro-batch as a step would; where it does not fit, the run goes on with halves of it."""
        device, replay = self.module.device, self.module.replay
        if device.type != "cuda":
            return Item("memory", None, f"{micro.num_tokens:,} tokens at most in a forward; main memory is not planned")
        before = replay.num_halvings
        replay.run([micro], begin=self._forget, backward=lambda part: self._run(part, batch), device=device)
        peak = torch.cuda.max_memory_allocated(device) / 1e9
        self._forget()
        how = f"in parts of at most {replay.most_tokens:,}" if replay.num_halvings > before else "at once"
        return Item("memory", True, f"the fullest micro-batch, {micro.num_tokens:,} tokens, fits {how}: {peak:.2f} GB so far")

    def _run(self, micro: MicroBatch, batch: StepBatch) -> None:
        self._add(micro, batch)

    def _norm(self) -> float:
        """Return the norm of all gradients together."""
        grads = [p.grad for p in trainable(self.module.network).values() if p.grad is not None]
        return torch.stack([grad.double().norm() for grad in grads]).norm().item() if grads else 0.0

    def _dtype(self) -> torch.dtype:
        """What is computed in: autocast's type, or the coarsest that weights are stored in."""
        with self.context():
            if torch.is_autocast_enabled(self.module.device.type):
                return torch.get_autocast_dtype(self.module.device.type)
        dtypes = {p.dtype for p in self.module.network.parameters() if p.dtype in SAME}
        return max(dtypes, key=lambda dtype: SAME[dtype])


@contextmanager
def computed_reference(module: StepModule) -> Iterator[None]:
    """Compute DPO's reference for a block, also where its values are stored: those are of whole micro-batches."""
    if not isinstance(module, DPOModule):
        yield
        return
    stored, module.stored = module.stored, None
    try:
        yield
    finally:
        module.stored = stored


@contextmanager
def without_dropout(network: nn.Module) -> Iterator[None]:
    """Switch dropout off for a block, in train mode."""
    found = [(m, float(m.p)) for m in network.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    for module, _ in found:
        module.p = 0.0
    try:
        yield
    finally:
        for module, share in found:
            module.p = share


def probe(vocabulary: int) -> MicroBatch:
    """Pack a few tokens of a vocabulary, always the same."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, vocabulary, (n,), generator=generator).numpy() for n in (9, 6)]
    return pack([(ids, np.arange(len(ids)) > 0) for ids in rows])


@torch.no_grad()
def adapter_item(network: nn.Module, micro: MicroBatch, *, fresh: bool) -> Item:
    """Compare the network with its adapter off, and with its adapted layers taken out; and a fresh adapter with both.

    Args:
        network: As PEFT made it, before its layers are compiled or fused.
        micro: A few tokens on its device.
        fresh: The adapter starts at zero; otherwise it must make a difference.
    """
    name = "adapter"
    adapted: list[Any] = [m for m in network.modules() if hasattr(m, "base_layer") and hasattr(m, "lora_A")]
    if not adapted:
        return Item(name, None, "every weight trains")
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        on = supervised_logps(network, micro)
        with adapter_off(network):
            off = supervised_logps(network, micro)
        with _taken_out(adapted):
            bare = supervised_logps(network, micro)
    finally:
        for module in training:
            module.training = True
    leak, effect = (off - bare).abs().max().item(), (on - bare).abs().max().item()
    # A weight that DoRA divides and multiplies again is rounded on the way.
    stored = {p.dtype for p in network.parameters()}
    half = torch.is_autocast_enabled(on.device.type) or bool(stored & {torch.bfloat16, torch.float16})
    noise = (5e-2 if half else 1e-3) if any(any(m.use_dora.values()) for m in adapted) else 0.0
    told = f"off it leaves the base ({leak:.1e} nats apart over {len(adapted)} layers), "
    if leak > 0:
        return Item(name, False, f"switched off it still changes the base by {leak:.1e} nats")
    if fresh:
        return Item(name, effect <= noise, told + f"fresh it adds {effect:.1e} nats (at most {noise:g})")
    return Item(name, effect > 0, told + f"on it moves log-probabilities by up to {effect:.2g} nats")


@contextmanager
def _taken_out(adapted: Sequence[Any]) -> Iterator[None]:
    """Let adapted layers be the layers that they adapt."""
    for module in adapted:
        # On the instance: it stands before the class's own.
        module.forward = module.base_layer.forward
    try:
        yield
    finally:
        for module in adapted:
            del module.forward
