from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fine_tune.audit import checks
from fine_tune.audit.account import Account
from fine_tune.audit.checks import Check
from fine_tune.text.template import ChatTemplate, load_template

Tokenizer = PreTrainedTokenizerFast
SOUND = Account(
    num_rows=10, num_tokens=200, num_learned=80, num_turns=20, num_stops=20, num_unknown=0, num_repeated=0, masked=(),
    doubled_bos=(), num_without_bos=0, frequent=(), num_train_turns=18,
)  # fmt: skip


def judged(tokenizer: Any, **changes: Any) -> dict[str, Check]:
    return {one.name: one for one in checks.account_checks(replace(SOUND, **changes), tokenizer, stop="</s>")}


def test_sound_rows_pass_and_the_figures_are_told(characters: Tokenizer) -> None:
    found = judged(characters)
    assert {one.outcome for one in found.values()} == {"passed"}
    assert [one.says for one in found.values()] == [
        "40.0% of the tokens are learned, some in every row.",
        "20 of 20 learned turns end in '</s>'.",
        "10 of 10 rows begin with <s>, none with two.",
        "0 of 200 tokens (0.00%) are unknown to the vocabulary.",
    ]


@pytest.mark.parametrize(
    ("changes", "name", "outcome", "says"),
    [
        ({"masked": ("r1", "r2")}, "something to learn", "failed", "nothing is learned in r1, r2"),
        ({"num_learned": 0}, "something to learn", "failed", "no token of any row"),
        (
            {"num_stops": 0},
            "end of turn",
            "failed",
            "0 of 20 learned turns end in '</s>': a model trained on them does not stop",
        ),
        ({"num_stops": 19}, "end of turn", "look", "19 of 20 .*95.0%.*cut"),
        ({"doubled_bos": ("r3",)}, "begin of text", "failed", "<s> stands twice in a row in r3"),
        ({"num_unknown": 2}, "known tokens", "look", r"2 of 200 tokens \(1.00%\)"),
        ({"num_unknown": 3}, "known tokens", "failed", r"1.50%.*at most 1%"),
    ],
)
def test_what_is_off_is_told(
    characters: Tokenizer, changes: dict[str, Any], name: str, outcome: str, says: str
) -> None:
    found = judged(characters, **changes)
    assert {one.name: one.outcome for one in found.values() if one.outcome != "passed"} == {name: outcome}
    with pytest.raises(ValueError, match=says):
        raise ValueError(found[name].says)


class Beginning:
    """A tokenizer that puts a begin of text before every text, or not."""

    bos_token, bos_token_id = "<s>", 1

    def __init__(self, puts: bool) -> None:
        self.puts = puts

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, 5] if self.puts else [5]}


@pytest.mark.parametrize(("puts", "outcome"), [(True, "look"), (False, "passed")])
def test_rows_without_the_begin_that_the_tokenizer_puts_there(puts: bool, outcome: str) -> None:
    assert judged(Beginning(puts), num_without_bos=4)["begin of text"].outcome == outcome


def test_a_tokenizer_without_a_begin_has_none_to_lack() -> None:
    assert judged(SimpleNamespace(bos_token=None))["begin of text"].says == "the tokenizer has no such token."


def test_prompts_that_differ_fail_with_row_and_place() -> None:
    passed = checks.prompts_check([("r1", []), ("r2", [])], 3, ["previews"])
    assert passed == Check("one prompt", "passed", "3 prompts of 2 rows have the same ids in training, previews.")
    failed = checks.prompts_check([("r1", []), ("r2", ["previews, answer 1: token 3"])], 3, ["previews"])
    assert failed.outcome == "failed"
    assert failed.says == "training, previews differ in 1 of 2 rows: r2: previews, answer 1: token 3"
    assert checks.prompts_check([], 0, ["previews"]).outcome == "look"


@pytest.mark.parametrize(
    ("check", "outcome"),
    [
        (checks.table_check([], 5, 0), "passed"),
        (checks.table_check(["r1"], 5, 0), "failed"),
        (checks.table_check([], 5, 1), "failed"),
        (checks.sides_check([], 5), "passed"),
        (checks.sides_check(["r1"], 5), "failed"),
        (checks.length_check(512, 512), "passed"),
        (checks.length_check(513, 512), "failed"),
        (checks.length_check(513, None), "look"),
        (checks.room_check(0, 100), "passed"),
        (checks.room_check(1, 100), "look"),
    ],
)
def test_each_limit_is_where_it_should_be(check: Check, outcome: str) -> None:
    assert check.outcome == outcome


def own(chat_template: str | None, characters: Tokenizer, template: ChatTemplate) -> Check:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = chat_template
    return checks.own_template_check(template, tokenizer)


def test_the_tokenizers_own_template_is_compared(characters: Tokenizer, template: ChatTemplate) -> None:
    chatml = load_template("chatml", bos_token="<s>", eos_token="</s>", end_of_turn="</s>")
    assert own(None, characters, template).says == "the tokenizer brings none."
    same = own(chatml.source.replace("end_of_turn", "eos_token"), characters, chatml)
    assert (same.outcome, same.says) == ("passed", "chatml writes what the tokenizer's own does.")
    other = own(chatml.source.replace("end_of_turn", "eos_token"), characters, template)
    assert other.outcome == "look"
    assert "guanaco writes '<s>### Human: one### Assistant: two</s>### Human: three### Assistant:'" in other.says
    assert "the tokenizer's own '<s><|im_start|>user" in other.says


def test_a_template_that_refuses_is_told(characters: Tokenizer, template: ChatTemplate) -> None:
    refused = own("{{ raise_exception('no such talk') }}", characters, template)
    assert (refused.outcome, refused.says) == ("look", "it cannot be compared: no such talk")
