"""The ids that a model is asked for are those after which it learned, and an audit notices where they are not."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fine_tune.audit.prompts import Askers, asked_prompts
from fine_tune.chat.speaker import Speaker
from fine_tune.evaluation.answers import Answerer
from fine_tune.text.conversation import Document, Message
from fine_tune.text.encode import Encoder
from fine_tune.text.template import ChatTemplate

from .small_data import Data, pair, talk

Tokenizer = PreTrainedTokenizerFast
Look = Callable[..., list[list[str]]]
TALKS = [talk("q", "an", "r", "b"), talk("what", "that")]
PLACES = ("previews", "evaluations", "chat")


@pytest.fixture
def look(tmp_path: Path, characters: Tokenizer, template: ChatTemplate) -> Look:
    """What is found of rows, prepared before anything is changed."""
    prepared = {
        "talks": Data(tmp_path, characters, template, TALKS),
        "pairs": Data(tmp_path / "p", characters, template, [pair("good", "very bad")], format="preferences"),
    }
    return lambda kind="talks": Askers(characters, template).differences(prepared[kind].rows)


@pytest.mark.parametrize("kind", ["talks", "pairs"])
def test_prompts_are_the_same_everywhere(look: Look, kind: str) -> None:
    assert look(kind) == [[] for _ in (TALKS if kind == "talks" else [0])]


def test_every_answer_of_a_conversation_is_asked_for(
    characters: Tokenizer, template: ChatTemplate, tmp_path: Path
) -> None:
    data = Data(tmp_path, characters, template, TALKS)
    assert [len(asked_prompts(row.row)) for row in data.rows] == [2, 1]
    assert asked_prompts(data.rows[0].row)[1] == (
        Message("user", "q"),
        Message("assistant", "an"),
        Message("user", "r"),
    )
    assert asked_prompts(Document("text", "id", "group")) == []


def test_another_way_to_encode_a_prompt_is_noticed_everywhere(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_prompt = Encoder.encode_prompt
    monkeypatch.setattr(Encoder, "encode_prompt", lambda self, messages: encode_prompt(self, messages)[:-1])
    found = look()
    assert [len(problems) for problems in found] == [6, 3]
    assert found[1] == [
        f"{place}, answer 1: token 29 of 30 learned after is not that of 29 asked after" for place in PLACES
    ]


def test_another_token_in_its_middle_is_noticed(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_prompt = Encoder.encode_prompt
    changed = {4: 5}

    def other(self: Encoder, messages: Sequence[Message]) -> list[int]:
        return [changed.get(place, token) for place, token in enumerate(encode_prompt(self, messages))]

    monkeypatch.setattr(Encoder, "encode_prompt", other)
    assert look()[1][0] == "previews, answer 1: token 4 of 30 learned after is not that of 30 asked after"


def test_a_preview_of_its_own_is_noticed_by_its_name(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(self: Answerer, conversations: Sequence[Sequence[Message]], **options: Any) -> Any:
        texts = [self.template.render(conversation, add_generation_prompt=True) for conversation in conversations]
        # A second begin of text, which the tokenizer's own call often puts there.
        return self.continue_prompts([[1, *ids] for ids in self.tokenizer(texts)["input_ids"]], **options)

    monkeypatch.setattr(Answerer, "answer", answer)
    assert [problem.partition(":")[0] for problem in look()[0]] == ["previews, answer 1", "previews, answer 2"]


def test_a_chat_that_forgets_is_noticed(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Speaker, "prompt", lambda self, messages: self.encoder.encode_prompt(messages[-1:]))
    assert [[problem.partition(":")[0] for problem in problems] for problems in look()] == [["chat, answer 2"], []]


def test_a_refused_prompt_is_told(look: Look, monkeypatch: pytest.MonkeyPatch, characters: Tokenizer) -> None:
    from fine_tune.text.template import TemplateMismatch

    def refuse(self: Any, messages: Any) -> list[int]:
        raise TemplateMismatch("no such turn")

    monkeypatch.setattr(Speaker, "prompt", refuse)
    assert look()[1] == ["chat refuse prompts: template_mismatch: no such turn"]


def test_an_answer_that_is_not_learned_is_noticed(
    characters: Tokenizer, template: ChatTemplate, tmp_path: Path
) -> None:
    data = Data(tmp_path, characters, template, TALKS)
    table = data.prepared.train
    table.loss_mask = table.loss_mask.copy()
    table.loss_mask[:31] = False
    assert Askers(characters, template).differences(data.rows)[0][0] == "2 answers, but 1 learned stretches"
