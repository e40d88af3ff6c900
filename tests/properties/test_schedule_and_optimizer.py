"""N24 to N26: the rate is a function of the step, the norm one number over all gradients, AdamW the textbook's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from fine_tune.models.adapter import AdapterSpec, attach, trainable
from fine_tune.modules.optim import OptimSpec, build_optimizer, build_schedule, clip_grad_norm, parameter_groups

from ..unit.models.conftest import llama
from .drawn import SEEDS, plain
from .judging import distance, exceeds

EXACT = 1e-12
PEAK = 0.2
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "cosine_with_min_lr": lambda x: 0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * x)),
    "constant_with_warmup": lambda x: 1.0,
}
OPTIONS = {"cosine_with_min_lr": {"min_lr_rate": 0.25}}
LAST = {"linear": 0.0, "cosine": 0.0, "cosine_with_min_lr": 0.25 * PEAK, "constant_with_warmup": PEAK}


class Walk:
    """A parameter that an optimizer moves along its gradient, by the rate of its schedule alone."""

    def __init__(self, schedule: str, num_steps: int, warmup: float) -> None:
        options = OPTIONS.get(schedule, {})
        spec = OptimSpec(sgd, PEAK, schedule=schedule, warmup_share=warmup, schedule_options=options)
        self.place = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
        self.optimizer = build_optimizer(spec, [("w", self.place)], scaled=False)
        self.schedule = build_schedule(spec, self.optimizer, num_steps)
        self.rates: list[float] = []

    def go(self, steps: int) -> Walk:
        for _ in range(steps):
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.place.grad = torch.full((1, 1), -1.0, dtype=torch.float64)
            self.optimizer.step()
            self.schedule.step()
        return self

    def resumed(self, fresh: Walk, *, with_schedule: bool = True) -> Walk:
        """Hand over to a new process: states through a file's eyes, the weights as they are."""
        fresh.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        if with_schedule:
            fresh.schedule.load_state_dict(copy.deepcopy(self.schedule.state_dict()))
        fresh.place.data = self.place.data.clone()
        fresh.rates = list(self.rates)
        return fresh


def sgd(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=options["lr"])


def expected(schedule: str, num_steps: int, warmup: float) -> list[float]:
    """The rate of each update by hand: up to the peak in a straight line, then the shape to the last step."""
    warm = math.ceil(round(warmup * num_steps, 6))
    shape, rest = SHAPES[schedule], max(1, num_steps - warm)
    return [PEAK * (t / max(1, warm) if t < warm else shape((t - warm) / rest)) for t in range(num_steps)]


def numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@plain(60)
@given(
    schedule=st.sampled_from(sorted(SHAPES)), num_steps=st.integers(1, 60), warmup=st.sampled_from([0.0, 0.03, 0.5, 1.0]),
    stop=st.integers(0, 60),
)  # fmt: skip
def test_n24_the_rate_is_a_function_of_the_step_also_after_a_resume(
    schedule: str, num_steps: int, warmup: float, stop: int
) -> None:
    straight = Walk(schedule, num_steps, warmup).go(num_steps)
    right = numbers(expected(schedule, num_steps, warmup))
    assert distance(numbers(straight.rates), right) <= EXACT
    # The gradient is -1 everywhere: the weights are the sum of the rates.
    assert distance(straight.place.detach()[0], right.sum()[None]) <= EXACT
    if warmup < 1:
        assert straight.optimizer.param_groups[0]["lr"] == pytest.approx(LAST[schedule], abs=EXACT)
    half = min(stop, num_steps)
    again = Walk(schedule, num_steps, warmup).go(half).resumed(Walk(schedule, num_steps, warmup)).go(num_steps - half)
    assert again.rates == straight.rates
    assert torch.equal(again.place, straight.place)


def test_n24_control_micro_batches_for_steps_and_a_schedule_that_starts_again() -> None:
    right = numbers(expected("cosine", 20, 0.1))
    exceeds(numbers(Walk("cosine", 20 * 4, 0.1).go(20).rates), right, EXACT)
    fresh = Walk("cosine", 20, 0.1)
    again = Walk("cosine", 20, 0.1).go(8).resumed(fresh, with_schedule=False).go(12)
    exceeds(numbers(again.rates), right, EXACT)
    exceeds(again.place.detach()[0], right.sum()[None], EXACT)
    assert isinstance(fresh.schedule, LRScheduler)


GRADIENTS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(-6, 6)), min_size=1, max_size=5)


def with_gradients(shapes: list[tuple[int, int, int]], seed: int) -> list[nn.Parameter]:
    """Parameters whose gradients are of sizes from a millionth to a million."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows, width, power in shapes:
        parameter = nn.Parameter(torch.zeros(rows, width, dtype=torch.float64))
        parameter.grad = torch.randn(rows, width, generator=generator, dtype=torch.float64) * 10.0**power
        found.append(parameter)
    return found


def flat(parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


@plain(60)
@given(shapes=GRADIENTS, seed=SEEDS, limit=st.sampled_from([1e-3, 1.0, 100.0]))
def test_n25_one_norm_over_everything_and_no_more_than_the_limit(
    shapes: list[tuple[int, int, int]], seed: int, limit: float
) -> None:
    parameters = [*with_gradients(shapes, seed), nn.Parameter(torch.zeros(2))]
    before = flat(parameters).clone()
    norm = math.sqrt(math.fsum(g * g for g in before.tolist()))
    assert clip_grad_norm(parameters, limit).item() == pytest.approx(norm, rel=EXACT)
    # torch divides by the norm plus a millionth.
    assert distance(flat(parameters), before * min(1.0, limit / (norm + 1e-6))) <= EXACT


def test_n25_gradients_of_zero_stay_zero() -> None:
    parameters = with_gradients([(2, 3, 0)], 0)
    parameters[0].grad = torch.zeros(2, 3, dtype=torch.float64)
    assert clip_grad_norm(parameters, 1.0).item() == 0.0
    assert torch.equal(flat(parameters), torch.zeros(6, dtype=torch.float64))
    assert clip_grad_norm([nn.Parameter(torch.zeros(2))], 1.0).item() == 0.0


def test_n25_control_each_tensor_clipped_by_its_own_norm() -> None:
    one, other = (with_gradients([(2, 3, 0), (4, 2, 1)], 0) for _ in range(2))
    norm = clip_grad_norm(one, 1.0)
    largest = torch.stack([clip_grad_norm([parameter], 1.0) for parameter in other]).max()
    exceeds(largest[None], norm[None], EXACT)
    exceeds(flat(other), flat(one), EXACT)


def textbook(
    theta: float, slopes: list[float], decay: float, betas: tuple[float, float], eps: float, *, coupled: bool
) -> list[float]:
    """Loshchilov and Hutter 2019, algorithm 2, with the decay beside the moments or (Adam with L2) inside them."""
    mean = square = 0.0
    found = []
    for step, slope in enumerate(slopes, start=1):
        slope += decay * theta if coupled else 0.0
        mean = betas[0] * mean + (1 - betas[0]) * slope
        square = betas[1] * square + (1 - betas[1]) * slope * slope
        direction = (mean / (1 - betas[0] ** step)) / (math.sqrt(square / (1 - betas[1] ** step)) + eps)
        theta -= 1e-2 * (direction + (0.0 if coupled else decay * theta))
        found.append(theta)
    return found


def walked(theta: float, slopes: list[float], decay: float, betas: tuple[float, float], eps: float) -> list[float]:
    spec = OptimSpec(torch.optim.AdamW, lr=1e-2, betas=betas, eps=eps, weight_decay=decay)
    weight = nn.Parameter(torch.full((1, 1), theta, dtype=torch.float64))
    optimizer = build_optimizer(spec, [("w", weight)], scaled=False)
    found = []
    for slope in slopes:
        weight.grad = torch.full((1, 1), slope, dtype=torch.float64)
        optimizer.step()
        found.append(weight.item())
    return found


@plain(40)
@given(
    theta=st.floats(-3, 3), slopes=st.lists(st.floats(-10, 10), min_size=5, max_size=5),
    decay=st.sampled_from([0.0, 0.01, 0.3]), betas=st.sampled_from([(0.9, 0.999), (0.8, 0.95)]),
    eps=st.sampled_from([1e-8, 1e-4]),
)  # fmt: skip
def test_n26_adamw_is_the_textbooks(
    theta: float, slopes: list[float], decay: float, betas: tuple[float, float], eps: float
) -> None:
    found = walked(theta, slopes, decay, betas, eps)
    assert found == pytest.approx(textbook(theta, slopes, decay, betas, eps, coupled=False), abs=EXACT)


def test_n26_control_decay_inside_the_moments() -> None:
    told = (1.5, [0.1, -0.2, 0.4, 0.3, -0.5], 0.3, (0.9, 0.999), 1e-8)
    exceeds(numbers(walked(*told)), numbers(textbook(*told, coupled=True)), EXACT)


@pytest.mark.parametrize(
    "spec",
    [AdapterSpec("all"), AdapterSpec("adapter"), AdapterSpec("adapter", use_dora=True, new_tokens=[4, 5])],
    ids=lambda spec: spec.trains + ("+dora" if spec.use_dora else ""),
)
def test_n26_everything_that_trains_is_in_one_group_and_vectors_do_not_decay(spec: AdapterSpec) -> None:
    network = attach(llama(bias=spec.trains == "all"), spec)
    named = trainable(network)
    groups = parameter_groups(named.items(), 0.1)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in named.values())
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    still = {name for name, p in named.items() if decay[id(p)] == 0.0}
    vectors = {name for name in named if "norm" in name or "bias" in name or "magnitude" in name}
    assert still == vectors
    assert bool(vectors) is (spec.trains == "all" or spec.use_dora)
