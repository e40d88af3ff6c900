from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from fine_tune.errors import ConfigError, DataError
from fine_tune.evaluation import choices
from fine_tune.evaluation.choice_rows import ChoicePrompt, encode_choices, rows_of
from fine_tune.evaluation.choices import choice_logps
from fine_tune.evaluation.shared_beginnings import share_beginnings
from fine_tune.models import attention
from fine_tune.models.base import decoder, set_attention

from ..models.conftest import VOCABULARY, llama

# One token; two that begin alike; three that begin alike; one beginning of its own.
ENDINGS = ((7,), (9, 11), (9, 12), (9, 12, 13), (10, 4))


@pytest.fixture
def model() -> LlamaForCausalLM:
    return llama(seed=3).double()


def ids(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, VOCABULARY, length)


def prompts(endings: tuple[tuple[int, ...], ...] = ENDINGS) -> list[ChoicePrompt]:
    """Six that share 20 tokens, three that share 12 others, and one alone, mixed up."""
    first, second = ids(20, 1), ids(12, 2)
    one = [np.concatenate([first, ids(n, 10 + n)]) for n in (3, 9, 1, 5, 5, 14)]
    two = [np.concatenate([second, ids(n, 30 + n)]) for n in (6, 2, 4)]
    mixed = [one[0], two[0], one[1], ids(8, 50), one[2], two[1], one[3], one[4], two[2], one[5]]
    return [ChoicePrompt(row, endings) for row in mixed]


@torch.no_grad()
def one_by_one(model: LlamaForCausalLM, asked: list[ChoicePrompt], context: int) -> list[list[float]]:
    """Every choice of every prompt as a plain text of its own, with the model's own head and attention."""
    set_attention(model, "sdpa")
    found = []
    for prompt in asked:
        scores = []
        for ending in prompt.endings:
            whole = [*prompt.ids.tolist(), *ending]
            inputs = torch.tensor(whole[:-1][-context:])[None]
            logps = model(input_ids=inputs).logits[0].log_softmax(-1)[-len(ending) :]
            scores.append(sum(float(row[token]) for row, token in zip(logps, ending, strict=True)))
        found.append(scores)
    set_attention(model, "packed")
    return found


def score(model: nn.Module, asked: list[ChoicePrompt], **options: Any) -> list[list[float]]:
    """Score one chunk."""
    [found] = choice_logps(model, [asked], **options)
    return found


def gap(ours: list[list[float]], theirs: list[list[float]]) -> float:
    return max(abs(a - b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("pass_tokens", [1, 70, 100_000])
def test_shared_beginnings_score_as_plain_texts_do(model: LlamaForCausalLM, pass_tokens: int) -> None:
    ours = score(model, prompts(), context=64, pass_tokens=pass_tokens)
    theirs = one_by_one(model, prompts(), 64)
    assert gap(ours, theirs) < 1e-9
    # Control: neighbours' scores are another matter.
    assert gap(ours, theirs[1:] + theirs[:1]) > 1e-3


def test_the_attention_of_other_devices_scores_the_same(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    hook = decoder(model).register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    ours = score(model, prompts(), context=64)
    monkeypatch.setattr(choices, "_speed_up", lambda _network: None)
    assert gap(ours, score(model, prompts(), context=64)) < 1e-9
    hook.remove()
    assert set(seen) == {"blocked", "sdpa"}


def windowed() -> Qwen2ForCausalLM:
    """Two of three layers see six tokens only."""
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_sliding_window=True, sliding_window=6, max_window_layers=1,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).double()
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    attention.register()
    return model


@pytest.mark.parametrize("pass_tokens", [1, 100_000])
def test_windows_of_attention_slide_over_the_shared_beginning(pass_tokens: int) -> None:
    model = windowed()
    ours = score(model, prompts(), context=64, pass_tokens=pass_tokens)
    assert gap(ours, one_by_one(model, prompts(), 64)) < 1e-9
    # Control: the windows are seen at all.
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    assert gap(ours, score(model, prompts(), context=64)) > 1e-3


@pytest.mark.parametrize("context", [24, 14, 3])
def test_long_prompts_keep_their_last_tokens(model: LlamaForCausalLM, context: int) -> None:
    ours = score(model, prompts(), context=context)
    assert gap(ours, one_by_one(model, prompts(), context)) < 1e-9
    assert gap(ours, one_by_one(model, prompts(), 64)) > 1e-3


def test_the_beginning_matters(model: LlamaForCausalLM) -> None:
    changed = [ChoicePrompt(np.concatenate([[6], p.ids[1:]]), p.endings) for p in prompts()]
    assert changed[0].ids[0] != prompts()[0].ids[0]
    before, after = (score(model, asked, context=64) for asked in (prompts(), changed))
    assert all(gap([a], [b]) > 1e-6 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("pass_tokens", "passes"), [(100, [(3, 5)]), (1, [(1, 3), (1, 4), (1, 5)])])
def test_the_beginning_is_computed_once_and_one_token_choices_share_a_row(
    model: LlamaForCausalLM, two_threads: None, pass_tokens: int, passes: list[tuple[int, int]]
) -> None:
    first = ids(40, 1)
    asked = [ChoicePrompt(np.concatenate([first, ids(n, n)]), ((7,), (8,), (9,), (10,))) for n in (3, 4, 5)]
    seen: list[tuple[int, ...]] = []

    def slowly(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(tuple(kwargs["input_ids"].shape))
        # Long enough for the other thread to need the beginning as well.
        time.sleep(0.1)

    hook = decoder(model).register_forward_pre_hook(slowly, with_kwargs=True)
    score(model, asked, context=64, pass_tokens=pass_tokens)
    hook.remove()
    assert seen[0] == (1, 40)
    assert sorted(seen[1:]) == passes


@pytest.mark.parametrize(
    ("pass_tokens", "passes"), [(20, [(4, 5)]), (100, [(4, 5)]), (19, [(3, 5), (1, 5)]), (1, [(1, 5)] * 4)]
)
def test_a_pass_holds_so_many_new_tokens(
    model: LlamaForCausalLM, pass_tokens: int, passes: list[tuple[int, int]]
) -> None:
    first = ids(5, 1)
    asked = [ChoicePrompt(np.concatenate([first, ids(5, n)]), ((7,), (8,))) for n in range(4)]
    assert share_beginnings([one.ids for one in asked], pass_cost=2) == [(5, (0, 1, 2, 3))]
    rows = [row for i, one in enumerate(asked) for row in rows_of(one, i, 64)]
    assert [(len(batch), len(batch[0].ids) - 5) for batch in choices._batches(rows, 5, pass_tokens)] == passes
    # Keys of what is shared count a quarter: 32 of them are three rows of 10.
    assert [len(batch) for batch in choices._batches(rows, 9, 8)] == [3, 1]


def test_chunks_score_as_they_do_alone(model: LlamaForCausalLM, two_threads: None) -> None:
    chunks = [prompts()[:4], prompts()[4:5], prompts()[5:]]
    alone = [score(model, chunk, context=64, pass_tokens=20) for chunk in chunks]
    # To the last bit: a chunk that is computed again after a kill is the one that was lost.
    assert list(choice_logps(model, chunks, context=64, pass_tokens=20)) == alone


def test_closed_half_way_modes_come_back(model: LlamaForCausalLM) -> None:
    model.train()
    found = choice_logps(model, [[one] for one in prompts()], context=64)
    next(found)
    assert (model.training, model.config._attn_implementation) == (False, "blocked")
    found.close()
    assert (model.training, model.config._attn_implementation) == (True, "packed")


def test_choices_with_common_first_tokens_lie_in_one_row() -> None:
    prompt = ChoicePrompt(np.array([1, 2, 3]), ((9, 11), (7,), (9, 12), (10, 4)))
    rows = rows_of(prompt, 0, 64)
    assert [row.ids.tolist() for row in rows] == [[1, 2, 3, 9], [1, 2, 3, 10]]
    assert [(r.choice, r.position, r.target) for r in rows[0].reads] == [
        (0, 2, 9), (0, 3, 11), (2, 2, 9), (2, 3, 12), (1, 2, 7),
    ]  # fmt: skip
    # Cut, the one-token choice sees one token of the prompt more.
    assert [row.ids.tolist() for row in rows_of(prompt, 0, 3)] == [[2, 3, 9], [2, 3, 10], [1, 2, 3]]


def test_a_prompt_that_is_the_beginning_of_another(model: LlamaForCausalLM) -> None:
    long = ids(30, 4)
    asked = [ChoicePrompt(row, ENDINGS) for row in (long[:25], long, long)]
    assert gap(score(model, asked, context=64), one_by_one(model, asked, 64)) < 1e-9


def test_nothing_to_score(model: LlamaForCausalLM) -> None:
    assert list(choice_logps(model, [], context=64)) == []
    assert list(choice_logps(model, [[], prompts()[:1], []], context=64)) == [
        [],
        score(model, prompts()[:1], context=64),
        [],
    ]
    assert encode_choices(None, [], "AB") == []


def test_modes_and_attention_come_back(model: LlamaForCausalLM) -> None:
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    score(model, prompts(), context=64)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "packed"


def test_a_context_without_room_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match=r"eval.context_length=2: a choice has 3 tokens. Raise it."):
        score(model, prompts(), context=2)


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Letters are tokens of their own; "B" behind a space is two."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "Answer", ":", "\u2581", "A", "\u2581A", "B"])}
    raw = Tokenizer(models.BPE(vocabulary, [("\u2581", "A")], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("Answer", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="never")]
    )
    raw.add_tokens(["Answer"])
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def test_endings_are_what_the_whole_text_adds() -> None:
    found = encode_choices(word_tokenizer(), ["Answer:", ":Answer:"], "AB")
    assert [prompt.ids.tolist() for prompt in found] == [[2, 3], [3, 2, 3]]
    assert [prompt.endings for prompt in found] == [((6,), (4, 7)), ((6,), (4, 7))]


def test_a_choice_that_adds_nothing_is_refused() -> None:
    def joined(texts: list[str], **_options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1, 2] for _ in texts]}

    with pytest.raises(DataError, match=r"joins a choice with it, so that nothing is left to score"):
        encode_choices(joined, ["x"], "AB")
