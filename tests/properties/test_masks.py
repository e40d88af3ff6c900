"""N9 and N10: what is supervised of a conversation, and that nobody's words turn into a template's tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fine_tune.losses.logps import token_logps
from fine_tune.losses.sft import sft_loss
from fine_tune.models.tokenizer import load_tokenizer
from fine_tune.packing.batches import pack
from fine_tune.text.conversation import Conversation, Message
from fine_tune.text.encode import Encoded, Encoder
from fine_tune.text.overflow import fit
from fine_tune.text.template import load_template

from ..unit.text.conftest import SPECIAL, character_tokenizer
from .drawn import plain
from .judging import exceeds

FORMATS = st.sampled_from(["world", "llama2", "mistral_instruct", "guanaco", "instruct", "plain", "phi2"])
TOKENIZERS = st.sampled_from(["characters", "prefixing", "without_bos", "built in"])
LETTERS = st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="<>|[]#")
PHRASES = st.text(LETTERS, min_size=1, max_size=9)
TALKS = st.lists(st.tuples(PHRASES, PHRASES), min_size=1, max_size=4)
# What a hostile or careless text holds of the template's own strings.
HOSTILE = st.lists(st.one_of(PHRASES, st.sampled_from([*SPECIAL, "[INST]"])), min_size=1, max_size=4).map("".join)
BASE = Path(__file__).resolve().parents[2] / "fine_tune" / "world" / "base"


@cache
def tokenizer(name: str) -> Any:
    """One per name: encoding does not change it."""
    if name == "built in":
        return load_tokenizer(BASE)
    return character_tokenizer(prefix="_" if name == "prefixing" else "", bos=name != "without_bos")


@cache
def encoder(form: str, name: str) -> Encoder:
    owner = tokenizer(name)
    return Encoder(owner, load_template(form, bos_token=owner.bos_token, eos_token=owner.eos_token))


def talk(turns: list[tuple[str, str]]) -> Conversation:
    messages = [Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    return Conversation(tuple(messages), "id", "group")


def pull(encoded: Encoded, words: int) -> Tensor:
    """The gradient of the loss in the logits of every position, ``[T, V]``, all words being equally likely."""
    micro = pack([(np.array(encoded.input_ids), np.array(encoded.loss_mask))])
    logits = torch.zeros(micro.num_tokens, words, dtype=torch.float64, requires_grad=True)
    logps = token_logps(logits[micro.rows], torch.eye(words, dtype=torch.float64), micro.targets)
    (slope,) = torch.autograd.grad(sft_loss(logps, num_step_tokens=len(micro.rows)), logits)
    return slope


@plain(25)
@given(turns=TALKS, form=FORMATS, name=TOKENIZERS)
def test_n09_each_turn_learns_its_end_once_and_nothing_outside_it(
    turns: list[tuple[str, str]], form: str, name: str
) -> None:
    owner = encoder(form, name)
    encoded = owner.encode(talk(turns))
    stop = owner.end_of_turn_id
    ends = [
        t
        for t, (i, learned) in enumerate(zip(encoded.input_ids, encoded.loss_mask, strict=True))
        if learned and i == stop
    ]
    assert ends == [end - 1 for end in encoded.turn_ends]
    assert len(ends) == encoded.num_stops == len(turns)
    spans = list(zip(encoded.turn_starts, encoded.turn_ends, strict=True))
    inside = [any(a <= t < b for a, b in spans) for t in range(len(encoded.input_ids))]
    assert encoded.loss_mask == inside
    slope = pull(encoded, len(owner.tokenizer))
    # Towards the end of turn exactly where one is learned; towards anything only before a learned token.
    assert (slope[:, stop] < 0).nonzero().flatten().tolist() == [end - 1 for end in ends]
    assert (slope.abs().sum(-1) > 0).nonzero().flatten().tolist() == [
        t - 1 for t, learned in enumerate(inside) if learned
    ]


@plain(25)
@given(turns=TALKS, name=TOKENIZERS, size=st.integers(2, 60), form=FORMATS)
def test_n09_a_cut_turn_learns_no_end(turns: list[tuple[str, str]], name: str, size: int, form: str) -> None:
    owner = encoder(form, name)
    whole = owner.encode(talk(turns))
    cut = fit(whole, size, "truncate_completion").encoded
    complete = sum(end <= size for end in whole.turn_ends)
    if cut is None:
        assert complete == 0
        return
    stop = owner.end_of_turn_id
    learned = [i for i, mask in zip(cut.input_ids, cut.loss_mask, strict=True) if mask]
    assert learned.count(stop) == cut.num_stops == complete
    assert ((pull(cut, len(owner.tokenizer))[:, stop] < 0).sum().item()) == complete


@plain(25)
@given(turns=TALKS, name=st.sampled_from(["characters", "without_bos"]))
def test_n09_the_mask_of_a_talk_is_that_of_its_turns_end_to_end(turns: list[tuple[str, str]], name: str) -> None:
    # llama2 writes every exchange as if it were the first.
    owner = encoder("llama2", name)
    whole, parts = owner.encode(talk(turns)), [owner.encode(talk([turn])) for turn in turns]
    assert whole.input_ids == [i for part in parts for i in part.input_ids]
    assert whole.loss_mask == [learned for part in parts for learned in part.loss_mask]


def test_n09_control_a_mask_one_token_early() -> None:
    owner = encoder("world", "characters")
    right, broken = (owner.encode(talk([("q", "an"), ("r", "b")])) for _ in range(2))
    broken.loss_mask = [*broken.loss_mask[1:], False]
    words = len(owner.tokenizer)
    exceeds(pull(broken, words), pull(right, words), 1e-12)
    learned = [i for i, mask in zip(broken.input_ids, broken.loss_mask, strict=True) if mask]
    assert learned.count(owner.end_of_turn_id) == 0


@plain(25)
@given(turns=TALKS, form=FORMATS, name=TOKENIZERS)
def test_n10_pieces_are_the_whole_and_come_back_as_text(turns: list[tuple[str, str]], form: str, name: str) -> None:
    owner, row = encoder(form, name), talk(turns)
    encoded = owner.encode(row)
    text = owner.template.render(row.messages)
    whole = owner.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoded.input_ids == whole[: len(encoded.input_ids)]
    if name != "prefixing":  # which puts a sign of its own before every stretch of text
        # Only what stands behind the last end of turn is left out.
        decoded = owner.tokenizer.decode(encoded.input_ids)
        assert text.startswith(decoded)
        assert text[len(decoded) :].strip() == ""


def specials(owner: Encoder, ids: list[int]) -> Tensor:
    """How often each token occurs that a template, and nobody else, may write."""
    known = sorted({i for i, token in owner.tokenizer.added_tokens_decoder.items() if token.special})
    return torch.tensor([ids.count(i) for i in known], dtype=torch.float64)


@plain(40)
@given(turns=st.lists(st.tuples(HOSTILE, HOSTILE), min_size=1, max_size=3), form=FORMATS, name=TOKENIZERS)
def test_n10_words_that_look_like_the_templates_stay_words(turns: list[tuple[str, str]], form: str, name: str) -> None:
    owner = encoder(form, name)
    hostile, tame = owner.encode(talk(turns)), owner.encode(talk([("q", "a")] * len(turns)))
    assert torch.equal(specials(owner, hostile.input_ids), specials(owner, tame.input_ids))
    decoded = owner.tokenizer.decode(hostile.input_ids)
    assert all(text in decoded for turn in turns for text in turn)
    # Nor does the gradient pull towards them: the end of turn is learned once per turn and no other at all.
    slope = pull(hostile, len(owner.tokenizer))
    known = [i for i, token in owner.tokenizer.added_tokens_decoder.items() if token.special]
    pulled = {i: int((slope[:, i] < 0).sum()) for i in known if (slope[:, i] < 0).any()}
    assert pulled == {owner.end_of_turn_id: len(turns)}


@pytest.mark.parametrize("form", ["world", "guanaco"])
def test_n10_control_one_tokenizer_call_for_the_whole_text(form: str) -> None:
    owner = encoder(form, "characters")
    row = talk([("x</s><|end|>", "y<|end|><s></s>")])
    text = owner.template.render(row.messages)
    parsed = owner.tokenizer(text, add_special_tokens=False)["input_ids"]
    exceeds(specials(owner, parsed), specials(owner, owner.encode(row).input_ids), 0.0)
    naive = Encoded(parsed, [False, *(i >= 7 or i == owner.end_of_turn_id for i in parsed[1:])])
    words = len(owner.tokenizer)
    stops = [(pull(each, words)[:, owner.end_of_turn_id] < 0).sum().double() for each in (naive, owner.encode(row))]
    exceeds(stops[0], stops[1], 0.0)
