"""A packed micro-batch taken apart again, and divided in two where it does not fit."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from fine_tune.packing.batches import MicroBatch, Sample, pack


def unpack(micro: MicroBatch) -> list[Sample]:
    """Return the samples that :func:`~fine_tune.packing.batches.pack` was given."""
    positions = micro.position_ids[0].cpu().numpy()
    ids, rows = micro.input_ids[0].cpu().numpy(), micro.rows.cpu().numpy()
    starts = [*np.flatnonzero(positions == 0).tolist(), len(ids)]
    branched = [span for span in micro.segments.spans if span.shared]
    counts = iter(micro.completion_tokens.tolist())
    samples, used = [], 0
    for start, end in pairwise(starts):
        others = [span for span in branched if start <= span.start < end]
        branches = (others[0].shared, *(span.start - start for span in others)) if others else ()
        mask = np.zeros(end - start, dtype=bool)
        bounds = [*branches, end - start] if branches else [0, end - start]
        for first, last in pairwise(bounds):
            # What predicts a token is the one before it; for a branch's first token the last one of the prefix.
            before = np.arange(start + first - 1, start + last - 1)
            before[0] = start + branches[0] - 1 if branches else before[0]
            count = next(counts)
            mask[first:last] = np.isin(before, rows[used : used + count])
            used += count
        samples.append(Sample(ids[start:end], mask, branches))
    return samples


def halves(micro: MicroBatch) -> list[MicroBatch]:
    """Divide a micro-batch into two of about equal tokens, in the order of its samples; one sample stays whole."""
    if len(micro.samples) < 2:
        return [micro]
    samples = unpack(micro)
    ends = np.cumsum([len(sample.input_ids) for sample in samples])
    middle = min(max(1, int(np.searchsorted(ends, ends[-1] / 2, side="left")) + 1), len(samples) - 1)
    device = micro.input_ids.device
    return [
        pack(samples[first:last], micro.samples[first:last]).to(device)
        for first, last in ((0, middle), (middle, len(samples)))
    ]


def at_most(micros: list[MicroBatch], tokens: int | None) -> list[MicroBatch]:
    """Divide micro-batches until none has more than ``tokens``, but for single samples; None leaves them as they are."""
    if tokens is None:
        return micros
    found = []
    for micro in micros:
        parts = halves(micro) if micro.num_tokens > tokens else [micro]
        found += at_most(parts, tokens) if len(parts) > 1 else parts
    return found
