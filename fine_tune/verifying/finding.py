"""Where a replay first leaves its passport."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# From the earliest to the latest; what is behind the first difference follows from it.
PROMPT, FIRST, LATER = "prompt ids", "first token", "later"
STAGES = (PROMPT, FIRST, LATER)


@dataclass(frozen=True)
class Finding:
    """The replay of one prompt.

    Attributes:
        name: The prompt.
        stage: Where it first differs, None where it does not.
        detail: What was expected and what came, or how far it agrees.
    """

    name: str
    stage: str | None
    detail: str


def prompt_finding(
    name: str, expected: Sequence[int], got: Sequence[int], *, why: str, show: Sequence[str]
) -> Finding | None:
    """Compare token ids of a prompt.

    Args:
        name: The prompt.
        expected: The passport's.
        got: The replay's.
        why: What is behind a difference.
        show: Texts of the first differing token, expected and got.
    """
    if list(expected) == list(got):
        return None
    place = differing_place(expected, got)
    sides = [str(ids[place]) if place < len(ids) else "nothing" for ids in (expected, got)]
    texts = [f" {text!r}" if text else "" for text in show]
    return Finding(
        name,
        PROMPT,
        f"token {place + 1} of {len(expected)}: expected {sides[0]}{texts[0]}, got {sides[1]}{texts[1]}; {why}",
    )


def differing_place(expected: Sequence[object], got: Sequence[object]) -> int:
    """Return the first place where two sequences differ, the end of the shorter one if it is the other's beginning."""
    pairs = zip(expected, got, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(expected), len(got)))


def answer_finding(
    name: str, place: int | None, *, margins: Sequence[float], tolerance: float, length: int, sides: Sequence[str]
) -> Finding:
    """Judge a continuation by the place of its first difference.

    Args:
        name: The prompt.
        place: Index of the first other token; ``length`` where the end differs; None for none.
        margins: Nats by which each expected token won.
        tolerance: A token that won by no more is a tie: rounding may choose the other.
        length: Tokens of the expected continuation.
        sides: What was expected there and what came.
    """
    if place is None:
        return Finding(name, None, f"{length} tokens")
    margin = margins[place] if place < len(margins) else None
    if margin is not None and margin <= tolerance:
        return Finding(name, None, f"{place} tokens, then a tie ({margin:.2g} nats)")
    stage = FIRST if place == 0 else LATER
    lead = "" if margin is None else f", which won by {margin:.2g} nats"
    return Finding(name, stage, f"token {place + 1}: expected {sides[0]}{lead}, got {sides[1]}")


def probability_finding(
    name: str, expected: dict[str, float], got: dict[str, float], *, tolerance: float
) -> Finding | None:
    """Compare log-probabilities of the likeliest first tokens, of those that both sides tell."""
    both = expected.keys() & got.keys()
    if not both:
        return None
    token = max(both, key=lambda text: abs(expected[text] - got[text]))
    if abs(expected[token] - got[token]) <= tolerance:
        return None
    return Finding(
        name,
        FIRST,
        f"{token!r} has log-probability {got[token]:.3f}, expected {expected[token]:.3f} (allowed difference {tolerance:g})",
    )
