"""Where sequences lie and what they continue: indices by hand, and tables that cover every token once."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fine_tune.packing.segments import Segments, Span, _size_class

PLAIN = settings(max_examples=25, deadline=None, derandomize=True)


def by_hand() -> Segments:
    """A prompt of 3 with answers of 2 and 1, a plain sequence of 2, a prompt of 1 with answers of 1, 2 and 1."""
    return Segments.from_spans(
        [Span(0, 5), Span(5, 1, 0, 3), Span(6, 2), Span(8, 2), Span(10, 2, 8, 1), Span(12, 1, 8, 1)]
    )


def test_keys_are_the_shared_prefix_and_then_the_own_tokens() -> None:
    segments = by_hand()
    assert segments.cu_seqlens.tolist() == [0, 5, 6, 8, 10, 12, 13]
    assert segments.cu_keys.tolist() == [0, 5, 9, 11, 13, 16, 18]
    assert segments.key_index is not None
    assert segments.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 8, 10, 11, 8, 12]
    assert segments.key_uses is not None
    none = len(segments.key_index)
    assert segments.key_uses.tolist() == [
        [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 14, 15, 17],
        [5, 6, 7, none, none, none, none, none, 13, none, none, none, none],
        [none] * 8 + [16] + [none] * 4,
    ]
    assert segments.lengths == (5, 1, 2, 2, 2, 1)
    assert (segments.max_len, segments.max_keys) == (5, 5)
    assert {t.dtype for t in (segments.cu_seqlens, segments.cu_keys)} == {torch.int32}
    assert segments.key_index.dtype == torch.int64


def test_sequences_that_share_nothing_need_no_index() -> None:
    segments = Segments.of([4, 2])
    assert segments.key_index is None
    assert segments.key_uses is None
    assert segments.cu_keys is segments.cu_seqlens
    assert segments.spans == (Span(0, 4), Span(4, 2))


def test_the_longest_keys_may_belong_to_a_short_sequence() -> None:
    segments = Segments.from_spans([Span(0, 40), Span(40, 3, 0, 39)])
    assert (segments.max_len, segments.max_keys) == (40, 42)


def test_a_span_counts_the_pairs_that_attention_computes() -> None:
    assert Span(0, 3).attended == 1 + 2 + 3
    assert Span(9, 3, 0, 4).attended == 5 + 6 + 7
    assert Span(9, 3, 0, 4).keys == 7


@pytest.mark.parametrize(
    ("spans", "bounds"),
    [
        ([Span(0, 1)], (128, 128)),
        ([Span(0, 128)], (128, 128)),
        ([Span(0, 129)], (256, 256)),
        ([Span(0, 512), Span(512, 1, 0, 512)], (512, 1024)),
        ([Span(0, 4096)], (4096, 4096)),
    ],
)
def test_bounds_are_powers_of_two_that_hold_the_longest(spans: list[Span], bounds: tuple[int, int]) -> None:
    """A compiled layer is made anew for each of them, so there are few."""
    assert Segments.from_spans(spans).bounds == bounds


def test_everything_moves() -> None:
    moved = by_hand().to("meta")
    assert moved.key_index is not None
    assert moved.key_uses is not None
    parts = (moved.cu_seqlens, moved.cu_keys, moved.key_index, moved.key_uses)
    assert {t.device.type for t in parts} == {"meta"}
    assert moved.spans == by_hand().spans
    plain = Segments.of([3]).to("meta")
    assert plain.cu_keys is plain.cu_seqlens
    assert plain.key_index is None


@st.composite
def layouts(draw: st.DrawFn) -> list[Span]:
    """Plain sequences, and prefixes with one to four completions."""
    spans: list[Span] = []
    start = 0
    for prefix in draw(st.lists(st.integers(0, 20), min_size=1, max_size=5)):
        origin = start
        for branch, length in enumerate(draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))):
            first = branch == 0 or not prefix
            spans.append(Span(start, length + prefix) if first else Span(start, length, origin, prefix))
            start += spans[-1].length
    return spans


@PLAIN
@given(spans=layouts())
def test_each_row_of_a_table_is_one_sequence_with_its_prefix_before_it(spans: list[Span]) -> None:
    segments = Segments.from_spans(spans)
    wanted = {span.start: [*range(span.origin, span.origin + span.shared), *range(span.start, span.start + span.length)]
              for span in spans}  # fmt: skip
    seen: list[int] = []
    for gather, slots, tokens in segments.buckets():
        assert torch.equal(gather.flatten()[slots], tokens)
        width = gather.shape[1]
        real = 0
        for row, cells in enumerate(gather.tolist()):
            mine = slots[slots // width == row] - row * width
            own = gather[row, mine].tolist()
            keys = wanted.pop(own[0])
            assert cells == keys + [0] * (width - len(keys)), "the prefix, the own tokens, and nothing else"
            assert mine.tolist() == list(range(len(keys) - len(own), len(keys))), "results of own tokens only"
            real += len(keys)
        assert real > gather.numel() / 2
        seen += tokens.tolist()
    assert not wanted, "no sequence is left out"
    assert sorted(seen) == list(range(sum(span.length for span in spans)))


@PLAIN
@given(spans=layouts())
def test_the_index_of_keys_is_what_the_tables_hold(spans: list[Span]) -> None:
    """The fused kernel reads the one, the plain one the other."""
    segments = Segments.from_spans(spans)
    index = torch.arange(sum(segments.lengths)) if segments.key_index is None else segments.key_index
    ends = segments.cu_keys.tolist()
    rows = {tuple(index[a:b].tolist()) for a, b in pairwise(ends)}
    held = set()
    for gather, _, _tokens in segments.buckets():
        held |= {
            tuple(cells[: int(width)]) for cells, width in zip(gather.tolist(), _widths(segments, gather), strict=True)
        }
    assert rows == held


@PLAIN
@given(spans=layouts())
def test_uses_are_the_index_turned_round(spans: list[Span]) -> None:
    segments = Segments.from_spans(spans)
    if segments.key_index is None or segments.key_uses is None:
        assert not any(span.shared for span in spans)
        return
    keys = segments.key_index.tolist()
    for token, places in enumerate(segments.key_uses.t().tolist()):
        real = [place for place in places if place < len(keys)]
        assert real == [place for place, of in enumerate(keys) if of == token], "all of them, in order, each once"
        assert places == real + [len(keys)] * (len(places) - len(real)), "what is left stands for none"
        assert real, "every token is a key of its own sequence"
    assert (segments.key_uses[-1] < len(keys)).any(), "no more rows than the most used token needs"


def _widths(segments: Segments, gather: torch.Tensor) -> torch.Tensor:
    """Keys of each row: the last token of a sequence is in no other row, and names it."""
    last = {span.start + span.length - 1: span.keys for span in segments.spans}
    return torch.tensor([[last[max(row)]] for row in gather.tolist()])


def test_tables_on_a_cpu_are_at_most_a_quarter_wider_than_their_rows() -> None:
    lengths = [1, 3, 5, 9, 100, 128, 129, 160, 161, 250, 256, 257, 510]
    wide = {}
    for gather, slots, _tokens in Segments.of(lengths).buckets():
        width = gather.shape[1]
        for row in range(len(gather)):
            wide[int(((slots // width) == row).sum())] = width
    assert sorted(wide) == lengths
    assert all(width <= 1.25 * length for length, width in wide.items())
    assert (wide[129], wide[161], wide[250]) == (160, 161, 256)


def test_a_gpu_gets_one_table_per_power_of_two() -> None:
    gpu = torch.device("cuda")
    assert _size_class(129, gpu) == _size_class(256, gpu) != _size_class(257, gpu)
