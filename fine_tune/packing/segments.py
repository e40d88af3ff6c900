"""Where each sequence of a packed micro-batch begins and ends, and which prefix it shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """One causal sequence: ``length`` tokens from ``start`` on, continuing ``shared`` tokens that lie at ``origin``."""

    start: int
    length: int
    origin: int = 0
    shared: int = 0

    @property
    def keys(self) -> int:
        """Tokens that its last query sees."""
        return self.shared + self.length

    @property
    def attended(self) -> int:
        """Query-key pairs of causal attention over its own queries."""
        return self.length * self.shared + self.length * (self.length + 1) // 2


class Bucket(NamedTuple):
    """Sequences of similar length as rows of one table.

    ``gather [n, width]`` holds token positions (0 in the padding), ``slots`` the flat table cells whose result is
    wanted, and ``tokens`` the position each of those cells belongs to. A shared prefix is computed in every row that
    continues it and its result is taken from the row that owns it.
    """

    gather: Tensor
    slots: Tensor
    tokens: Tensor


@dataclass
class Segments:
    """Where each packed sequence begins and ends.

    A query sees the keys of its own sequence up to its own position, the shared prefix included.

    Attributes:
        cu_seqlens: ``[S + 1]`` int32 on the data's device, ends of the queries of each sequence.
        spans: The same as Python ints, with what each sequence continues, so that nothing on the way asks the device.
        cu_keys: ``[S + 1]`` int32, ends of the keys of each sequence; ``cu_seqlens`` itself where nothing is shared.
        key_index: ``[K]`` int64, token position of each key; None where nothing is shared.
        key_uses: ``[M, T]`` int64, the other way round: which keys are of each token, at most M of them; K stands for none.
        max_len: Own tokens of the longest sequence.
        max_keys: Tokens of the longest sequence, its shared prefix included.
        bounds: The same two as powers of two: kernels only size their grid by them, and a compiled layer is then made
            anew for few values.
    """

    cu_seqlens: Tensor
    spans: tuple[Span, ...]
    cu_keys: Tensor
    key_index: Tensor | None = None
    key_uses: Tensor | None = None
    max_len: int = field(init=False)
    max_keys: int = field(init=False)
    bounds: tuple[int, int] = field(init=False)
    _buckets: list[Bucket] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Read the longest sequences off the spans."""
        self.max_len = max(span.length for span in self.spans)
        self.max_keys = max(span.keys for span in self.spans)
        self.bounds = (_power_of_two(self.max_len), _power_of_two(self.max_keys))

    @classmethod
    def of(cls, lengths: list[int] | tuple[int, ...]) -> Segments:
        """Lay sequences of the given lengths end to end; they share nothing."""
        starts = accumulate(lengths, initial=0)
        return cls.from_spans([Span(start, length) for start, length in zip(starts, lengths, strict=False)])

    @classmethod
    def from_spans(cls, spans: list[Span]) -> Segments:
        """Index sequences whose own tokens lie end to end; a prefix must come before what continues it."""
        ends = _ends([span.length for span in spans])
        if not any(span.shared for span in spans):
            return cls(ends, tuple(spans), ends)
        keys = torch.cat(
            [torch.arange(a, a + n) for s in spans for a, n in ((s.origin, s.shared), (s.start, s.length))]
        )
        return cls(ends, tuple(spans), _ends([span.keys for span in spans]), keys, _uses(keys))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Own tokens of each sequence; they add up to the tokens of the micro-batch."""
        return tuple(span.length for span in self.spans)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        """Move the boundaries; buckets are rebuilt there when first needed."""
        return self._moved(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Segments:
        """Pin every tensor, so that copies to the device overlap with work."""
        return self._moved(lambda part: part.pin_memory())

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Segments:
        queries = move(self.cu_seqlens)
        if self.key_index is None or self.key_uses is None:
            return Segments(queries, self.spans, queries)
        return Segments(queries, self.spans, move(self.cu_keys), move(self.key_index), move(self.key_uses))

    def buckets(self) -> list[Bucket]:
        """Group sequences of similar length, so that one batched attention serves a group with under half wasted."""
        if self._buckets is None:
            self._buckets = _bucket(self.spans, self.cu_seqlens.device)
        return self._buckets


def _power_of_two(length: int) -> int:
    return 1 << max(7, (length - 1).bit_length())


def _ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _uses(keys: Tensor) -> Tensor:
    """Turn "which token is each key" round; every token is a key of its own sequence."""
    order = torch.argsort(keys, stable=True)
    counts = torch.bincount(keys)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    uses = torch.full((int(counts.max()), len(counts)), len(keys))
    uses[torch.arange(len(keys)) - first, keys[order]] = order
    return uses


def _bucket(spans: tuple[Span, ...], device: torch.device) -> list[Bucket]:
    groups: dict[tuple[int, int], list[Span]] = {}
    for span in spans:
        if span.length:
            groups.setdefault(_size_class(span.keys, device), []).append(span)
    return [_bucket_of(members, device) for members in groups.values()]


def _size_class(length: int, device: torch.device) -> tuple[int, int]:
    """Put lengths that may share a table into one class: those up to the same power of two, and on a CPU up to the same eighth.

    A GPU wants few launches; on a CPU a launch costs little and every padded cell is computed in earnest.
    """
    bits = (length - 1).bit_length()
    return bits, (length - 1) >> max(0, bits - 3) if device.type == "cpu" else 0


def _bucket_of(spans: list[Span], device: torch.device) -> Bucket:
    start, length, origin, shared = (torch.tensor(column)[:, None] for column in zip(*spans, strict=True))
    offsets = torch.arange(int((shared + length).max()))[None, :]
    valid = offsets < shared + length
    own = valid & (offsets >= shared)
    gather = torch.where(offsets < shared, origin + offsets, start + offsets - shared) * valid
    return Bucket(gather.to(device), own.flatten().nonzero().squeeze(1).to(device), gather[own].to(device))
