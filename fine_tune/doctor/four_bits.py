"""Whether bitsandbytes computes what it should: NF4 and its products against float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fine_tune.doctor.finding import Finding

# Dettmers et al. 2023, arXiv:2305.14314, appendix E: the sixteen values of NF4.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
ROWS, COLUMNS, BLOCK = 96, 256, 64
# Of the largest value in a block: the codebook itself is exact to float32.
QUANTISED = 1e-6
# Of the largest value of a product of 256 terms, by what it is computed in.
PRODUCT = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def four_bit_finding(device: torch.device, dtype: torch.dtype) -> Finding:
    """Quantise a weight, take it back, multiply forward and backward, and compare each with float64.

    Args:
        device: Where.
        dtype: What products are computed in.
    """
    name = f"4 bits, {device.type}"
    try:
        errors = measure(device, dtype)
    except Exception as error:
        # Whatever a native library throws is the finding.
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return Finding(
            name, "broken", f"bitsandbytes fails here, so method=qlora does: {said}", {"device": str(device)}
        )
    bounds = {"nf4": QUANTISED, "forward": PRODUCT[dtype], "backward": PRODUCT[dtype]}
    over = [kind for kind, bound in bounds.items() if not errors[kind] <= bound]
    figures = ", ".join(f"{kind} {errors[kind]:.1e} (at most {bound:.0e})" for kind, bound in bounds.items())
    values = {"device": str(device), "errors": errors, "bounds": bounds}
    if over:
        return Finding(
            name, "broken", f"bitsandbytes computes something else than NF4: {figures}. Use method=lora.", values
        )
    return Finding(name, "ok", f"off float64 in {str(dtype).removeprefix('torch.')}: {figures}.", values)


def measure(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return the largest errors: of NF4 over a block's largest value, of products over their largest value."""
    from bitsandbytes import functional as bits

    generator = torch.Generator().manual_seed(0)
    weight, given, back = (torch.randn(s, generator=generator) for s in ((ROWS, COLUMNS), (16, COLUMNS), (16, ROWS)))
    packed, state = bits.quantize_4bit(weight.to(device), blocksize=BLOCK, quant_type="nf4")
    restored = bits.dequantize_4bit(packed, state).cpu().double()
    layer = _layer(weight, device, dtype)
    held = bits.dequantize_4bit(layer.weight.data, layer.weight.quant_state).cpu().double()
    inputs = given.to(device, dtype, copy=True).requires_grad_()
    with torch.no_grad():
        # Evaluated before it trains, as in a run: on some CPUs bitsandbytes repacks the weight here.
        layer.eval()(inputs)
    said = layer.train()(inputs)
    said.backward(back.to(device, dtype))
    assert inputs.grad is not None
    exact = given.to(dtype).double(), back.to(dtype).double()
    return {
        "nf4": _nf4_error(weight.double(), restored),
        "forward": _relative(said, exact[0] @ held.T),
        "backward": _relative(inputs.grad, exact[1] @ held),
    }


def _layer(weight: Tensor, device: torch.device, dtype: torch.dtype) -> Any:
    # Untyped and not exported by name.
    import bitsandbytes

    layers: Any = bitsandbytes.nn
    layer = layers.Linear4bit(COLUMNS, ROWS, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = layers.Params4bit(weight.clone(), requires_grad=False, compress_statistics=True, quant_type="nf4")
    layer = layer.to(device)
    # As every base here is loaded.
    layer.support_avx512bf16_for_cpu = False
    return layer


def _nf4_error(weight: Tensor, restored: Tensor) -> float:
    """Compare with each value's nearest one of the codebook, times the largest of its block."""
    blocks = weight.reshape(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    codebook = torch.tensor(NF4, dtype=torch.float64)
    nearest = codebook[(blocks / largest)[..., None].sub(codebook).abs().argmin(-1)]
    return float(((restored.reshape(-1, BLOCK) - nearest * largest) / largest).abs().max())


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().cpu().double() - exact).abs().max() / exact.abs().max())
