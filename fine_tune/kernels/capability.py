"""What may be used of a GPU: all that it has, or only what an older generation has."""

from __future__ import annotations

import torch

AMPERE = (8, 0)
# Where a run was told to use no more than a generation has; None: whatever is there.
_most: tuple[int, int] | None = None


def use_at_most(capability: tuple[int, int] | None) -> None:
    """Use no more of any GPU than that compute capability has, until told otherwise; None uses everything.

    Before Ampere there is no flash attention, so torch's own choice among attention kernels goes without it too.
    """
    global _most
    before, _most = is_limited(), capability
    if is_limited() != before:
        # Otherwise torch's switches stay as their owner has set them.
        torch.backends.cuda.enable_flash_sdp(before)
        torch.backends.cuda.enable_cudnn_sdp(before)


def is_limited() -> bool:
    """Tell whether no more than a generation before Ampere may be used, whatever the card is."""
    return _most is not None and _most < AMPERE


def is_ampere(device: torch.device) -> bool:
    """Tell whether a device is a GPU of Ampere's generation (sm80) or a later one, and may be used as one."""
    return device.type == "cuda" and not is_limited() and torch.cuda.get_device_capability(device) >= AMPERE
