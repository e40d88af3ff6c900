"""What a passport holds, and that it can be read again, or is told to be damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fine_tune.errors import CheckpointError
from fine_tune.models.export import carry_template
from fine_tune.passport.document import pieces, read_passport, stops
from fine_tune.passport.prompts import CANDIDATES, NUM_PROMPTS, ask
from fine_tune.passport.replay import NUM_TOKENS, replay
from fine_tune.text.template import load_template

from .speaking import network, template, tokenizer, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("artifact"))


def test_prompts_are_those_that_another_program_renders_and_encodes(folder: Path) -> None:
    passport = read_passport(folder)
    theirs = AutoTokenizer.from_pretrained(str(folder))
    assert len(passport.asked) == NUM_PROMPTS
    for one in passport.asked:
        messages = [{"role": m.role, "content": m.content} for m in CANDIDATES[one.name]]
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert one.text == text
        assert one.ids == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert passport.special == {"bos": 1, "eos": 2, "pad": 0, "end_of_turn": 4, "stop": [2, 4]}
    assert (passport.precision, passport.origin) == ("float32", {"step": 3})


def test_continuations_and_probabilities_are_the_models_own(folder: Path) -> None:
    passport = read_passport(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder))
    for one, said, texts in zip(passport.asked, passport.said, passport.pieces, strict=True):
        start = torch.tensor([one.ids])
        out = loaded.generate(
            start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=[2, 4],
            pad_token_id=0,
        )[0, len(one.ids) :].tolist()  # fmt: skip
        assert out == [*said.ids, *([said.stop_id] if said.stop_id is not None else [])]
        logits = loaded(input_ids=torch.tensor([[*one.ids, *out]])).logits[0, len(one.ids) - 1 :]
        logps = logits.double().log_softmax(-1)
        best = logps[0].topk(5)
        assert [i for i, _ in said.top] == best.indices.tolist()
        assert [logp for _, logp in said.top] == pytest.approx(best.values.tolist(), abs=2e-5)
        two = logits[: len(out)].topk(2).values
        assert said.margins == pytest.approx((two[:, 0] - two[:, 1]).tolist(), abs=2e-4)
        assert "".join(texts) == tokenizer().decode(said.ids, skip_special_tokens=True).rstrip("\ufffd")


def test_a_stop_token_ends_a_continuation_and_is_measured_too() -> None:
    model, prompt = network(), [1, 40, 41, 42]
    free = replay(model, [prompt], stop_ids=[], pad_id=0)[0]
    assert (len(free.ids), free.stop_id, len(free.margins)) == (NUM_TOKENS, None, NUM_TOKENS)
    stop = free.ids[5]
    place = free.ids.index(stop)
    said = replay(model, [prompt], stop_ids=[stop], pad_id=0)[0]
    assert (said.ids, said.stop_id) == (free.ids[:place], stop)
    assert said.margins == pytest.approx(free.margins[: place + 1], abs=1e-4)
    assert model.training
    assert model.config._attn_implementation == "packed"


def test_pieces_wait_for_the_end_of_a_character() -> None:
    tokens = tokenizer()
    ids = tokens("a\u00e9\U0001f642b")["input_ids"]
    found = pieces(tokens, ids)
    assert found == ["a", "", "\u00e9", "", "", "", "\U0001f642", "b"]
    # A special token has no text that a server would send.
    assert pieces(tokens, [*ids[:1], 4, *ids[:1]]) == ["a", "", "a"]


def test_prompts_that_do_not_fit_or_are_refused_are_replaced_and_named() -> None:
    tokens, form = tokenizer(), load_template("mistral_instruct", bos_token="<s>", eos_token="</s>")
    carry_template(tokens, form)
    everything, _ = ask(tokens, form, max_tokens=None)
    limit = next(len(one.ids) for one in everything if one.name == "code") - 1
    chosen, left_out = ask(tokens, form, max_tokens=limit)
    assert len(chosen) == NUM_PROMPTS
    assert all(len(one.ids) <= limit for one in chosen)
    assert left_out["code"].endswith("tokens leave the model no room to answer")
    assert not {one.name for one in chosen} & left_out.keys()


def test_a_template_that_another_program_renders_otherwise_is_named() -> None:
    tokens, form = tokenizer(), template()
    carry_template(tokens, form)
    tokens.chat_template = str(tokens.chat_template).replace("user", "human").replace("message", "message")
    assert stops(tokens, form) == [2, 4]
    tokens.chat_template = "{{ messages[0]['content'] }}"
    chosen, left_out = ask(tokens, form, max_tokens=None)
    assert chosen == []
    assert set(left_out.values()) == {"transformers renders it otherwise"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.update(format=2), "format 2, this version reads 1"),
        (lambda found: found.pop("special_ids"), "damaged"),
        (lambda found: found.update(prompts=[]), "damaged"),
        (lambda found: found["prompts"][0].update(margins=[]), "damaged"),
        (lambda found: found.update(prompts=3), "damaged"),
    ],
)
def test_a_damaged_passport_is_told(change: Any, message: str, folder: Path, tmp_path: Path) -> None:
    found = json.loads((folder / "passport.json").read_text(encoding="utf-8"))
    change(found)
    (tmp_path / "passport.json").write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        read_passport(tmp_path)


def test_a_folder_without_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no passport\.json there"):
        read_passport(tmp_path)
