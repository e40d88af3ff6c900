"""How the layers of a decoder run: compiled or not, recomputed or kept. The result is the same up to rounding."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fine_tune.kernels import frozen_linear, lora, segment_attention
from fine_tune.models.adapter import causal_lm
from fine_tune.models.base import decoder
from fine_tune.models.compiler import compiled
from fine_tune.models.fused_lora import fuse, fuse_frozen, trains_fused
from fine_tune.models.offload import OffloadedInputs

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Execution:
    """What to trade.

    Attributes:
        recompute: ``none`` keeps all activations; ``selective`` keeps products with the base's weights and attention, and
            computes the rest again in the backward pass; ``full`` keeps the input of each layer.
        offload: With ``full``: keep those inputs in host memory.
        compile: Compile each layer; where that fails, layers run uncompiled and a warning says so.
        fused_lora: One operation per adapted layer, where it covers what PEFT would compute.
        dense_base: A 4-bit base is made dense once, when it is loaded.
    """

    recompute: Recompute = "none"
    offload: bool = False
    compile: bool = False
    fused_lora: bool = False
    dense_base: bool = False

    @property
    def is_plain(self) -> bool:
        """Nothing is done to the layers."""
        return self == Execution()


@dataclass
class LayerRuns:
    """The prepared layers of a network.

    Attributes:
        execution: How they run.
        compiles: They still do; False after a compilation that failed.
        detached: Outputs are cut from their graph, so that a pass without a backward keeps nothing.
        offloaded: Inputs in host memory, or None.
        fused: Adapted layers that take our operation.
        trains_fused: All of them do in training.
        count: Layers.
    """

    execution: Execution
    compiles: bool
    detached: bool = False
    offloaded: OffloadedInputs | None = None
    fused: int = 0
    trains_fused: bool = False
    count: int = 0
    runs: list[_LayerRun] = field(default_factory=list, repr=False)

    def give_up_compiling(self, error: Exception) -> None:
        """Run uncompiled from now on, and say why once."""
        self.compiles = False
        error = getattr(error, "inner_exception", error)
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        warnings.warn(f"trainer.compile: layers run uncompiled from here on ({reason[:200]})", stacklevel=2)


class _LayerRun:
    """Stands where a compiled layer's call would: ``nn.Module`` calls it instead of ``forward``."""

    def __init__(self, layer: nn.Module, index: int, shared: LayerRuns) -> None:
        self.layer, self.index, self.shared = layer, index, shared
        self.step = _step(layer, shared)
        self.compiled = compiled(self.step) if shared.compiles else self.step

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            # Answers and validation: lengths change with every call, and nothing is kept.
            return self.layer._call_impl(hidden, *args, **kwargs)
        if not hidden.requires_grad:
            # The first layer is then like the others, and takes their graph.
            hidden = hidden.detach().requires_grad_(True)
        with self._hooks(hidden):
            out = self._run(hidden, *args, **kwargs)
        return out.detach() if self.shared.detached else out

    def _run(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.shared.compiles:
            return self.step(hidden, *args, **kwargs)
        try:
            return self.compiled(hidden, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.shared.give_up_compiling(error)
            return self.step(hidden, *args, **kwargs)

    def _hooks(self, hidden: Tensor) -> AbstractContextManager[Any]:
        offloaded = self.shared.offloaded
        if offloaded is None or self.shared.detached or self.index == self.shared.count - 1:
            return nullcontext()
        return offloaded.keeping(hidden, self.index)


class _Compiled:
    """A module that runs compiled where a backward pass follows."""

    def __init__(self, module: nn.Module, shared: LayerRuns) -> None:
        self.module, self.shared = module, shared
        self.compiled = compiled(module._call_impl)

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() and self.shared.compiles):
            return self.module._call_impl(hidden, *args, **kwargs)
        if not hidden.requires_grad:
            # Behind a pass without a backward it is then the graph of training, too.
            hidden = hidden.detach().requires_grad_(True)
        try:
            out = self.compiled(hidden, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.shared.give_up_compiling(error)
            out = self.module._call_impl(hidden, *args, **kwargs)
        return out.detach() if self.shared.detached else out


def _step(layer: nn.Module, shared: LayerRuns) -> Callable[..., Any]:
    if shared.execution.recompute == "none":
        return layer._call_impl
    options: dict[str, Any] = {"use_reentrant": False}
    if shared.execution.recompute == "selective":
        options["context_fn"] = functools.partial(
            create_selective_checkpoint_contexts, _policy(products=not shared.trains_fused)
        )
    return functools.partial(checkpoint, layer.forward, **options)


def _policy(*, products: bool) -> Callable[..., CheckpointPolicy]:
    """Keep what is dear to compute; ``products``: also those that are not inside an operation of ours."""
    kept = {*lora.KEPT, *frozen_linear.KEPT, *segment_attention.KEPT}
    for space, names in (("torch_attn", ("_varlen_attn",)), ("bitsandbytes", ("gemm_4bit",))):
        kept.update(getattr(getattr(torch.ops, space), name).default for name in names if _exists(space, name))
    if products:
        kept.update((torch.ops.aten.mm.default, torch.ops.aten.addmm.default))

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _exists(space: str, name: str) -> bool:
    return hasattr(getattr(torch.ops, space), name)


def prepare_layers(network: nn.Module, execution: Execution) -> LayerRuns:
    """Let every layer of the decoder run as ``execution`` says, in place; call once, with the adapter attached.

    What runs between the layers, and the chunked head, stays as it is. Names and parameters do too.
    """
    fused = fuse(network) if execution.fused_lora else 0
    if execution.fused_lora or execution.compile:
        fuse_frozen(network)
    layers = decoder_layers(network)
    runs = LayerRuns(execution, execution.compile, fused=fused, trains_fused=trains_fused(network), count=len(layers))
    if execution.offload:
        runs.offloaded = OffloadedInputs()
    if execution.compile or execution.recompute != "none":
        for index, layer in enumerate(layers):
            runs.runs.append(_LayerRun(layer, index, runs))
            layer._compiled_call_impl = runs.runs[-1]
    if execution.compile:
        for norm in _norms(network):
            norm._compiled_call_impl = _Compiled(norm, runs)
    return runs


def _norms(network: nn.Module) -> list[nn.Module]:
    """The normalisation behind the last layer, which uncompiled keeps several copies of its input in float32."""
    return [module for name, module in decoder(causal_lm(network)).named_children() if "norm" in name]


def decoder_layers(network: nn.Module) -> Sequence[nn.Module]:
    """Return the layers of a causal language model's decoder, in order."""
    groups = [module for module in decoder(causal_lm(network)).children() if isinstance(module, nn.ModuleList)]
    return [layer for group in groups for layer in group]


@contextmanager
def without_backward(network: nn.Module) -> Iterator[None]:
    """Within the block, passes take the graphs of training but keep nothing for a backward pass."""
    found = [layer._compiled_call_impl for layer in decoder_layers(network)]
    shared = {id(run.shared): run.shared for run in found if isinstance(run, _LayerRun)}
    for runs in shared.values():
        runs.detached = True
    try:
        yield
    finally:
        for runs in shared.values():
            runs.detached = False
