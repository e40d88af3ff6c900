"""Rows that several sequences share: plain indexing, and a gradient that adds up every use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fine_tune.kernels.shared_rows import gather_rows
from fine_tune.packing.segments import Segments, Span

LAYOUTS = {
    "once": [Span(0, 3), Span(3, 2)],
    "twice": [Span(0, 5), Span(5, 2, 0, 3)],
    "thrice": [Span(0, 4), Span(4, 2, 0, 3), Span(6, 1, 0, 2), Span(7, 2)],
}


def indices(name: str) -> tuple[Tensor, Tensor]:
    """Which rows, and where each of them went."""
    segments = Segments.from_spans(LAYOUTS[name])
    if segments.key_index is None or segments.key_uses is None:
        tokens = torch.arange(sum(segments.lengths))
        return tokens, tokens[None]
    return segments.key_index, segments.key_uses


def rows(index: Tensor, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(int(index.max()) + 1, *shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize(("name", "uses"), [("once", 1), ("twice", 2), ("thrice", 3)])
def test_it_is_indexing_and_its_gradient_adds_up_every_use(name: str, uses: int, shape: tuple[int, ...]) -> None:
    index, places = indices(name)
    assert len(places) == uses
    x = rows(index, *shape)
    found = gather_rows(x, index, places)
    assert torch.equal(found, x[index])
    slopes = torch.linspace(-1, 2, found.numel(), dtype=torch.float64).view(found.shape)
    (gradient,) = torch.autograd.grad(found, x, slopes)
    torch.testing.assert_close(gradient, torch.zeros_like(x).index_add(0, index, slopes), rtol=0, atol=1e-15)
    if uses > 1:
        (partial,) = torch.autograd.grad(gather_rows(x, index, places[:1]), x, slopes)
        assert (partial - gradient).abs().max() > 0.1, "the control: a use that is left out is missed"


def test_finite_differences_agree() -> None:
    index, places = indices("thrice")
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, index, places), (rows(index, 2),))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_operation_keeps_torchs_rules() -> None:
    index, places = indices("thrice")
    torch.library.opcheck(torch.ops.fine_tune.gather_rows.default, (rows(index, 2), index, places))
