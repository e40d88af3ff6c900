"""Passes of a small model side by side on a CPU, one thread each: threads that share every product mostly wait for each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


def side_by_side(compute: Callable[[Job], Result], jobs: Sequence[Job], device: torch.device) -> list[Result]:
    """Compute each job, on a CPU as many at a time as torch has threads, and return the results in order.

    A job computes without gradients, under the caller's autocast; its result does not depend on the number of threads.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or not jobs:
        return [compute(job) for job in jobs]
    enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def alone(job: Job) -> Result:
        # Both are a matter of the thread.
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=enabled):
            return compute(job)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(alone, jobs))
    finally:
        torch.set_num_threads(threads)
