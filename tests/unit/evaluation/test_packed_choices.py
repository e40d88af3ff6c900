"""Choices scored in large passes: the scores of plain texts, whatever lies in a pass beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from fine_tune.evaluation import packed_choices
from fine_tune.evaluation.choice_rows import ChoicePrompt
from fine_tune.evaluation.packed_choices import packed_choice_logps
from fine_tune.models.base import decoder

from ..models.conftest import llama
from .test_choices import ENDINGS, gap, ids, one_by_one, prompts, windowed


@pytest.fixture
def model() -> LlamaForCausalLM:
    return llama(seed=3).double().eval()


@torch.no_grad()
def score(model: Any, asked: list[ChoicePrompt], **options: Any) -> list[list[float]]:
    """Score one chunk."""
    [found] = packed_choice_logps(model, [asked], **options)
    return found


def passes(model: Any, asked: list[ChoicePrompt], **options: Any) -> list[int]:
    """Tokens of each pass."""
    seen: list[int] = []
    hook = decoder(model).register_forward_pre_hook(lambda _m, _a, k: seen.append(k["input_ids"].shape[1]), with_kwargs=True)
    score(model, asked, **options)
    hook.remove()
    return seen


@pytest.mark.parametrize("pass_tokens", [1, 40, 70, 100_000])
def test_shared_beginnings_score_as_plain_texts_do(model: LlamaForCausalLM, pass_tokens: int) -> None:
    ours = score(model, prompts(), context=64, pass_tokens=pass_tokens)
    theirs = one_by_one(model, prompts(), 64)
    assert gap(ours, theirs) < 1e-9
    # Control: neighbours' scores are another matter.
    assert gap(ours, theirs[1:] + theirs[:1]) > 1e-3


@pytest.mark.parametrize("pass_tokens", [30, 100_000])
def test_windows_of_attention_slide_over_the_shared_beginning(pass_tokens: int) -> None:
    model: Any = windowed().eval()
    # Leaves packed attention set.
    theirs = one_by_one(model, prompts(), 64)
    ours = score(model, prompts(), context=64, pass_tokens=pass_tokens)
    assert gap(ours, theirs) < 1e-9
    # Control: the windows are seen at all.
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    assert gap(ours, score(model, prompts(), context=64)) > 1e-3


@pytest.mark.parametrize("context", [24, 14, 3])
def test_long_prompts_keep_their_last_tokens(model: LlamaForCausalLM, context: int) -> None:
    ours = score(model, prompts(), context=context)
    assert gap(ours, one_by_one(model, prompts(), context)) < 1e-9
    assert gap(ours, one_by_one(model, prompts(), 64)) > 1e-3


def test_prompts_that_begin_or_are_others(model: LlamaForCausalLM) -> None:
    long = ids(30, 4)
    asked = [ChoicePrompt(row, ENDINGS) for row in (long[:25], long, long, long[:1])]
    assert gap(score(model, asked, context=64), one_by_one(model, asked, 64)) < 1e-9


def test_a_beginning_lies_in_a_pass_once_and_again_in_the_next(model: LlamaForCausalLM) -> None:
    first = ids(40, 1)
    asked = [ChoicePrompt(np.concatenate([first, ids(n, n)]), ((7,), (8,), (9,), (10,))) for n in (3, 4, 5)]
    assert passes(model, asked, context=64) == [40 + 3 + 4 + 5]
    assert passes(model, asked, context=64, pass_tokens=52) == [52]
    assert passes(model, asked, context=64, pass_tokens=51) == [47, 45]
    assert passes(model, asked, context=64, pass_tokens=1) == [43, 44, 45]


def test_different_beginnings_share_a_pass(model: LlamaForCausalLM) -> None:
    # One row without a partner, one beginning of 20 and one of 12; each choice of several tokens adds some.
    letters = ((7,), (8,))
    asked = prompts(letters)
    assert passes(model, asked, context=64) == [8 + 20 + 3 + 9 + 1 + 5 + 5 + 14 + 12 + 6 + 2 + 4]


def test_keys_of_a_pass_are_limited(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ids(40, 1)
    asked = [ChoicePrompt(np.concatenate([first, ids(2, n)]), ((7,),)) for n in range(4)]
    assert passes(model, asked, context=64, pass_tokens=60) == [48]
    monkeypatch.setattr(packed_choices, "KEYS_PER_TOKEN", 2)
    # 120 keys are two rows of 42.
    assert passes(model, asked, context=64, pass_tokens=60) == [44, 44]


def test_chunks_score_as_they_do_alone(model: LlamaForCausalLM) -> None:
    chunks = [prompts()[:4], prompts()[4:5], [], prompts()[5:]]
    alone = [score(model, chunk, context=64) for chunk in chunks]
    # To the last bit: a chunk that is computed again after a kill is the one that was lost.
    with torch.no_grad():
        assert list(packed_choice_logps(model, chunks, context=64)) == alone
