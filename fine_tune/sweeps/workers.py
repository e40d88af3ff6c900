"""Several processes on one sweep: each takes jobs that no other has, and runs them on one device."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# What torchrun tells a process about its group: a job of a sweep is a group of one.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0"}


def leave_the_group(environment: MutableMapping[str, str] | None = None) -> tuple[int, int]:
    """Return this process's rank and the number of processes, and make its runs runs of one process.

    ``LOCAL_RANK`` stays: it is the number of the process's device. Call before torch is imported.

    Example:
        >>> variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}
        >>> leave_the_group(variables), variables["WORLD_SIZE"], variables["LOCAL_RANK"]
        ((3, 4), '1', '3')
    """
    variables = os.environ if environment is None else environment
    rank, size = (int(variables.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if size > 1:
        variables.update(ALONE)
    return rank, size


def local_rank() -> int:
    """Return the number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))
