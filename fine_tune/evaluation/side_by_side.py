"""Passes of a small model side by side on a CPU, one thread each: threads that share every product mostly wait for each other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")
# So many jobs for each thread are handed out before the first result is awaited: no thread runs dry, and few jobs exist at a time.
AHEAD = 4


def side_by_side(
    compute: Callable[[Job], Result], jobs: Iterable[Job], device: torch.device
) -> Generator[Result, None, None]:
    """Compute each job, on a CPU as many at a time as torch has threads, and yield the results in order.

    A job computes without gradients, under the caller's autocast; its result does not depend on the number of threads. Jobs are
    taken when they are needed; after ``close`` no more are begun.
    """
    if device.type != "cpu":
        yield from map(compute, jobs)
        return
    threads = torch.get_num_threads()
    enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def alone(job: Job) -> Result:
        # Both are a matter of the thread.
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=enabled):
            return compute(job)

    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(alone, job))
            if len(waiting) > AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        # Threads that start later would take over a worker's number.
        torch.set_num_threads(threads)
