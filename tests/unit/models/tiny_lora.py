"""Two adapted layers, dense or in 4 bits, and all that comes out of them."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fine_tune.models.adapter import trainable

from .conftest import randomize


class Tiny(nn.Module):
    """Two layers, one of them with a bias, dense in float64 or in 4 bits."""

    def __init__(self, *, quantised: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        if quantised:
            self.up, self.down = in_4_bits(self.up), in_4_bits(self.down)
            # As transformers tells PEFT.
            self.is_loaded_in_4bit = True
        else:
            self.double()

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.down(self.up(x, **options).tanh(), **options)  # type: ignore[no-any-return]


def in_4_bits(layer: nn.Linear) -> Any:
    bias = layer.bias is not None
    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=bias, compute_dtype=torch.float32, quant_type="nf4"
    )
    made.load_state_dict(layer.state_dict())
    made.support_avx512bf16_for_cpu = False
    return made.to("cpu")


X = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def adapted(*, quantised: bool = False, **options: Any) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["up", "down"]} | options
    model: Any = get_peft_model(Tiny(quantised=quantised), LoraConfig(**settings))  # type: ignore[arg-type]
    model.train().to(torch.float32 if quantised else torch.float64)
    randomize(model)
    return model  # type: ignore[no-any-return]


def results(model: nn.Module, **options: Any) -> list[Tensor]:
    """Output and gradients, the input's among them; dropout draws the same in every call."""
    dtype = next(iter(trainable(model).values()), X).dtype
    x = X.to(dtype, copy=True).requires_grad_()
    model.zero_grad()
    torch.manual_seed(9)
    y = model(x, **options)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    slopes = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [y.detach(), *([] if x.grad is None else [x.grad]), *slopes]


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    pairs = list(zip(left, right, strict=True))
    return max(((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs)
