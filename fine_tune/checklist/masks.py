"""Whether what is learned of some rows are answers: each behind its header, each with its end of turn; one is shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import numpy as np

from fine_tune.checklist.item import Item
from fine_tune.packing.batches import Sample
from fine_tune.text.conversation import Message
from fine_tune.text.encode import Encoder
from fine_tune.text.template import ChatTemplate
from fine_tune.text.tokenizer import unknown_ids

# Two questions that share no word: what their prompts end in alike is the template's.
PROBES = ("Name a bird.", "7 + 8 = ?")
# Characters of an example.
SHOWN = 60


class Stretch(NamedTuple):
    """A stretch of learned tokens: what stands before it, and itself."""

    before: np.ndarray
    learned: np.ndarray


def stretches(sample: Sample) -> Iterator[Stretch]:
    """Yield every run of learned tokens of a row; each side of a pair follows the prompt they share."""
    ids, mask = np.asarray(sample.input_ids), np.asarray(sample.loss_mask, dtype=bool)
    bounds = [*sample.branches, len(ids)] if sample.branches else [0, len(ids)]
    for first, end in pairwise(bounds):
        inside = mask[first:end]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]]).astype(np.int8)))
        for start, stop in edges.reshape(-1, 2):
            prefix = ids[: sample.branches[0]] if sample.branches else ids[:0]
            yield Stretch(np.concatenate([prefix, ids[first : first + start]]), ids[first + start : first + stop])


def header_of(encoder: Encoder) -> list[int]:
    """Return the ids between a question and its answer: what prompts of different questions end in alike; none if unknown."""
    one, other = (encoder.encode_prompt([Message("user", probe)]) for probe in PROBES)
    if one == other:
        # A tokenizer that knows none of these words drops them; where the header begins cannot be told.
        return []
    pairs = zip(reversed(one), reversed(other), strict=False)
    # An unknown word could be the question's.
    unknown = unknown_ids(encoder.tokenizer)
    return [left for left, _ in takewhile(lambda pair: pair[0] == pair[1] and pair[0] not in unknown, pairs)][::-1]


def masks_item(samples: Sequence[Sample], tokenizer: Any, template: ChatTemplate) -> Item:
    """Read what is learned of some rows.

    An answer must follow the ids that prompt one, must not go on behind its end of turn, and must end in it unless its row
    was cut.

    Args:
        samples: Some rows of the first step, as they are trained on.
        tokenizer: The run's tokenizer.
        template: The run's chat template.
    """
    name, encoder = "masks", Encoder(tokenizer, template)
    header, stop = header_of(encoder), encoder.end_of_turn_id
    found = [one for sample in samples for one in stretches(sample)]
    if not found:
        return Item(name, False, f"nothing is learned of the {len(samples)} rows looked at. Look at fine-tune audit.")
    for one in found:
        told = f"{_tail(tokenizer.decode(one.before))!r} | {_head(tokenizer.decode(one.learned))!r}. Look at fine-tune audit."
        if one.before[len(one.before) - len(header) :].tolist() != header:
            return Item(name, False, f"an answer does not follow {tokenizer.decode(header)!r}: {told}")
        if stop in one.learned[:-1]:
            return Item(name, False, f"what is learned goes on behind its end: {told}")
    ended = sum(int(one.learned[-1]) == stop for one in found)
    if not ended:
        return Item(name, False, f"none of {len(found)} answers ends in {template.end_of_turn!r}: the model would not stop.")
    example = f"{_tail(tokenizer.decode(found[0].before))!r} | {_head(tokenizer.decode(found[0].learned))!r}"
    cut = "" if ended == len(found) else f" ({len(found) - ended} are cut)"
    return Item(name, True, f"{ended} of {len(found)} answers end in {template.end_of_turn!r}{cut}; {example}")


def _tail(text: str) -> str:
    return text if len(text) <= SHOWN else f"...{text[-SHOWN:]}"


def _head(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}...{text[-SHOWN // 2 :]}"
