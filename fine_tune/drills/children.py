"""Runs in processes of their own, as a user starts them; and killed from outside, as a machine does it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fine_tune.errors import FineTuneError

# How often a run that is to be killed is looked at.
LOOK_SECONDS = 0.005
# Lines of a child's output that are told when it fails.
TOLD = 12


class ChildFailed(FineTuneError):
    """A run that a drill has started ended with an error of its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code if 0 < exit_code < 256 else 1


def command(words: Sequence[str], *, num_ranks: int) -> list[str]:
    """Return the command of a run, with torchrun in front where it takes several processes."""
    train = ["-m", "fine_tune", "train", *words]
    if num_ranks == 1:
        return [sys.executable, *train]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [sys.executable, *launcher, *train]


def run_to_end(words: Sequence[str], log: Path, *, num_ranks: int = 1) -> float:
    """Run to the end and return the seconds it took.

    Raises:
        ChildFailed: It ended with an error.
    """
    started = time.monotonic()
    with started_child(words, log, num_ranks=num_ranks) as child:
        code = child.wait()
    if code:
        raise failed(log, code)
    return time.monotonic() - started


def run_until(words: Sequence[str], log: Path, due: Callable[[], bool], *, num_ranks: int = 1) -> bool:
    """Run until something is due and kill every process of the run with SIGKILL; False if it was over before.

    Raises:
        ChildFailed: It ended with an error.
    """
    with started_child(words, log, num_ranks=num_ranks) as child:
        while not due():
            code = child.poll()
            if code:
                raise failed(log, code)
            if code == 0:
                return False
            time.sleep(LOOK_SECONDS)
        return kill(child.pid) and child.wait() == -signal.SIGKILL


@contextmanager
def started_child(words: Sequence[str], log: Path, *, num_ranks: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a run, with what it prints in a file; nothing of it is left when the block ends."""
    with log.open("wb") as stream:
        child = subprocess.Popen(
            command(words, num_ranks=num_ranks), stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
            # Ctrl-C is for the drill, which then ends the run.
            start_new_session=True,
        )  # fmt: skip
        try:
            yield child
        finally:
            if child.poll() is None:
                kill(child.pid)
            child.wait()


def kill(pid: int) -> bool:
    """Send SIGKILL to a process and to all that it has started; False where it was gone already."""
    # Listed before the first dies: orphans have another parent. A launcher goes first, or it would start its workers anew.
    family = list(descendants(pid))
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    for one in family:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    return True


def descendants(pid: int) -> Iterator[int]:
    """Name the processes that a process has started, and those that they have; none where the system does not tell."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text(encoding="ascii").split()]
    for child in found:
        yield child
        yield from descendants(child)


def failed(log: Path, code: int) -> ChildFailed:
    """Tell how a run ended, with the end of what it printed."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = "\n".join(f"  {line}" for line in lines[-TOLD:])
    return ChildFailed(f"a run of this drill ended with exit code {code}. The end of {log}:\n{told}", code)
