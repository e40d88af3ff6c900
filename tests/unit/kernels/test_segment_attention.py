"""Attention over segments as one operation: the plain masked softmax, whatever is shared, grouped or windowed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fine_tune.kernels.segment_attention import segment_attention
from fine_tune.models.attention import _bucketed
from fine_tune.packing.segments import Segments, Span

LAYOUTS = {
    "plain": Segments.of([5, 1, 7]),
    "one": Segments.of([6]),
    "empty": Segments.of([3, 0, 4]),
    "shared": Segments.from_spans([Span(0, 6), Span(6, 3, 0, 4), Span(9, 1), Span(10, 4), Span(14, 2, 10, 3)]),
    "thrice": Segments.from_spans([Span(0, 4), Span(4, 2, 0, 3), Span(6, 3, 0, 3)]),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
SCALE = 0.4


def heads(segments: Segments, queries: int, keys: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    tokens = sum(segments.lengths)
    shapes = [(tokens, number, 6) for number in (queries, keys, keys)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return tuple(tensor.requires_grad_() for tensor in made)


def visible(segments: Segments, window: int) -> Tensor:
    """Which token sees which, from the definition."""
    seen = torch.zeros(sum(segments.lengths), sum(segments.lengths), dtype=torch.bool)
    for span in segments.spans:
        row = [*range(span.origin, span.origin + span.shared), *range(span.start, span.start + span.length)]
        for place in range(span.shared, len(row)):
            first = max(0, place - window + 1) if window else 0
            seen[row[place], row[first : place + 1]] = True
    return seen


def masked(q: Tensor, k: Tensor, v: Tensor, segments: Segments, window: int = 0) -> Tensor:
    """Softmax over all tokens with everything else hidden."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
    weights = scores.masked_fill(~visible(segments, window), -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def ours(q: Tensor, k: Tensor, v: Tensor, segments: Segments, window: int = 0) -> Tensor:
    found: Tensor = segment_attention(q, k, v, segments.cu_seqlens, segments.cu_keys, segments.key_index, SCALE, window)
    return found


def with_slopes(out: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    shares = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return (out.detach(), *torch.autograd.grad((out * shares).sum(), inputs))


def close(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    for found, expected in zip(left, right, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@each_layout
@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("window", [0, 3], ids=["all", "window"])
def test_values_and_gradients_are_those_of_a_masked_softmax(layout: str, queries: int, keys: int, window: int) -> None:
    segments = LAYOUTS[layout]
    inputs = heads(segments, queries, keys)
    found = with_slopes(ours(*inputs, segments, window), inputs)
    close(found, with_slopes(masked(*inputs, segments, window), inputs))
    bucketed = _bucketed(*inputs, segments=segments, scale=SCALE, window=window or None)
    close(found, with_slopes(bucketed, inputs))


@each_layout
def test_a_window_that_hides_something_is_another_result(layout: str) -> None:
    segments = LAYOUTS[layout]
    inputs = heads(segments, 4, 2)
    assert (ours(*inputs, segments, 3) - ours(*inputs, segments)).abs().max() > 0.01
    assert torch.equal(ours(*inputs, segments, segments.max_keys), ours(*inputs, segments))


def test_no_segment_sees_another_and_joined_ones_are_told_apart() -> None:
    segments, joined = Segments.of([5, 4]), Segments.of([9])
    q, k, v = (tensor.detach() for tensor in heads(segments, 2, 2))
    before = ours(q, k, v, segments)
    changed = [torch.cat([tensor[:5] + 1, tensor[5:]]) for tensor in (k, v)]
    assert torch.equal(ours(q, *changed, segments)[5:], before[5:]), "bit for bit"
    assert (ours(q, *changed, joined)[5:] - before[5:]).abs().max() > 0.1
    assert (ours(q, k, v, joined) - masked(q, k, v, segments)).abs().max() > 0.1


def test_completions_of_one_prompt_see_it_and_not_each_other() -> None:
    segments = LAYOUTS["shared"]
    q, k, v = (tensor.detach() for tensor in heads(segments, 2, 2))
    before = ours(q, k, v, segments)

    def moved(token: int) -> list[int]:
        changed = v.clone()
        changed[token] += 1
        rows: list[int] = (ours(q, k, changed, segments) != before).flatten(1).any(1).nonzero().flatten().tolist()
        return rows

    assert moved(0) == [0, 1, 2, 3, 4, 5, 6, 7, 8], "a token of the prompt"
    assert moved(5) == [5], "the end of the first completion"
    assert moved(6) == [6, 7, 8]
    assert moved(9) == [9]


def test_half_precision_is_rounded_once_at_the_end() -> None:
    segments = LAYOUTS["shared"]
    inputs = heads(segments, 4, 2, torch.bfloat16)
    wide = tuple(tensor.detach().float().requires_grad_() for tensor in inputs)
    found = with_slopes(ours(*inputs, segments), inputs)
    assert {tensor.dtype for tensor in found} == {torch.bfloat16}
    assert torch.equal(found[0], ours(*wide, segments).bfloat16())
    # The slopes that come in are rounded as well.
    shares = torch.linspace(-1, 2, found[0].numel(), dtype=torch.bfloat16).view(found[0].shape).float()
    slopes = torch.autograd.grad((ours(*wide, segments) * shares).sum(), wide)
    assert all(torch.equal(one, other.bfloat16()) for one, other in zip(found[1:], slopes, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("layout", ["plain", "shared"])
def test_the_operation_keeps_torchs_rules(layout: str) -> None:
    segments = LAYOUTS[layout]
    ends = (segments.cu_seqlens, segments.cu_keys.clone(), segments.key_index)
    inputs = heads(segments, 4, 2, torch.float32)
    torch.library.opcheck(torch.ops.fine_tune.segment_attention.default, (*inputs, *ends, SCALE, 0))
    bare = [tensor.detach() for tensor in inputs]
    backward = torch.ops.fine_tune.segment_attention_backward.default
    torch.library.opcheck(backward, (torch.ones_like(bare[0]), *bare, *ends, SCALE, 0))


def test_results_lie_token_by_token_whatever_the_queries_do() -> None:
    """A compiled graph goes by the layout that was promised; Phi's queries lie head by head, as parts of heads are rotated."""
    segments = LAYOUTS["plain"]
    inputs = heads(segments, 4, 4)
    strided = tuple(x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in inputs)
    assert not strided[0].is_contiguous()
    found = ours(*strided, segments)
    assert found.is_contiguous()
    assert torch.equal(found, ours(*inputs, segments))
    parts = (segments.cu_seqlens, segments.cu_keys, segments.key_index, SCALE, 0)
    torch.library.opcheck(segment_attention, (*strided, *parts), test_utils=("test_schema", "test_faketensor"))
