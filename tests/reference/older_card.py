"""An audit of every operation of torch: nothing that a card before Ampere does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Attention kernels that need Ampere, as torch names them; on a CPU the flash kernel has a name of its own.
NEWER = (
    "_scaled_dot_product_flash_attention.", "_scaled_dot_product_cudnn_attention.", "_varlen_attn.", "_flash_attention_forward.",
)  # fmt: skip


class NewerOperation(AssertionError):
    """Something ran that an older card does not have."""


class OlderCard(TorchDispatchMode):
    """Within the block no operation takes or gives a bfloat16 tensor, and none is an attention kernel of newer cards.

    Backward passes and optimizers are looked at too. Tensors without values (meta) are no operation on a device.

    Attributes:
        seen: How often each operation ran.
        dtypes: Of every floating-point tensor that there was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        """Look at what goes in, run it, and look at what comes out."""
        name = str(func)
        found = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, Tensor) and x.device.type != "meta"]
        self.seen[name] = self.seen.get(name, 0) + bool(tensors)
        self.dtypes |= {x.dtype for x in tensors if x.is_floating_point()}
        if any(x.dtype == torch.bfloat16 for x in tensors):
            raise NewerOperation(f"{name} has a bfloat16 tensor")
        if any(newer in name for newer in NEWER):
            raise NewerOperation(f"{name} needs a newer card")
        return found
