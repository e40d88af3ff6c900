"""Which weights a run's first updates move, and which they must leave alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fine_tune.checklist.item import Item
from fine_tune.models.adapter import trainable

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Names of an item's examples.
NAMED = 3


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Add up every tensor's bits as integers: a change of one value changes its sum. The host waits once per device."""
    sums = {name: _sum(tensor) for name, tensor in tensors.items()}
    by_device: dict[torch.device, list[str]] = {}
    for name, total in sums.items():
        by_device.setdefault(total.device, []).append(name)
    found: dict[str, int] = {}
    for names in by_device.values():
        found |= dict(zip(names, torch.stack([sums[name] for name in names]).tolist(), strict=True))
    return found


def _sum(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(INTEGERS[flat.element_size()]).sum(dtype=torch.int64)


def frozen(network: nn.Module) -> dict[str, Tensor]:
    """Return everything of a network that does not train, the scales of quantised layers included."""
    trained = set(trainable(network))
    return {name: value for name, value in network.state_dict().items() if name not in trained and value.numel()}


class WeightWatch:
    """Remembers a network's weights by their sums, and judges them after updates.

    Args:
        network: The adapted network.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._trained = checksums(trainable(network))
        self._frozen = checksums(frozen(network))
        self.gradients: Item | None = None

    def look_at_gradients(self) -> None:
        """Judge the gradients before an update: every B has one, and every A whose B is not zero.

        What one update has failed, a later one does not mend.
        """
        if self.gradients is not None and self.gradients.passed is False:
            return
        parameters = trainable(self.network)
        sizes = torch.stack([torch.stack([_size(p), p.detach().abs().max().float()]) for p in parameters.values()]).tolist()
        size_of = {name: gradient for name, (gradient, _) in zip(parameters, sizes, strict=True)}
        zero_b = {name for name, (_, value) in zip(parameters, sizes, strict=True) if _is_b(name) and value == 0.0}
        due = [name for name in parameters if not (_is_a(name) and _b_of(name) in zero_b)]
        without = [name for name in due if size_of[name] == 0.0]
        told = f"{len(due) - len(without)} of {len(due)} trained tensors have a gradient"
        if zero_b:
            told += f"; {len(parameters) - len(due)} A wait for a B that is not zero"
        excused = _excused(without)
        if without:
            told += f"; not {_named(without)}" + ("" if excused else ". Check method.target_modules.")
        self.gradients = Item("gradients", not without or (excused and len(without) < len(due)), told)

    def changed(self) -> Item:
        """Judge what updates have moved: every trained tensor."""
        now = checksums(trainable(self.network))
        still = [name for name in now if now[name] == self._trained[name]]
        excused = _excused(still)
        told = f"{len(now) - len(still)} of {len(now)} trained tensors changed in two updates"
        if still:
            told += f"; not {_named(still)}" + ("" if excused else ". Check optim.lr and method.target_modules.")
        return Item("updates", not still or (excused and len(still) < len(now)), told)

    def unchanged(self) -> Item:
        """Judge what updates must not move: the base, bit for bit."""
        now = checksums(frozen(self.network))
        common = now.keys() & self._frozen.keys()
        if not common:
            return Item("base", None, "every weight trains")
        moved = [name for name in sorted(common) if now[name] != self._frozen[name]]
        if moved:
            return Item("base", False, f"{len(moved)} of {len(common)} frozen tensors changed: {_named(moved)}")
        return Item("base", True, f"{len(common)} frozen tensors are bit for bit what they were")


def _size(parameter: nn.Parameter) -> Tensor:
    grad = parameter.grad
    return torch.zeros((), device=parameter.device) if grad is None else grad.detach().abs().max().float()


def _is_a(name: str) -> bool:
    return ".lora_A." in name or ".lora_embedding_A." in name


def _is_b(name: str) -> bool:
    return ".lora_B." in name or ".lora_embedding_B." in name


def _b_of(name: str) -> str:
    return name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")


def _excused(names: Iterable[str]) -> bool:
    """Tell whether all of them may be without a gradient: experts that no token chose, and biases that attention cancels."""
    return all("expert" in name or not (_is_a(name) or _is_b(name)) for name in names)


def _named(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:NAMED]) + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")
