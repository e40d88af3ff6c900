"""The speeds compute the same, as far from float32 as PyTorch and PEFT are; the 4-bit kernel gives bitsandbytes' bits."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from fine_tune.kernels.frozen_weight import FrozenWeight, dense
from fine_tune.kernels.lora import lora_linear
from fine_tune.losses.sft import sft_loss
from fine_tune.models.adapter import trainable
from fine_tune.models.execution import decoder_layers, prepare_layers
from fine_tune.models.forward import supervised_logps
from fine_tune.models.offload import OffloadedInputs
from fine_tune.packing.batches import MicroBatch, pack
from fine_tune.speed import SPEEDS
from tests.gpu.test_gpu_pairs import adapted, samples

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]


@pytest.mark.parametrize("grid", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_gives_the_bits_of_bitsandbytes(grid: str, double: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in ((256, 512), (1024, 256), (192, 64), (4096, 4096)):
        weight = torch.randn(shape, device="cuda", dtype=dtype) * 0.02
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=grid)
        packed.quant_state = state
        frozen = FrozenWeight.of(packed)
        assert frozen is not None
        ours = dense(list(frozen.parts), frozen.layout, shape, dtype)
        assert torch.equal(ours, bnb.functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [(512, 256), (256, 512)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_operation_is_as_near_to_float64_as_peft_is(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda")

    weight, a, b, x, slope = (random(*s) for s in (shape, (8, shape[1]), (shape[0], 8), (300, shape[1]), (300, shape[0])))
    weight, x, slope = weight.to(dtype) / 16, x.to(dtype), slope.to(dtype)

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        kind = x.dtype
        return x @ weight.to(kind).T + (x @ a.to(kind).T) @ b.to(kind).T * 0.25

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, FrozenWeight((weight,), "dense"), a, b, scale=0.25)

    def run(function: Callable[..., Tensor], wide: bool) -> list[Tensor]:
        leaves = [t.double() if wide else t for t in (x, a, b)]
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, slope.to(y.dtype))]

    exact, peft, mine = run(plain, True), run(plain, False), run(ours, False)
    for truth, theirs, found in zip(exact, peft, mine, strict=True):
        error, allowed = ((t.double() - truth).norm().item() for t in (found, theirs))
        assert error <= 1.1 * allowed
    assert mine[2].dtype == mine[3].dtype == torch.float32


def scores_and_gradients(network: nn.Module, micro: MicroBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    network.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        logps = supervised_logps(network, micro)
    sft_loss(logps, num_step_tokens=len(logps)).backward()
    return logps.detach(), torch.cat([p.grad.flatten() for p in trainable(network).values() if p.grad is not None])


@pytest.fixture(scope="module")
def truth() -> tuple[Tensor, Tensor]:
    network = adapted().float()
    return scores_and_gradients(network, pack(samples()).to("cuda"), torch.float32)


@pytest.fixture(scope="module")
def plain_error(truth: tuple[Tensor, Tensor]) -> list[float]:
    found = scores_and_gradients(adapted(), pack(samples()).to("cuda"), torch.bfloat16)
    return [(x - exact).norm().item() for x, exact in zip(found, truth, strict=True)]


@pytest.mark.parametrize("speed", ["fast", "balanced", "lean"])
def test_a_speed_is_as_near_to_float32_as_the_plain_path(
    speed: str, truth: tuple[Tensor, Tensor], plain_error: list[float]
) -> None:
    network = adapted()
    runs = prepare_layers(network, SPEEDS[speed])
    found = scores_and_gradients(network, pack(samples()).to("cuda"), torch.bfloat16)
    assert runs.compiles, "it was not given up"
    assert runs.fused == 7 * len(decoder_layers(network))
    for x, exact, allowed in zip(found, truth, plain_error, strict=True):
        assert (x - exact).norm().item() <= 1.2 * allowed
        assert exact.norm().item() > 20 * allowed, "the control: there is something to be near to"


def test_inputs_of_layers_leave_the_device() -> None:
    """What autograd keeps of a pass, beyond what every pass keeps: two of three inputs fewer."""
    micro, held = pack(samples()).to("cuda"), []
    network = adapted()
    runs = prepare_layers(network, SPEEDS["lean"])
    offloaded = runs.offloaded
    for place in (offloaded, None):
        runs.offloaded = place
        with torch.autocast("cuda", torch.bfloat16):
            # Once to compile and to fill caches of memory, once to measure.
            supervised_logps(network, micro).sum().backward()
            before = settled(offloaded)
            logps = supervised_logps(network, micro)
            held.append(settled(offloaded) - before)
            logps.sum().backward()
    assert held[1] - held[0] >= 2 * micro.num_tokens * 128 * 2


def settled(offloaded: OffloadedInputs | None) -> int:
    """Bytes in use when every copy has arrived and been let go."""
    torch.cuda.synchronize()
    assert offloaded is not None
    offloaded._leaving.clear()
    return torch.cuda.memory_allocated()
