"""However layers run, losses and gradients are the plain path's (graphs are traced and not turned into code here)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fine_tune.kernels import lora, segment_attention
from fine_tune.models import execution
from fine_tune.models.adapter import trainable
from fine_tune.models.execution import Execution, decoder_layers, prepare_layers, without_backward
from fine_tune.models.forward import supervised_logps, supervised_states
from fine_tune.packing.batches import MicroBatch

from .layered_policy import COMPILED, EAGER, LAYERS, MICROS, compiling_with, policy

pytestmark = [
    pytest.mark.usefixtures("exact_norm"),
    # torch 2.13's own tracing asks itself for what it deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # Dynamo looks whether the norm's input has a gradient, and hides what torch says to that.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


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


@pytest.fixture(scope="module")
def plain() -> list[Passed]:
    network = policy()
    return [passed(network, micro) for micro in MICROS]


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


# Tracing takes seconds. The default run has a compiled 4-bit network below.
@pytest.mark.drill
@pytest.mark.parametrize("kind", COMPILED)
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
    base_folder: Path, compiler: CompileCounterWithBackend, how: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "compiled", compiling_with(compiler, dynamic=False))
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


def test_layers_are_found_in_order() -> None:
    network: Any = policy()
    assert list(decoder_layers(network)) == list(network.get_base_model().model.layers)
