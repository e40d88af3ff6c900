from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fine_tune.evaluation.blocked_attention import BLOCK_QUERIES, MAX_WIDENED_KEYS, Places, blocked_attention

LAYERS = 3


def layer(index: int = 0) -> nn.Module:
    module = nn.Module()
    module.layer_idx = index  # type: ignore[assignment]
    module.config = SimpleNamespace(num_hidden_layers=LAYERS)  # type: ignore[assignment]
    return module


def heads(
    length: int, keys: int, *, width: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows, four query heads on two key heads."""
    generator = torch.Generator().manual_seed(length + keys)
    shapes = ((2, 4, length, width), (2, 2, keys, width), (2, 2, keys, width))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def by_hand(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None) -> Tensor:
    """Every pair, every head, with a full table of scores."""
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = q @ k.transpose(2, 3) * scale
    behind = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])
    hidden = (behind < 0) | (behind >= (window or k.shape[2]))
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, *, index: int = 0, **options: Any) -> Tensor:
    return blocked_attention(layer(index), q, k, v, None, **options)[0]


@pytest.mark.parametrize("length", [1, BLOCK_QUERIES - 1, BLOCK_QUERIES, 2 * BLOCK_QUERIES + 5])
@pytest.mark.parametrize("past", [0, 1, 90])
@pytest.mark.parametrize("window", [None, 7, 100])
def test_blocks_equal_the_full_table(length: int, past: int, window: int | None) -> None:
    q, k, v = heads(length, past + length)
    found = attend(q, k, v, scaling=0.3, sliding_window=window)
    assert found.shape == (2, length, 4, 8)
    torch.testing.assert_close(found, by_hand(q, k, v, scale=0.3, window=window), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("width", "keys"), [(4, 80), (16, 80), (24, 80), (8, MAX_WIDENED_KEYS), (8, MAX_WIDENED_KEYS + 1)]
)
def test_the_scale_is_of_the_true_width(width: int, keys: int) -> None:
    q, k, v = heads(70, keys, width=width)
    torch.testing.assert_close(attend(q, k, v), by_hand(q, k, v, scale=width**-0.5), rtol=0, atol=1e-12)
    # Control: heads are widened with zeros, and their width is no scale.
    assert (attend(q, k, v) - by_hand(q, k, v, scale=(width + 8) ** -0.5)).abs().max() > 1e-4


@pytest.mark.parametrize("window", [None, 7])
def test_the_last_layer_gives_what_is_read_and_zeros(window: int | None) -> None:
    q, k, v = heads(75, 95)
    places = Places(torch.tensor([0, 0, 1]), torch.tensor([74, 3, 40]))
    whole = by_hand(q, k, v, scale=8**-0.5, window=window)
    found = attend(q, k, v, index=LAYERS - 1, places=places, sliding_window=window)
    torch.testing.assert_close(found[places], whole[places], rtol=0, atol=1e-12)
    read = torch.zeros(2, 75, dtype=torch.bool)
    read[places] = True
    assert found[~read].abs().max() == 0
    # Every other layer is read by the next one, everywhere.
    torch.testing.assert_close(attend(q, k, v, places=places, sliding_window=window), whole, rtol=0, atol=1e-12)


def test_values_say_what_is_computed_in() -> None:
    q, k, v = heads(70, 70)
    found = attend(q, k, v.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), by_hand(q, k, v, scale=8**-0.5), rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_what_is_not_computed_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"\({name}\), which blocked attention does not compute"):
        attend(*heads(3, 3), **{name: torch.ones(1)})


def test_a_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="takes no attention mask"):
        blocked_attention(layer(), *heads(3, 3), attention_mask=torch.ones(3, 3))
