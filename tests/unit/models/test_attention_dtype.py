"""What packed attention computes in under autocast, whatever dtype the model is stored in."""

from __future__ import annotations

import pytest
import torch

from fine_tune.models.attention import packed_attention
from fine_tune.packing.segments import Segments


def attended(dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 9, 8).to(dtype) for heads in (4, 2, 2))
    out, _ = packed_attention(torch.nn.Identity(), q, k, v, None, segments=Segments.of([5, 4]))
    return out


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_autocast_decides_for_a_model_stored_in_float32(stored: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = attended(stored)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), attended(torch.float32), rtol=0.03, atol=0.03)


def test_without_autocast_nothing_is_cast() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert attended(dtype).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert attended(torch.float64).dtype == torch.float64
