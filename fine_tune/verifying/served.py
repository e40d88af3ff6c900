"""Replay a passport against a server: through its chat, and with the passport's own token ids."""

from __future__ import annotations

from fine_tune.errors import EnvironmentProblem
from fine_tune.passport.document import Passport
from fine_tune.verifying.endpoint import Answer, Endpoint, Refused
from fine_tune.verifying.finding import (
    PROMPT,
    Finding,
    answer_finding,
    differing_place,
    probability_finding,
    prompt_finding,
)

# Nats; a server computes in half precision, and in other kernels.
LOOSE = 0.25


def verify_served(passport: Passport, server: Endpoint, *, tolerance: float | None) -> list[Finding]:
    """Compare what a server says with the passport, prompt by prompt.

    Args:
        passport: What is expected.
        server: The server.
        tolerance: Nats by which log-probabilities may differ, None for the usual.
    """
    allowed = LOOSE if tolerance is None else tolerance
    return [_replay(passport, index, server, allowed) for index in range(len(passport.asked))]


def _replay(passport: Passport, index: int, server: Endpoint, tolerance: float) -> Finding:
    one, said = passport.asked[index], passport.said[index]
    ids, text = server.tokenize(one.messages, one.text)
    if ids is not None:
        seen = "" if text is None else f"it renders {text[differing_place(one.text, text) :][:20]!r} there"
        why = seen if text is not None and text != one.text else "the server's template or tokenizer is another one"
        found = prompt_finding(one.name, one.ids, ids, why=why, show=("", ""))
        if found is not None:
            return found
    # One more than was said, so that a missing stop shows.
    limit = len(said.ids) + (said.stop_id is not None)
    try:
        through_chat = judge(passport, index, server.chat(one.messages, limit), tolerance=tolerance)
    except Refused as refused:
        raise EnvironmentProblem(f"{server.url} takes no chat: {refused}.") from refused
    if through_chat.stage is None or ids is not None:
        return through_chat
    try:
        with_ids = judge(passport, index, server.complete(one.ids, limit), tolerance=tolerance)
    except Refused:
        return Finding(
            one.name,
            through_chat.stage,
            f"{through_chat.detail} (this server tells no prompt ids: its prompt may differ, too)",
        )
    if with_ids.stage is None:
        return Finding(
            one.name,
            PROMPT,
            f"given these ids the server answers as expected, through its chat not: {through_chat.detail}",
        )
    return with_ids


def judge(passport: Passport, index: int, answer: Answer, *, tolerance: float) -> Finding:
    """Compare a text and first probabilities with the passport's."""
    name, said, pieces = passport.asked[index].name, passport.said[index], passport.pieces[index]
    place = text_place(pieces, answer, stopped=said.stop_id is not None)
    if place != 0:
        texts = passport.texts_of_top[index]
        # Two tokens of one text (bytes of a character, say) cannot be told apart.
        known = {text: logp for text, (_, logp) in zip(texts, said.top, strict=True) if texts.count(text) == 1}
        moved = probability_finding(name, known, answer.top, tolerance=tolerance)
        if moved is not None:
            return moved
    whole = "".join(pieces)
    rest = len("".join(pieces[:place])) if place is not None else 0
    got = answer.text.lstrip()[max(0, rest - len(whole) + len(whole.lstrip())) :][:30]
    expected = whole[rest:][:30]
    sides = (repr(expected) if expected else "its end", repr(got) if got else "its end")
    return answer_finding(name, place, margins=said.margins, tolerance=tolerance, length=len(said.ids), sides=sides)


def text_place(pieces: list[str], answer: Answer, *, stopped: bool) -> int | None:
    """Return the index of the first token whose text differs, the number of tokens where only the end does, else None.

    Servers drop the blanks around an answer, and send half of a character as a replacement character.

    Example:
        >>> text_place(["a", " b", " c"], Answer("a b d", True, {}), stopped=True)
        2
        >>> text_place(["a", " b"], Answer("a b", False, {}), stopped=True), text_place(["a"], Answer("a", True, {}), stopped=True)
        (2, None)
    """
    expected, got = "".join(pieces).strip(), answer.text.strip().rstrip("\ufffd")
    if got == expected:
        return len(pieces) if stopped and answer.ended is False else None
    same = differing_place(expected, got)
    if same == len(expected):
        return len(pieces)
    blanks = len("".join(pieces)) - len("".join(pieces).lstrip())
    done = 0
    for index, piece in enumerate(pieces):
        done += len(piece)
        if done - blanks > same:
            return index
    return len(pieces)
