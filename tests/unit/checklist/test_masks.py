"""Masks are read back as text: what is learned is an answer, behind its header, with its end of turn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fine_tune.checklist import masks
from fine_tune.checklist.masks import header_of, masks_item, stretches
from fine_tune.models.hub import resolve_model
from fine_tune.models.tokenizer import load_tokenizer
from fine_tune.packing.batches import Sample
from fine_tune.text.conversation import Conversation, Message, PreferencePair
from fine_tune.text.encode import Encoder
from fine_tune.text.pairs import EncodedPair, encode_pairs
from fine_tune.text.template import ChatTemplate, load_template

TALK = Conversation(
    (Message("user", "Add 2 and 5."), Message("assistant", "7."), Message("user", "And 3?"), Message("assistant", "10.")),
    id="a", group="a",
)  # fmt: skip


@pytest.fixture(scope="module")
def reading() -> tuple[Any, ChatTemplate]:
    tokenizer = load_tokenizer(resolve_model("builtin:tiny"), pad_token=None, add_tokens=[], trust_remote_code=False)
    return tokenizer, load_template("world", bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token, end_of_turn=None)


@pytest.fixture
def sample(reading: tuple[Any, ChatTemplate]) -> Sample:
    encoded = Encoder(*reading).encode(TALK)
    return Sample(np.array(encoded.input_ids), np.array(encoded.loss_mask))


def test_a_right_mask_passes_and_shows_an_example(sample: Sample, reading: tuple[Any, ChatTemplate]) -> None:
    item = masks_item([sample], *reading)
    assert item.passed is True
    assert item.says.startswith("2 of 2 answers end in '<|end|>'; ")
    assert "| '7.<|end|>'" in item.says
    assert reading[0].decode(header_of(Encoder(*reading))) == "<|end|>\n<|assistant|>\n"


def test_stretches_are_the_runs_of_learned_tokens() -> None:
    ids = np.arange(8)
    found = list(stretches(Sample(ids, np.array([0, 0, 1, 1, 0, 1, 0, 1], dtype=bool))))
    assert [one.learned.tolist() for one in found] == [[2, 3], [5], [7]]
    assert [one.before.tolist() for one in found] == [[0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]


def test_both_sides_of_a_pair_follow_their_prompt(reading: tuple[Any, ChatTemplate]) -> None:
    row = PreferencePair((Message("user", "Add 2 and 5."),), chosen="7.", rejected="It is 8.", id="p", group="p")
    (encoded,) = encode_pairs(Encoder(*reading), [row])
    assert isinstance(encoded, EncodedPair)
    pair = Sample(np.array(encoded.input_ids), np.array(encoded.loss_mask), encoded.branches)
    found = list(stretches(pair))
    assert [one.before.tolist() for one in found] == [encoded.input_ids[: encoded.branches[0]]] * 2
    assert masks_item([pair], *reading).passed is True
    # The rejected side taken as going on behind the chosen one.
    assert masks_item([pair._replace(branches=())], *reading).passed is False


def shifted(sample: Sample) -> np.ndarray:
    return np.roll(sample.loss_mask, 1) & (np.arange(len(sample.input_ids)) > 0)


def everything(sample: Sample) -> np.ndarray:
    return np.arange(len(sample.input_ids)) > 0


def without_stops(sample: Sample) -> np.ndarray:
    return sample.loss_mask & ~np.append(np.diff(sample.loss_mask.astype(int)) == -1, False) & (sample.input_ids != 6)


def questions(sample: Sample) -> np.ndarray:
    return ~sample.loss_mask & (np.arange(len(sample.input_ids)) > 0)


def nothing(sample: Sample) -> np.ndarray:
    return np.zeros_like(sample.loss_mask)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (shifted, "does not follow"),
        (everything, "does not follow"),
        (without_stops, "would not stop"),
        (questions, "does not follow"),
        (nothing, "nothing is learned"),
    ],
)
def test_wrong_masks_fail(sample: Sample, reading: tuple[Any, ChatTemplate], wrong: Any, says: str) -> None:
    item = masks_item([sample._replace(loss_mask=wrong(sample))], *reading)
    assert item.passed is False
    assert says in item.says


def test_learning_on_into_the_next_turn_fails(sample: Sample, reading: tuple[Any, ChatTemplate]) -> None:
    first = int(np.flatnonzero(sample.loss_mask)[0])
    item = masks_item([sample._replace(loss_mask=np.arange(len(sample.input_ids)) >= first)], *reading)
    assert item.passed is False
    assert "goes on behind its end" in item.says


def test_a_row_that_was_cut_is_counted_and_no_fault(sample: Sample, reading: tuple[Any, ChatTemplate]) -> None:
    cut = Sample(sample.input_ids[:-1], sample.loss_mask[:-1])
    item = masks_item([sample, cut], *reading)
    assert item.passed is True
    assert item.says.startswith("3 of 4 answers end in '<|end|>' (1 are cut)")


def test_a_header_that_cannot_be_told_from_its_question_is_no_fault(
    sample: Sample, reading: tuple[Any, ChatTemplate], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As with a tokenizer that drops both questions: prompts are all header, and no row's answer follows all of that.
    monkeypatch.setattr(masks, "PROBES", ("", ""))
    assert header_of(Encoder(*reading)) == []
    assert masks_item([sample], *reading).passed is True
