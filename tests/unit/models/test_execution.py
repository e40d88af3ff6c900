"""However layers run, losses and gradients are the plain path's (graphs are traced and not turned into code here)."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fine_tune.kernels import lora, segment_attention
from fine_tune.models import execution
from fine_tune.models.adapter import AdapterSpec, attach, trainable
from fine_tune.models.base import load_base
from fine_tune.models.execution import Execution, LayerRuns, decoder_layers, prepare_layers, without_backward
from fine_tune.models.forward import supervised_logps, supervised_states
from fine_tune.modules.dpo import DPOModule
from fine_tune.modules.optim import OptimSpec
from fine_tune.modules.ratios import Ratios
from fine_tune.modules.reference import FrozenAdapter, snapshot
from fine_tune.packing.batches import MicroBatch, Sample, StepBatch, pack

from .conftest import VOCABULARY, base_spec, llama, randomize

pytestmark = [
    # torch 2.13's own tracing asks itself for what it deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # Dynamo looks whether the norm's input has a gradient, and hides what torch says to that.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
LAYERS = 4
ADAMW = OptimSpec(torch.optim.AdamW, lr=1e-2, schedule="constant", warmup_share=0.0, max_grad_norm=None)
EAGER = {
    "fused": Execution(fused_lora=True),
    "selective": Execution("selective"),
    "selective, fused": Execution("selective", fused_lora=True),
    "full": Execution("full"),
    "full, offload, fused": Execution("full", offload=True, fused_lora=True),
}
COMPILED = {
    "compiled": Execution(compile=True),
    "compiled, fused": Execution(compile=True, fused_lora=True),
    "compiled, selective": Execution("selective", compile=True),
    "compiled, selective, fused": Execution("selective", compile=True, fused_lora=True),
    "compiled, full": Execution("full", compile=True),
    "compiled, full, offload, fused": Execution("full", offload=True, compile=True, fused_lora=True),
}


def policy(dtype: torch.dtype = torch.float64, folder: Path | None = None) -> nn.Module:
    """Four like layers with two adapted products each; dense, or in 4 bits from a folder."""
    model: Any = llama() if folder is None else load_base(base_spec(folder, bits=4))
    while len(model.model.layers) < LAYERS:
        model.model.layers.append(copy.deepcopy(model.model.layers[1]))
    model.config.num_hidden_layers = LAYERS
    network = attach(model, AdapterSpec(trains="adapter", rank=4, alpha=8.0, target_modules=["q_proj", "down_proj"]))
    if folder is None:
        network.to(dtype)
    randomize(network)
    return network


def pairs(seed: int, *sizes: tuple[int, int, int]) -> MicroBatch:
    generator = np.random.default_rng(seed)
    samples = []
    for prompt, chosen, rejected in sizes:
        size = prompt + chosen + rejected
        ids = generator.integers(0, VOCABULARY, size)
        samples.append(Sample(ids, np.arange(size) >= prompt, (prompt, prompt + chosen)))
    return pack(samples)


def documents(seed: int, *sizes: int) -> MicroBatch:
    generator = np.random.default_rng(seed)
    return pack([(generator.integers(0, VOCABULARY, size), np.arange(size) > 0) for size in sizes])


# Two lengths each of what shares prompts and of what does not.
MICROS = [pairs(0, (5, 7, 4), (9, 3, 6)), documents(1, 9, 4, 6), pairs(2, (4, 8, 2), (6, 5, 9)), documents(3, 12, 5)]


class Passed(NamedTuple):
    """Loss and gradients of one micro-batch."""

    loss: float
    gradient: Tensor


def passed(network: nn.Module, micro: MicroBatch) -> Passed:
    network.zero_grad()
    loss = -supervised_logps(network, micro).mean()
    loss.backward()
    slopes = [p.grad.flatten() for p in trainable(network).values() if p.grad is not None]
    assert len(slopes) == LAYERS * 4
    return Passed(loss.item(), torch.cat(slopes))


def alike(found: list[Passed], expected: list[Passed], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=tolerance)
        assert (one.gradient - other.gradient).norm() <= tolerance * other.gradient.norm()
        assert other.gradient.norm() > 1e-2


@pytest.fixture(scope="module", autouse=True)
def exact_norm() -> Iterator[None]:
    """Keep transformers' norm in float64; it goes through float32 otherwise and rounds there."""

    def forward(self: LlamaRMSNorm, states: Tensor) -> Tensor:
        return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", forward)
        yield


@pytest.fixture(scope="module")
def plain() -> list[Passed]:
    network = policy()
    return [passed(network, micro) for micro in MICROS]


def compiling_with(backend: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda step: torch.compile(step, dynamic=True, backend=backend)


class Prepared(NamedTuple):
    """A network that compiles, and what counts its graphs."""

    network: nn.Module
    runs: LayerRuns
    compiler: CompileCounterWithBackend


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Graphs with their backward passes, taken as they are traced."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(execution, "compiled", compiling_with(counter))
    yield counter
    torch._dynamo.reset()


class Calls:
    """Counts calls of a function that an operation of ours makes once each time it runs."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.count, original = 0, getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return original(*args, **kwargs)

        patch.setattr(owner, name, counted)


@pytest.mark.parametrize("kind", EAGER)
def test_uncompiled_layers_compute_what_plain_ones_do(plain: list[Passed], kind: str) -> None:
    network = policy()
    runs = prepare_layers(network, EAGER[kind])
    assert (runs.count, runs.fused) == (LAYERS, 2 * LAYERS if EAGER[kind].fused_lora else 0)
    alike([passed(network, micro) for micro in MICROS], plain, 1e-9)


# Tracing takes seconds; the shipped speeds and one without our operation are always looked at.
OFTEN = ("compiled, selective", "compiled, selective, fused", "compiled, full, offload, fused")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in OFTEN else pytest.mark.drill) for k in COMPILED])
def test_compiled_layers_compute_what_plain_ones_do_and_share_one_graph(
    plain: list[Passed], compiler: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    network = policy()
    prepare_layers(network, COMPILED[kind])
    assert compiler.frame_count == 0, "nothing is traced before it runs"
    found = [passed(network, MICROS[0])]
    # One for all layers, one for the norm behind them, and at most one more.
    traced = compiler.frame_count
    assert 2 <= traced <= 3 < LAYERS
    products, attended = Calls(monkeypatch, lora, "dense"), Calls(monkeypatch, segment_attention, "_segments")
    alike([*found, passed(network, MICROS[2])], plain[::2], 1e-9)
    assert compiler.frame_count == traced, "other lengths take the same"
    redone = COMPILED[kind].recompute == "full"
    assert attended.count == LAYERS * (3 if redone else 2)
    if COMPILED[kind].fused_lora:
        kept = 2 * LAYERS * 2
        # The product that ends a layer has its inputs kept or recomputed, and is not needed itself.
        assert products.count == kept + (LAYERS if redone else 0)


@pytest.mark.parametrize("kind", ["fused", "selective, fused", "full, offload, fused"])
def test_only_full_recomputation_redoes_the_products(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    network = policy()
    prepare_layers(network, EAGER[kind])
    products = Calls(monkeypatch, lora, "dense")
    passed(network, MICROS[0])
    once = 2 * LAYERS * 2
    assert products.count == once if EAGER[kind].recompute != "full" else products.count >= once + LAYERS


def test_selective_recomputation_keeps_less_than_everything_and_full_the_least() -> None:
    kept = {}
    for kind in ("fused", "selective, fused", "full, offload, fused"):
        network, sizes = policy(), {}
        prepare_layers(network, EAGER[kind])

        def pack_(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack_, lambda tensor: tensor):
            states = supervised_states(network, MICROS[0])
        kept[kind] = sum(sizes.values())
        del states
    assert kept["full, offload, fused"] < kept["fused"] / 2
    assert kept["selective, fused"] < kept["fused"]


@pytest.mark.parametrize(
    "how",
    [Execution("full", fused_lora=True), Execution("selective", compile=True, fused_lora=True)],
    ids=["full", "balanced"],
)
def test_a_4_bit_network_computes_what_a_plain_one_does(
    base_folder: Path, compiler: CompileCounterWithBackend, how: Execution
) -> None:
    expected, network = policy(folder=base_folder), policy(folder=base_folder)
    runs = prepare_layers(network, how)
    assert runs.fused == 2 * LAYERS
    alike([passed(network, MICROS[1])], [passed(expected, MICROS[1])], 1e-5)
    assert bool(compiler.frame_count) is how.compile


def test_nothing_but_layers_and_their_norm_is_touched_and_names_stay(compiler: CompileCounterWithBackend) -> None:
    network = policy()
    names, keys = [name for name, _ in network.named_parameters()], list(network.state_dict())
    prepare_layers(network, COMPILED["compiled, full"])
    found = [name for name, module in network.named_modules() if module._compiled_call_impl is not None]
    inner = "base_model.model.model"
    assert found == [*(f"{inner}.layers.{number}" for number in range(LAYERS)), f"{inner}.norm"]
    assert [name for name, _ in network.named_parameters()] == names
    assert list(network.state_dict()) == keys
    bare = policy()
    prepare_layers(bare, Execution())
    assert all(module._compiled_call_impl is None for module in bare.modules())


def test_without_gradients_layers_run_uncompiled(plain: list[Passed], compiler: CompileCounterWithBackend) -> None:
    network = policy()
    prepare_layers(network, COMPILED["compiled, selective, fused"])
    with torch.no_grad():
        loss = -supervised_logps(network, MICROS[0]).mean()
    assert loss.item() == pytest.approx(plain[0].loss, abs=1e-9)
    assert compiler.frame_count == 0


def refusing(only: Callable[[torch.fx.GraphModule], bool]) -> Callable[..., Any]:
    """A backend without a code generator for some graphs."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        if only(graph):
            raise RuntimeError("no compiler\nfor this machine")
        return graph.forward

    return backend


@pytest.mark.parametrize("what", ["everything", "the norm alone"])
def test_where_compiling_fails_layers_run_uncompiled_and_one_warning_says_so(
    plain: list[Passed], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def is_norm(graph: torch.fx.GraphModule) -> bool:
        return not any("fine_tune" in str(node.target) for node in graph.graph.nodes)

    torch._dynamo.reset()
    backend = refusing(is_norm if what == "the norm alone" else lambda graph: True)
    monkeypatch.setattr(execution, "compiled", compiling_with(backend))
    network = policy()
    runs = prepare_layers(network, COMPILED["compiled, fused"])
    with pytest.warns(UserWarning, match="trainer.compile: .* run uncompiled from here on .*no compiler") as warned:
        found = [passed(network, micro) for micro in MICROS]
    assert len(warned) == 1
    assert not runs.compiles
    alike(found, plain, 1e-9)
    torch._dynamo.reset()


class _Inputs:
    """Which layers' inputs are still somewhere in memory."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[weakref.ref[Tensor]] = []
        original = execution._LayerRun._run

        def noted(run: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(weakref.ref(hidden))
            return original(run, hidden, *args, **kwargs)

        patch.setattr(execution._LayerRun, "_run", noted)

    def alive(self) -> int:
        gc.collect()
        assert len(self.seen) == LAYERS
        return sum(ref() is not None for ref in self.seen)


@pytest.mark.parametrize("kind", ["selective", "full, offload, fused"])
def test_a_pass_without_a_backward_keeps_nothing(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    network = policy()
    prepare_layers(network, EAGER[kind])
    results = []
    for detached in (True, False):
        inputs = _Inputs(monkeypatch)
        if detached:
            with without_backward(network):
                states = supervised_states(network, MICROS[0])
        else:
            states = supervised_states(network, MICROS[0])
        assert states.requires_grad is not detached
        assert inputs.alive() == (0 if detached else LAYERS)
        results.append(states.detach())
        monkeypatch.undo()
    assert torch.equal(*results)
    assert passed(network, MICROS[0]).gradient.norm() > 1e-2, "afterwards it learns again"


def test_an_error_on_the_way_does_not_leave_it_without_a_backward() -> None:
    network = policy()
    runs = prepare_layers(network, EAGER["selective"])

    def interrupted() -> None:
        with without_backward(network):
            assert runs.detached
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert not runs.detached


def module_of(network: nn.Module, reference: FrozenAdapter | None = None) -> DPOModule:
    frozen = reference or FrozenAdapter(network, snapshot(network))
    return DPOModule(network, reference=frozen, optim=ADAMW, num_steps=1)


def step(module: DPOModule, micro: MicroBatch) -> tuple[float, dict[str, float], Tensor]:
    module.network.zero_grad()
    ratios = Ratios(module.metric_names, module.device)
    batch = StepBatch(0, 0, [micro], len(micro.rows), len(micro.samples), micro.num_tokens)
    loss = module.micro_loss(micro, batch, ratios)
    loss.backward()
    gradients = [p.grad.flatten() for p in trainable(module.network).values() if p.grad is not None]
    return loss.item(), ratios.means(), torch.cat(gradients)


def moved(network: nn.Module) -> FrozenAdapter:
    return FrozenAdapter(network, {name: value * 1.5 for name, value in snapshot(network).items()})


@pytest.fixture(scope="module")
def balanced() -> Iterator[Prepared]:
    """One network for all tests of a preference step: tracing takes seconds. In float32, as a user's is."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    network = policy(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "compiled", compiling_with(counter))
        runs = prepare_layers(network, COMPILED["compiled, selective, fused"])
    yield Prepared(network, runs, counter)
    torch._dynamo.reset()


def test_policy_and_reference_take_the_same_graphs(balanced: Prepared) -> None:
    module = module_of(balanced.network)
    module.reference_logps(MICROS[0])
    traced = balanced.compiler.frame_count
    assert 2 <= traced <= 3
    supervised_logps(balanced.network, MICROS[0])
    assert balanced.compiler.frame_count == traced, "the policy's pass, which came second, compiles nothing"
    for seed in (1, 2, 3):
        step(module, pairs(seed, (3 + seed, 8, 2), (6, 4 + seed, 9)))
    assert balanced.compiler.frame_count == traced, "nor do other lengths"


def test_a_compiled_start_is_ln_2_and_not_nearly(balanced: Prepared) -> None:
    loss, metrics, _ = step(module_of(balanced.network), MICROS[0])
    assert abs(loss - math.log(2)) <= 1e-12
    assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == 0.0


def test_a_compiled_preference_step_is_the_plain_one(balanced: Prepared) -> None:
    """With a reference that the policy is not: values are read when a graph runs, and not kept in it."""
    eager = policy(torch.float32)
    loss, metrics, gradient = step(module_of(eager, moved(eager)), MICROS[0])
    found, seen, slope = step(module_of(balanced.network, moved(balanced.network)), MICROS[0])
    assert found == pytest.approx(loss, abs=1e-5)
    assert seen == pytest.approx(metrics, abs=1e-4)
    assert (slope - gradient).norm() <= 1e-5 * gradient.norm()
    assert abs(metrics["rewards/margins"]) > 1e-4


def test_a_reference_that_asks_for_no_gradient_would_be_other_graphs(balanced: Prepared) -> None:
    """The control, and the reason why frozen values ask for gradients that nobody takes."""
    module = module_of(balanced.network)
    module.reference_logps(MICROS[0])
    before = balanced.compiler.frame_count
    for _, _, tensor in module.reference._slots:
        tensor.requires_grad_(False)
    module.reference_logps(MICROS[0])
    assert balanced.compiler.frame_count > before


def test_layers_are_found_in_order() -> None:
    network: Any = policy()
    assert list(decoder_layers(network)) == list(network.get_base_model().model.layers)
