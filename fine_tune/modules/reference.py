"""DPO's reference: a second set of values for what trains, handed to the same layers on request."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fine_tune.models.adapter import trainable
from fine_tune.models.execution import without_backward


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    """Copy what trains, by parameter name, where it is."""
    return {name: parameter.detach().clone() for name, parameter in trainable(network).items()}


def fingerprint(values: Mapping[str, Tensor]) -> str:
    """Hash names, shapes and contents."""
    digest = hashlib.sha256()
    for name, tensor in sorted(values.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class FrozenAdapter:
    """An adapter that never moves, on the base that the policy stands on.

    The base exists once and so do the layers: while the block of :meth:`handed` runs, they compute with these values
    instead of the policy's. Both passes are then the same operations on other numbers, compiled or not, and a policy
    that equals its reference scores exactly the same.

    Args:
        network: The adapted model.
        values: What :func:`snapshot` returned, for every parameter that trains.
    """

    def __init__(self, network: nn.Module, values: Mapping[str, Tensor]) -> None:
        self._network = network
        mine = trainable(network)
        if mine.keys() != values.keys():
            raise ValueError(f"a reference needs a value for each of {len(mine)} parameters, got {len(values)}.")
        self._slots: list[tuple[nn.Module, str, nn.Parameter]] = []
        zeros: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        for name, parameter in mine.items():
            owner, _, key = name.rpartition(".")
            up = values.get(name.replace(".lora_A.", ".lora_B."))
            if up is not None and not up.any():
                # B = 0: an untrained adapter, whose A has no say. It takes the policy's A, and one zero matrix per shape.
                same = zeros.setdefault((parameter.shape, parameter.dtype), torch.zeros_like(parameter))
                value = parameter.detach() if ".lora_A." in name else same
            else:
                value = values[name].to(parameter.device, parameter.dtype, copy=True)
            # Like the policy's in every respect, "requires grad" included: a compiled layer then takes the same graph.
            self._slots.append((network.get_submodule(owner), key, nn.Parameter(value)))

    @contextmanager
    def handed(self) -> Iterator[None]:
        """Run the block on the reference's values; the policy's own parameters are back afterwards, untouched."""
        own = [(module, key, module._parameters[key]) for module, key, _ in self._slots]
        try:
            for module, key, frozen in self._slots:
                module._parameters[key] = frozen
            with without_backward(self._network):
                yield
        finally:
            for module, key, parameter in own:
                module._parameters[key] = parameter
