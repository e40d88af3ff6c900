"""Two processes over gloo are one process: loss, gradients, weights and checkpoints, in float64."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fine_tune import checkpoints
from fine_tune.callbacks.checkpoint import AdapterCheckpoint
from fine_tune.callbacks.resume import Resume
from fine_tune.checkpoints import Checkpoint
from fine_tune.models.adapter import load_trained_state, trainable
from fine_tune.modules import step as stepping
from fine_tune.modules.optim import OptimSpec
from fine_tune.modules.sft import SFTModule
from fine_tune.modules.step import StepModule
from fine_tune.packing.batches import MicroBatch, StepBatch, pack
from fine_tune.packing.plan import Planner
from tests.reference.test_exact_pairs import norm_without_casts
from tests.unit.models.conftest import VOCABULARY
from tests.unit.modules.conftest import dpo, moved_reference, pair, pairs, policy

pytestmark = [
    # Two processes import everything; tests/unit/modules/test_parallel.py holds the sums alone, in seconds.
    pytest.mark.drill,
    pytest.mark.timeout(900),
    # As a run does, see fine_tune.quiet.
    pytest.mark.filterwarnings("ignore:To get the last learning rate:UserWarning"),
    # Steps are given to Lightning as a list, and nothing is validated.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]
# Float64 sums in another order; the mistakes below are at least a hundred thousand times further away.
EXACT = 1e-12
BROKEN = 1e-3
# Seven rows in steps of three: in the last step of each epoch one rank has no row.
ROWS, PER_STEP, STEPS = 7, 3, 6
OBJECTIVES = ("sft", "dpo")
OPTIM = OptimSpec(torch.optim.AdamW, lr=1e-2, schedule="cosine", warmup_share=0.2, weight_decay=0.1, max_grad_norm=0.7)


@dataclass
class Seen:
    """What a run went through, step by step, and what it ended with."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    end: dict[str, Tensor] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)


def conversation(index: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(index)
    length = int(generator.integers(4, 40))
    mask = generator.random(length) < 0.7
    mask[0], mask[-1] = False, True
    return generator.integers(0, VOCABULARY, length), mask


def packed(objective: str, rows: tuple[int, ...]) -> MicroBatch:
    return pairs(*rows) if objective == "dpo" else pack([conversation(row) for row in rows], rows)


def lengths(objective: str) -> list[int]:
    return [len(pair(row).input_ids if objective == "dpo" else conversation(row)[0]) for row in range(ROWS)]


def shares(objective: str, *, rank: int, ranks: int, own_counts: bool = False) -> list[StepBatch]:
    """This rank's share of every step; with its own counts instead of the step's, a mistake made on purpose."""
    planner = Planner(lengths(objective), seed=5, global_batch_size=PER_STEP, micro_batch_tokens=48, num_ranks=ranks)
    found = []
    for number in range(STEPS):
        plan = planner.step(number)
        micros = [packed(objective, members) for members in plan.micro_batches[rank]]
        all_of_them = [packed(objective, (row,)) for row in plan.samples]
        counted = micros if own_counts else all_of_them
        found.append(
            StepBatch(
                number, plan.epoch, micros, sum(len(m.rows) for m in counted), sum(len(m.samples) for m in counted),
                sum(m.num_tokens for m in all_of_them),
            )
        )  # fmt: skip
    return found


def module_of(objective: str) -> StepModule:
    network = policy()
    if objective == "sft":
        return SFTModule(network, optim=OPTIM, num_steps=STEPS, head_chunk_tokens=7)
    # A reference that is not where training starts: margins and gradients of the first step say something, too.
    return dpo(network, moved_reference(network), allow_other_start=True, optim=OPTIM, num_steps=STEPS, beta=0.3)


class Look(pl.Callback):
    """Note every step: gradients as they are summed and clipped, before the update."""

    def __init__(self) -> None:
        self.seen = Seen()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen.gradients.append({n: p.grad.clone() for n, p in trainable(pl_module.network).items()})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: StepBatch, *_: Any) -> None:
        self.seen.losses.append(pl_module.last.loss)
        self.seen.norms.append(pl_module.last.grad_norm)
        self.seen.rows.append(sum(len(micro.samples) for micro in batch.micro_batches))


def run(
    objective: str, batches: list[StepBatch], folder: Path, *, start: Checkpoint | None = None, until: int = STEPS
) -> Seen:
    """Train through Lightning to step ``until``, with a checkpoint there, from the start or from a checkpoint on."""
    module, look, first = module_of(objective), Look(), 0 if start is None else start.step
    resume: list[pl.Callback] = []
    if start is not None:
        load_trained_state(module.network, start.adapter(), origin="here")
        module.step, first, resume = start.step, start.step, [Resume(start)]
    folder.mkdir(parents=True, exist_ok=True)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=until, max_epochs=1, logger=False, default_root_dir=str(folder),
        callbacks=[*resume, look, AdapterCheckpoint(STEPS + 1, keep=9)], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches[first:until], batch_size=None))  # type: ignore[arg-type]
    look.seen.end = {name: p.detach().clone() for name, p in trainable(module.network).items()}
    return look.seen


@contextmanager
def group(rank: int, port: int) -> Iterator[None]:
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def averaging() -> Iterator[None]:
    """What DDP does: gradients are averaged over ranks, each having divided by counts of its own."""
    right = stepping.sum_gradients

    def average(parameters: Any) -> None:
        parameters = list(parameters)
        right(parameters)
        for parameter in parameters:
            parameter.grad /= 2

    stepping.sum_gradients = average  # type: ignore[assignment]
    try:
        yield
    finally:
        stepping.sum_gradients = right


def work(rank: int, ports: tuple[int, int], root: Path) -> dict[str, Seen]:
    """Be a rank of two: the whole run, the run with a mistake, and a run whose middle is done by one process."""
    found = {}
    with group(rank, ports[0]):
        for objective in OBJECTIVES:
            batches = shares(objective, rank=rank, ranks=2)
            found[objective] = run(objective, batches, root / f"{objective}-two-{rank}")
            with averaging():
                own = shares(objective, rank=rank, ranks=2, own_counts=True)
                found[f"{objective} averaged"] = run(objective, own, root / f"{objective}-averaged-{rank}")
            run(objective, batches, root / f"{objective}-begun-{rank}", until=2)
    for objective in OBJECTIVES if rank == 0 else ():
        start = newest(root / f"{objective}-begun-0")
        run(objective, shares(objective, rank=0, ranks=1), root / f"{objective}-middle", start=start, until=4)
    # Here the other process waits for this one.
    with group(rank, ports[1]):
        for objective in OBJECTIVES:
            batches, start = shares(objective, rank=rank, ranks=2), newest(root / f"{objective}-middle")
            found[f"{objective} back"] = run(objective, batches, root / f"{objective}-back-{rank}", start=start)
    return found


def newest(folder: Path) -> Checkpoint:
    found, _ = checkpoints.latest(folder / "checkpoints")
    assert found is not None
    return found


def other_rank(_: int, ports: tuple[int, int], root: Path) -> None:
    LlamaRMSNorm.forward = norm_without_casts  # type: ignore[method-assign]
    torch.save({name: vars(seen) for name, seen in work(1, ports, root).items()}, root / "other.pt")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Done:
    """Every run: of one process, and of each rank of two."""

    one: dict[str, Seen]
    ranks: list[dict[str, Seen]]
    root: Path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    root, ports = tmp_path_factory.mktemp("two"), (free_port(), free_port())
    other = mp.spawn(other_rank, args=(ports, root), nprocs=1, join=False)  # type: ignore[no-untyped-call]
    try:
        with pytest.MonkeyPatch.context() as patch:
            # transformers' norm goes through float32; what is rounded there must not decide here.
            patch.setattr(LlamaRMSNorm, "forward", norm_without_casts)
            one = {name: run(name, shares(name, rank=0, ranks=1), root / f"{name}-one") for name in OBJECTIVES}
            mine = work(0, ports, root)
        while not other.join():
            pass
    finally:
        for process in other.processes:
            process.kill()
    theirs = {name: Seen(**values) for name, values in torch.load(root / "other.pt", weights_only=True).items()}
    return Done(one, [mine, theirs], root)


def furthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest difference of any entry, relative to the largest entry there is."""
    assert left.keys() == right.keys()
    assert left
    scale = max(value.abs().max().item() for value in left.values())
    return max((left[name] - right[name]).abs().max().item() for name in left) / scale


each_objective = pytest.mark.parametrize("objective", OBJECTIVES)
Field = Callable[[Seen], list[float]]


@each_objective
def test_work_is_uneven_and_a_rank_is_empty_at_times(done: Done, objective: str) -> None:
    rows = [rank[objective].rows for rank in done.ranks]
    assert [sum(both) for both in zip(*rows, strict=True)] == done.one[objective].rows == [3, 3, 1, 3, 3, 1]
    assert min(rows[0] + rows[1]) == 0
    assert any(left != right for left, right in zip(*rows, strict=True))


@each_objective
def test_loss_and_gradients_of_every_step_are_those_of_one_process(done: Done, objective: str) -> None:
    one = done.one[objective]
    for rank in done.ranks:
        assert rank[objective].losses == pytest.approx(one.losses, rel=EXACT)
        assert rank[objective].norms == pytest.approx(one.norms, rel=1e-6), "float32, as it is logged"
        for found, expected in zip(rank[objective].gradients, one.gradients, strict=True):
            assert furthest(expected, found) < EXACT


@each_objective
def test_weights_end_where_those_of_one_process_do(done: Done, objective: str) -> None:
    for rank in done.ranks:
        assert furthest(done.one[objective].end, rank[objective].end) < EXACT
    same = (torch.equal(done.ranks[0][objective].end[name], value) for name, value in done.ranks[1][objective].end.items())
    assert all(same), "ranks never drift apart"


@each_objective
def test_averages_of_rank_means_are_caught(done: Done, objective: str) -> None:
    one, wrong = done.one[objective], done.ranks[0][f"{objective} averaged"]
    gaps = [furthest(expected, found) for expected, found in zip(one.gradients, wrong.gradients, strict=True)]
    assert min(gaps) > BROKEN, "even where clipping has made norms alike"
    assert furthest(one.end, wrong.end) > BROKEN


@each_objective
def test_two_then_one_then_two_processes_are_one_run(done: Done, objective: str) -> None:
    one = done.one[objective]
    for rank in done.ranks:
        back = rank[f"{objective} back"]
        assert back.losses == pytest.approx(one.losses[4:], rel=EXACT)
        assert furthest(one.end, back.end) < EXACT
    ends = [newest(done.root / f"{objective}-{name}").trainer_state() for name in ("one", "back-0")]
    assert ends[0]["schedule"] == ends[1]["schedule"]
    moments = [
        {f"{index}.{key}": value for index, state in end["optimizer"]["state"].items() for key, value in state.items()}
        for end in ends
    ]
    assert furthest(*moments) < EXACT
    assert all(torch.equal(moments[0][key], moments[1][key]) for key in moments[0] if key.endswith(".step"))
