"""What compiles the layers: torch's compiler for inputs of any length, with one mistake of it put right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph
from torch.utils.checkpoint import CheckpointPolicy

# One layer is compiled anew for few things (length bounds, dtypes); the default limit of 8 is soon reached.
RECOMPILE_LIMIT = 64


class InputsStay(CustomGraphPass):
    """Take the mark of what is computed again in the backward pass off a graph's inputs, which nothing can compute.

    Before 2.13, torch puts it on the number of rows when it replaces a random operation of a recomputed layer, as dropout is, by
    its own; that graph then cannot be divided into a forward and a backward pass ("Node ... was invalid, but is output").
    """

    def __call__(self, graph: Graph) -> None:
        """Change the graph in place."""
        for node in graph.find_nodes(op="placeholder"):
            if node.meta.get("recompute") in (CheckpointPolicy.PREFER_RECOMPUTE, CheckpointPolicy.MUST_RECOMPUTE):
                del node.meta["recompute"]

    def uuid(self) -> bytes:
        """Name this pass in torch's cache of compiled graphs."""
        return get_hash_for_files((__file__,))


# The same for every layer: torch shares a graph among callers whose options are equal, and compiles anew where they are not.
OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"joint_custom_post_pass": InputsStay()}


def compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for inputs of any length; layers are alike, so one graph serves all of them."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    made: Callable[..., Any] = torch.compile(step, dynamic=True, options=OPTIONS)
    return made
