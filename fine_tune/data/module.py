"""The LightningDataModule of every objective: prepared tables, and one StepBatch per optimizer step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fine_tune.data.prepare import Prepared, PrepareSpec, prepare
from fine_tune.data.table import TokenTable
from fine_tune.errors import EnvironmentProblem
from fine_tune.packing.batches import MicroBatch, Sample, StepBatch, pack
from fine_tune.packing.plan import Planner, best_fit
from fine_tune.text.template import ChatTemplate


class StepDataset(Dataset[StepBatch]):
    """Optimizer steps by number; any worker can build any of them."""

    def __init__(self, table: TokenTable, planner: Planner, *, num_steps: int, rank: int = 0) -> None:
        self.table, self.planner, self.num_steps, self.rank = table, planner, num_steps, rank

    def __len__(self) -> int:
        """Steps of the whole run, those already done included."""
        return self.num_steps

    def __getitem__(self, step: int) -> StepBatch:
        """Build step ``step`` of the run for this rank."""
        plan = self.planner.step(step)
        return StepBatch(
            step=step,
            epoch=plan.epoch,
            micro_batches=[pack_rows(self.table, members) for members in plan.micro_batches[self.rank]],
            num_supervised=int(self.table.supervised[list(plan.samples)].sum()),
            num_samples=len(plan.samples),
            num_tokens=int(self.table.lengths[list(plan.samples)].sum()),
        )


class StepsFrom(Sampler[int]):
    """The step numbers that are still to do."""

    def __init__(self, first: int, end: int) -> None:
        self.first, self.end = first, end

    def __len__(self) -> int:
        """Steps left."""
        return max(0, self.end - self.first)

    def __iter__(self) -> Iterator[int]:
        """Count from the first step left to the last."""
        return iter(range(self.first, self.end))


class PackedDataModule(pl.LightningDataModule):
    """Prepare rows once, then serve exact optimizer steps.

    Args:
        spec: What to read and how to cut it.
        seed: Order of the samples.
        global_batch_size: Samples per optimizer step, all ranks.
        num_workers: Processes that build batches ahead; 0 builds them in place. The order does not depend on it.
    """

    def __init__(
        self, spec: PrepareSpec, *, seed: int, global_batch_size: int, num_workers: int = 0
    ) -> None:
        super().__init__()
        self.spec, self.seed = spec, seed
        self.global_batch_size, self.num_workers = global_batch_size, num_workers
        self.first_step, self.num_steps = 0, 0

    def prepare_tables(
        self, tokenizer: Any, template: ChatTemplate, progress: Callable[[str, int, int | None], None] | None = None
    ) -> Prepared:
        """Read, mask, cut and count every row, or take all of it from the cache."""
        self.prepared = prepare(self.spec, tokenizer, template, progress=progress)
        return self.prepared

    def plan_steps(
        self, *, num_ranks: int, micro_batch_tokens: int, max_steps: int | None, max_epochs: float | None
    ) -> int:
        """Fix the number of optimizer steps of the run, and the most tokens of one forward pass; return the former."""
        self.micro_batch_tokens = micro_batch_tokens
        self.planner = Planner(
            self.prepared.train.lengths.tolist(), self.seed, self.global_batch_size, micro_batch_tokens, num_ranks
        )
        if max_steps is None:
            max_steps = max(1, round((max_epochs or 0) * self.planner.steps_per_epoch))
        self.num_steps = max_steps
        return max_steps

    def train_dataloader(self) -> DataLoader[StepBatch]:
        """Serve the steps from ``first_step`` on, each a whole StepBatch of this rank."""
        rank = self.trainer.global_rank if self.trainer is not None else 0
        steps = StepDataset(self.prepared.train, self.planner, num_steps=self.num_steps, rank=rank)
        return self._loader(steps, StepsFrom(self.first_step, self.num_steps))

    def val_dataloader(self) -> DataLoader[MicroBatch]:
        """Serve the validation table packed in a fixed order, the bins dealt out over the ranks."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        return self._loader(PackedTable(self.prepared.val, self.micro_batch_tokens, rank=rank, num_ranks=world), None)

    def _loader(self, dataset: Dataset[Any], sampler: Sampler[int] | None) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            # The loader draws from its own generator: the global one belongs to dropout and must not move.
            generator=torch.Generator().manual_seed(self.seed),
            worker_init_fn=leave_signals_to_the_run,
            persistent_workers=False,
        )


@contextmanager
def dead_workers_told(num_workers: int) -> Iterator[None]:
    """Tell in a sentence that a process that builds batches has died.

    Around a whole run: torch says so from a signal handler, in the middle of whatever the main thread does.

    Raises:
        EnvironmentProblem: It was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise EnvironmentProblem(
            f"trainer.num_workers={num_workers}: a process that builds batches has died ({error}). If memory ran out, pass "
            "trainer.num_workers=0. Go on with resume=<run folder>."
        ) from error


def leave_signals_to_the_run(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a worker: a terminal sends them to every process, and the run decides when to stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class PackedTable(Dataset[MicroBatch]):
    """A table in packed micro-batches of a fixed order: what validation and perplexity run over."""

    def __init__(self, table: TokenTable, micro_batch_tokens: int, *, rank: int = 0, num_ranks: int = 1) -> None:
        bins = best_fit([int(n) for n in table.lengths], micro_batch_tokens) if len(table) else []
        self.table, self.bins = table, [sorted(members) for members in bins][rank::num_ranks]

    def __len__(self) -> int:
        """Micro-batches."""
        return len(self.bins)

    def __getitem__(self, index: int) -> MicroBatch:
        """Pack one bin."""
        return pack_rows(self.table, self.bins[index])


def pack_rows(table: TokenTable, members: tuple[int, ...] | list[int]) -> MicroBatch:
    """Pack the named rows of a table."""
    return pack([Sample(*table.row(i), table.branches(i)) for i in members], members)
