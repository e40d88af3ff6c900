"""What a choice adds to a prompt, encoded once where no token can reach over the prompt's end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fine_tune.evaluation import choice_rows
from fine_tune.evaluation.choice_rows import encode_choices, ends_tokens
from fine_tune.evaluation.mmlu_data import read_json

LETTERS = "ABCD"
PROMPTS = ["x y:", "y: x:", "x\nAnswer:", "y?", "x: y?", "y "]


def byte_pairs(texts: list[str], *, whole: bool) -> PreTrainedTokenizerFast:
    """Train byte pairs; ``whole`` lets tokens hold spaces inside, as where nothing splits the text before."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not whole)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=raw)


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.texts = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.texts += len(texts)
        return self.inner(texts, **options)


def one_by_one(tokenizer: Any, prompts: list[str]) -> list[Any]:
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        found.append((ids, tuple(tuple(tokenizer(f"{prompt} {letter}")["input_ids"][len(ids) :]) for letter in LETTERS)))
    return found


def as_pairs(found: list[choice_rows.ChoicePrompt]) -> list[Any]:
    return [(one.ids.tolist(), one.endings) for one in found]


def test_ends_that_no_token_crosses_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Counting(byte_pairs(["x y: A B? C: D"] * 20, whole=False))
    assert [ends_tokens(tokenizer, end) for end in (":", "?", "r", " ", "\n", "", "\u00e9")] == [
        True, True, True, False, False, False, False,
    ]  # fmt: skip
    prompts = PROMPTS[:5]
    assert as_pairs(encode_choices(tokenizer, prompts, LETTERS)) == one_by_one(tokenizer.inner, prompts)
    # Two ends with their choices, then every prompt alone.
    assert tokenizer.texts == 2 * 5 + 5
    monkeypatch.setattr(choice_rows, "ENCODED_AT_A_TIME", 2)
    assert as_pairs(encode_choices(tokenizer, prompts, LETTERS)) == one_by_one(tokenizer.inner, prompts)


def test_ends_that_a_token_crosses_are_encoded_each_time() -> None:
    # "y: A" becomes one token, and "x: A" does not: what " A" adds depends on what stands before.
    tokenizer = Counting(byte_pairs(["y: A"] * 50 + ["z? B"], whole=True))
    assert any(":\u0120" in token for token in tokenizer.get_vocab())
    assert not ends_tokens(tokenizer, ":")
    prompts = ["x:", "?x:", "z:"]
    expected = one_by_one(tokenizer.inner, prompts)
    assert as_pairs(encode_choices(tokenizer, prompts, LETTERS)) == expected
    assert tokenizer.texts == 3 * 5 + 3


def test_added_tokens_may_take_the_space_behind_them() -> None:
    tokenizer = byte_pairs(["x y: A B"] * 20, whole=False)
    assert ends_tokens(tokenizer, ">")
    tokenizer.add_tokens([AddedToken("<end>", rstrip=True)])
    assert not ends_tokens(tokenizer, ">")
    prompts = ["x<end>", "y>"]
    assert as_pairs(encode_choices(tokenizer, prompts, LETTERS)) == one_by_one(tokenizer, prompts)


def test_other_kinds_of_tokenizers_are_asked_each_time() -> None:
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "x": 1, "A": 2}, unk_token="<unk>"))
    assert not ends_tokens(PreTrainedTokenizerFast(tokenizer_object=raw), "x")
    assert not ends_tokens(object(), "x")


@pytest.fixture(scope="module")
def real_prompts(real_data: Path) -> list[str]:
    return [one.prompt for one in read_json(str(real_data / "mmlu"), shots=0, split="val")][::30]


@pytest.mark.real
@pytest.mark.parametrize("name", ["llama", "mistral", "pythia"])
def test_real_prompts_get_the_same_endings(name: str, real_data: Path, real_prompts: list[str]) -> None:
    tokenizer, prompts = AutoTokenizer.from_pretrained(real_data / "tokenizers" / name), real_prompts
    assert ends_tokens(tokenizer, ":")
    assert as_pairs(encode_choices(tokenizer, prompts, LETTERS)) == one_by_one(tokenizer, prompts)
