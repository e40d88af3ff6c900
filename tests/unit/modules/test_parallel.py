"""Two processes over gloo: uneven work, even none, sums to the gradient of one process."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from fine_tune.losses.sft import sft_loss
from fine_tune.modules.parallel import FlatSumStrategy, share_start, sum_gradients, sum_scalars, world_size

# Two optimizer steps: samples of rank 0 and of rank 1. In the second, rank 1 has nothing to do.
STEPS = (((0, 1, 2), (3,)), ((4, 5), ()))


class Model(nn.Module):
    """Double precision, single precision and a parameter that no loss reaches."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.wide = nn.Parameter(torch.randn(5, 7, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(7, generator=generator, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.randn(5, generator=generator))
        self.idle = nn.Parameter(torch.randn(2, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.narrow.double()) @ self.wide + self.bias


def sample(index: int) -> tuple[Tensor, Tensor]:
    generator = np.random.default_rng(index)
    tokens = int(generator.integers(2, 9))
    return torch.from_numpy(generator.normal(size=(tokens, 5))), torch.from_numpy(generator.integers(0, 7, tokens))


def backward(model: Model, samples: tuple[int, ...], num_step_tokens: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for index in samples:
        x, targets = sample(index)
        logps = model(x).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        share = sft_loss(logps, num_step_tokens=num_step_tokens)
        share.backward()
        total += share.detach()
    return total


def tokens_of(step: tuple[tuple[int, ...], ...]) -> int:
    return sum(len(sample(i)[1]) for rank in step for i in rank)


def grads(model: Model) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def work(rank: int, port: int) -> dict[str, Any]:
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    try:
        model = Model(seed=rank)
        share_start(model.parameters())
        found = {"start": {n: p.detach().clone() for n, p in model.named_parameters()}, "size": world_size()}
        for number, step in enumerate(STEPS):
            model.zero_grad()
            loss = backward(model, step[rank], tokens_of(step))
            sum_gradients(model.parameters())
            found[f"grads{number}"] = grads(model)
            found[f"loss{number}"] = float(sum_scalars(loss))
        return found
    finally:
        dist.destroy_process_group()


def work_and_save(_: int, port: int, file: str) -> None:
    torch.save(work(1, port), file)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_uneven_and_empty_ranks_sum_to_the_gradient_of_one_process(tmp_path: Path) -> None:
    port, file = free_port(), tmp_path / "1.pt"
    # Rank 0 is this process, and a fork of it is the other: a fresh one imports for ten seconds.
    other = mp.start_processes(  # type: ignore[no-untyped-call]
        work_and_save, args=(port, str(file)), nprocs=1, join=False, start_method="fork"
    )
    ranks = [work(0, port)]
    while not other.join():
        pass
    ranks.append(torch.load(file, weights_only=True))
    alone = Model(seed=0)
    for rank in ranks:
        assert rank["size"] == 2
        assert all(torch.equal(rank["start"][n], p) for n, p in alone.named_parameters()), (
            "rank 0's values, on all ranks"
        )
    for number, step in enumerate(STEPS):
        alone.zero_grad()
        loss = backward(alone, step[0] + step[1], tokens_of(step))
        for rank in ranks:
            assert abs(rank[f"loss{number}"] - loss.item()) < 1e-12
            for name, expected in grads(alone).items():
                # The float32 parameter is summed in its own dtype.
                tolerance = 1e-12 if expected.dtype == torch.float64 else 1e-6
                torch.testing.assert_close(rank[f"grads{number}"][name], expected, rtol=0, atol=tolerance)
    assert grads(alone)["wide"].abs().max() > 1e-3


def test_one_process_talks_to_nobody() -> None:
    model = Model(seed=0)
    backward(model, (0,), 8)
    before = {name: p.grad for name, p in model.named_parameters()}
    share_start(model.parameters())
    sum_gradients(model.parameters())
    assert world_size() == 1
    assert all(p.grad is before[name] for name, p in model.named_parameters())
    assert before["idle"] is None
    values = torch.tensor([3.0])
    assert sum_scalars(values) is values
    assert values.item() == 3.0


def test_the_strategy_leaves_the_model_unwrapped() -> None:
    strategy, model = FlatSumStrategy(process_group_backend="gloo"), nn.Linear(2, 2)
    assert strategy._setup_model(model) is model
    strategy.model = model
    strategy.configure_ddp()
    assert strategy.model is model
