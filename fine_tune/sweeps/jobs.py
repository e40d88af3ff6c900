"""One job of a sweep: claimed, run, and recorded however it ends."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fine_tune.config import check_config
from fine_tune.errors import EnvironmentProblem, FineTuneError
from fine_tune.interrupts import Interrupted
from fine_tune.kept import Kept
from fine_tune.opening import say
from fine_tune.redaction import masked
from fine_tune.runs import run
from fine_tune.sweeps.record import FAILED, FINISHED, INTERRUPTED, PRUNED, JobRecord, SweepFolder
from fine_tune.sweeps.workers import local_rank
from fine_tune.watching import Pruned, Watcher

# A reason is for a table; the whole error is in the run's folder.
REASON_CHARACTERS = 2000


class _Follower(Watcher):
    """Remembers where the run lives, and passes on what it is told."""

    def __init__(self, inner: Watcher) -> None:
        self.inner = inner
        self.run: str | None = None

    def opened(self, folder: Path) -> None:
        self.run = folder.name
        self.inner.opened(folder)

    def validated(self, step: int, values: Mapping[str, float]) -> None:
        self.inner.validated(step, values)


def do_job(
    sweep: SweepFolder, number: int, words: Sequence[str], *, kept: Kept, title: str, watcher: Watcher | None = None
) -> JobRecord | None:
    """Run a job unless it is done or another process has it; return its record if it is known.

    Errors of the job are recorded and not raised.

    Args:
        sweep: The record.
        number: The job's number.
        words: Its words.
        kept: What jobs of this process share.
        title: What is said before it starts.
        watcher: Who follows it.

    Raises:
        Interrupted: A signal stopped it: the sweep ends here.
    """
    with sweep.claim(number) as mine:
        if not mine:
            return None
        if sweep.is_done(number):
            return sweep.read(number)
        say(title)
        started = time.perf_counter()
        follower = _Follower(watcher or Watcher())
        # Until it is known otherwise: also Ctrl-C at any moment ends here.
        record = JobRecord(number, list(words), None, INTERRUPTED, 130)
        try:
            _run(words, sweep.path.name, kept, follower)
            record = JobRecord(number, list(words), None, FINISHED)
        except Interrupted as error:
            record = _ended(record, error, INTERRUPTED)
            raise
        except Pruned as error:
            record = _ended(record, error, PRUNED)
        except Exception as error:
            # Whatever one job raises, the others run; the record and the run's folder say what it was.
            record = _ended(record, error, FAILED)
            say(f"job {number + 1} failed ({record.error}): {record.reason}")
        finally:
            sweep.write(replace(record, run=follower.run, seconds=time.perf_counter() - started))
        return sweep.read(number)


def _run(words: Sequence[str], group: str, kept: Kept, follower: Watcher) -> None:
    cfg = check_config(words, multirun=True).cfg
    cfg.pop("sweep", None)
    _refuse_missing_device(cfg["trainer"]["accelerator"])
    wandb = cfg["logger"].get("wandb")
    if wandb is not None and wandb.get("group") is None:
        wandb["group"] = group
    run(cfg, overrides=[word.lstrip("+") for word in words], kept=kept, watcher=follower)


def _refuse_missing_device(accelerator: str) -> None:
    if accelerator == "cpu" or not torch.cuda.is_available():
        return
    rank, count = local_rank(), torch.cuda.device_count()
    if rank >= count:
        raise EnvironmentProblem(
            f"this is process {rank + 1} of the sweep on this machine, which has {count} GPU(s), one for each job at a time. "
            f"Start torchrun with --nproc-per-node {count}."
        )


def _ended(record: JobRecord, error: Exception, status: str) -> JobRecord:
    code = error.exit_code if isinstance(error, FineTuneError) else 0 if status == PRUNED else 1
    reason = masked(str(error))[:REASON_CHARACTERS]
    # The frames of the traceback hold the job's tensors, which the next job needs the room of.
    error.__traceback__ = None
    return replace(record, status=status, exit_code=code, error=type(error).__name__, reason=reason)
