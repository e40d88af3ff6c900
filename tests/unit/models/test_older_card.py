"""An fp16 step as a card before Ampere takes it: no bfloat16 anywhere, no kernel of newer cards; as far as a CPU shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fine_tune.kernels import capability
from fine_tune.kernels.capability import is_ampere, use_at_most
from fine_tune.kernels.frozen_weight import _triton_serves
from fine_tune.losses.sft import sft_loss
from fine_tune.models import attention
from fine_tune.models.adapter import AdapterSpec, attach, trainable
from fine_tune.models.execution import Execution, prepare_layers
from fine_tune.models.forward import supervised_logps
from fine_tune.modules.optim import OptimSpec, build_optimizer, clip_grad_norm
from fine_tune.packing.batches import pack
from tests.reference.conftest import random_rows
from tests.reference.families import family
from tests.reference.older_card import NewerOperation, OlderCard

HALF, BRAIN = torch.float16, torch.bfloat16
SPEC = OptimSpec(torch.optim.AdamW, lr=1e-3)


@pytest.fixture(autouse=True)
def as_sm75() -> Iterator[None]:
    use_at_most((7, 5))
    yield
    use_at_most(None)


def adapted(kind: str, stored: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    network = attach(family(kind, tied=False, dtype=stored), AdapterSpec("adapter", rank=4, alpha=8))  # type: ignore[arg-type]
    return network.train()


def steps(network: nn.Module, compute: torch.dtype, *, count: int = 3) -> list[float]:
    """Whole optimizer steps under a loss scaler, as the trainer runs them; their losses."""
    named = list(trainable(network).items())
    optimizer = build_optimizer(SPEC, named, scaled=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    micro, losses = pack(random_rows()), []
    for _ in range(count):
        with torch.autocast("cpu", compute):
            loss = sft_loss(supervised_logps(network, micro, chunk_tokens=16), num_step_tokens=len(micro.targets))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm([p for _, p in named], SPEC.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("recompute", "kind"),
    [
        pytest.param(recompute, kind, marks=pytest.mark.drill if kind in ("mistral", "qwen25") else ())
        for recompute in ("none", "full")
        for kind in ("llama3", "phi2", "mistral", "qwen25")
    ],
)
def test_a_step_in_fp16_has_nothing_that_is_newer(kind: str, recompute: Any) -> None:
    network = adapted(kind, HALF)
    prepare_layers(network, Execution(recompute))
    with OlderCard() as audit:
        losses = steps(network, HALF)
    assert losses[0] > losses[1] > losses[2], "and it learns"
    assert audit.dtypes <= {HALF, torch.float32, torch.float64}
    assert HALF in audit.dtypes
    assert any("softmax" in name for name in audit.seen), "torch's own attention ran"
    assert not any(name.startswith("fine_tune") for name in audit.seen), "no operation of ours stands in the way"
    assert not any("fused_adam" in name for name in audit.seen)


@pytest.mark.parametrize(("stored", "compute"), [(BRAIN, HALF), (HALF, BRAIN), (torch.float32, BRAIN)])
def test_the_audit_sees_bfloat16(stored: torch.dtype, compute: torch.dtype) -> None:
    network = adapted("llama3", stored)
    with OlderCard(), pytest.raises(NewerOperation, match="bfloat16 tensor"):
        steps(network, compute, count=1)


def test_the_audit_sees_bfloat16_that_is_only_in_the_backward_pass() -> None:
    class Slips(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return grad.bfloat16().float()

    x = torch.ones(3, requires_grad=True)
    with OlderCard():
        loss = Slips.apply(x).sum()  # type: ignore[no-untyped-call]
        with pytest.raises(NewerOperation):
            loss.backward()


def test_the_audit_sees_kernels_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.ones(1, 1, 4, 8)
    monkeypatch.setattr("tests.reference.older_card.NEWER", ("_scaled_dot_product_flash_attention_for_cpu",))
    torch.backends.cuda.enable_flash_sdp(True)
    with OlderCard(), pytest.raises(NewerOperation, match="needs a newer card"):
        nn.functional.scaled_dot_product_attention(q, q, q)


class Card:
    """A tensor as functions that choose kernels see it on a GPU."""

    is_cuda, dtype, shape, device = True, HALF, (64, 64), torch.device("cuda", 0)


@pytest.mark.parametrize(("most", "newer"), [((7, 5), False), (None, True), ((8, 0), True)])
def test_what_is_used_of_a_newer_card(most: Any, newer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("fine_tune.kernels.frozen_weight.has_triton", lambda: True)
    use_at_most(most)
    value: Any = Card()
    assert is_ampere(value.device) is newer
    assert attention.has_varlen(value) is newer
    assert _triton_serves(value, 64) is newer
    assert capability.is_limited() is not newer


def test_an_old_card_is_old_whatever_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    use_at_most(None)
    asked: Callable[[Any], tuple[int, int]] = lambda device: (7, 5)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_capability", asked)
    value: Any = Card()
    assert not is_ampere(value.device)
    assert not attention.has_varlen(value)
