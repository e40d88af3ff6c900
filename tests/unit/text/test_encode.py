import copy

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fine_tune.errors import ConfigError
from fine_tune.text.conversation import Conversation, Document, Message, RowRefused
from fine_tune.text.encode import Encoder, encode, encode_prompt
from fine_tune.text.template import ChatTemplate, load_template
from fine_tune.text.tokenizer import tokenizer_fingerprint

TOKENIZERS = ["characters", "prefixing", "without_bos"]


def talk(*contents: str, system: str | None = None) -> Conversation:
    messages = [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(contents)]
    if system is not None:
        messages.insert(0, Message("system", system))
    return Conversation(tuple(messages), "id", "group")


def template(name: str, tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    return load_template(name, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    found: PreTrainedTokenizerFast = request.getfixturevalue(request.param)
    return found


def test_ids_and_mask_of_one_exchange_by_hand(characters: PreTrainedTokenizerFast) -> None:
    encoded = encode(talk("hi", "yo"), characters, template("world", characters))
    user, assistant, end, unk_free = 3, 4, 6, 7
    newline = unk_free + 95
    letter = {c: unk_free + ord(c) - 32 for c in "hiyo"}
    prompt = [1, user, newline, letter["h"], letter["i"], end, newline, assistant, newline]
    assert encoded.input_ids == [*prompt, letter["y"], letter["o"], end]
    assert encoded.loss_mask == [False] * 9 + [True] * 3
    assert (encoded.turn_starts, encoded.turn_ends) == ([9], [12])
    assert (encoded.has_bos, encoded.num_stops, encoded.num_supervised) == (True, 1, 3)


def test_every_turn_is_learned_with_its_end_and_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(talk("q1", "a1", "q2", "a2", system="s"), tokenizer, template("world", tokenizer))
    learned = [
        tokenizer.decode(encoded.input_ids[a:b])
        for a, b in zip(encoded.turn_starts, encoded.turn_ends, strict=True)
    ]
    assert learned == ["a1<|end|>", "a2<|end|>"]
    covered = {i for a, b in zip(encoded.turn_starts, encoded.turn_ends, strict=True) for i in range(a, b)}
    assert [i in covered for i in range(len(encoded.input_ids))] == encoded.loss_mask
    assert encoded.num_stops == 2


@pytest.mark.parametrize(
    "name", ["world", "llama2", "mistral_instruct", "guanaco", "instruct", "plain", "phi2"]
)
def test_pieces_get_the_ids_that_they_have_in_the_whole_text(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    conversation = talk("q one", "a one", "q two\n", "a\ntwo", system="be kind")
    own = template(name, tokenizer)
    encoded = encode(conversation, tokenizer, own)
    whole = tokenizer(own.render(conversation.messages), add_special_tokens=False)["input_ids"]
    assert encoded.input_ids == whole[: len(encoded.input_ids)]
    assert tokenizer.decode(whole[len(encoded.input_ids) :]).strip("_\n") == ""


def test_without_the_anchor_a_prefixing_tokenizer_would_put_a_space_into_the_text(
    prefixing: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(prefixing, template("guanaco", prefixing))
    good = prefixing.decode(encoder.encode(talk("q", "a")).input_ids)
    monkeypatch.setattr(encoder._spans, "in_text", "")
    bad = prefixing.decode(encoder.encode(talk("q", "a")).input_ids)
    assert good == "<s>_### Human: q### Assistant: a_</s>".replace("a_<", "a<")
    assert bad == "<s>_### Human: q### Assistant:_ a</s>"


@pytest.mark.parametrize("name", ["world", "llama2", "guanaco", "instruct"])
@pytest.mark.parametrize("text", ["q", "q</s>", "<s>[INST] q", "<|assistant|>\nhi<|end|>"])
def test_a_generation_prompt_has_the_ids_of_the_training_prompt(
    tokenizer: PreTrainedTokenizerFast, name: str, text: str
) -> None:
    conversation = talk("first", f"one {text}", text, "two")
    own = template(name, tokenizer)
    encoded = encode(conversation, tokenizer, own)
    prompt = encode_prompt(conversation.messages[:-1], tokenizer, own)
    assert prompt == encoded.input_ids[: encoded.turn_starts[-1]]


@pytest.mark.parametrize("string", ["</s>", "<s>", "<|end|>", "<|assistant|>", "<unk>"])
@pytest.mark.parametrize("name", ["world", "llama2", "guanaco"])
def test_special_strings_of_a_user_stay_ordinary_tokens(
    tokenizer: PreTrainedTokenizerFast, name: str, string: str
) -> None:
    own = template(name, tokenizer)
    plain = encode(talk("x y", "z w"), tokenizer, own).input_ids
    hostile = encode(talk(f"x{string}y", f"z{string}w"), tokenizer, own).input_ids
    special = set(tokenizer.all_special_ids) | {3, 4, 5, 6}
    assert [i for i in hostile if i in special] == [i for i in plain if i in special]
    assert tokenizer.decode(hostile) == tokenizer.decode(plain).replace("x y", f"x{string}y").replace(
        "z w", f"z{string}w"
    )


def test_an_end_of_turn_that_is_an_ordinary_added_token_is_protected_too(
    prefixing: PreTrainedTokenizerFast,
) -> None:
    tokenizer = copy.deepcopy(prefixing)
    tokenizer.add_tokens(["<stop>"])
    own = load_template("guanaco", bos_token="<s>", eos_token="</s>", end_of_turn="<stop>")
    encoder = Encoder(tokenizer, own)
    ids = encoder.encode(talk("a<stop>b", "c<stop>d")).input_ids
    assert ids.count(encoder.end_of_turn_id) == 1
    assert ids[-1] == encoder.end_of_turn_id
    assert tokenizer.decode(ids[:-1]) == "<s>_### Human: a<stop>b### Assistant: c<stop>d"


@pytest.mark.parametrize("named_by", ["tokenizer", "backend"])
def test_an_end_of_turn_that_the_vocabulary_lacks_is_refused_by_name(named_by: str) -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "stop": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unknown = {"unk_token": "<unk>"} if named_by == "tokenizer" else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **unknown)
    absent = load_template("guanaco", bos_token=None, eos_token="</s>", end_of_turn="<|end|>")
    with pytest.raises(ConfigError, match=r"end-of-turn text '<\|end\|>' is not in this tokenizer's vocabulary") as caught:
        Encoder(tokenizer, absent)
    assert "model.add_tokens" in str(caught.value)
    assert "model.end_of_turn" in str(caught.value)
    # An ordinary word of the vocabulary may end a turn, and so may a token that was added.
    word = load_template("guanaco", bos_token=None, eos_token="</s>", end_of_turn="stop")
    assert Encoder(tokenizer, word).end_of_turn_id == 2
    tokenizer.add_tokens(["<|end|>"])
    assert Encoder(tokenizer, absent).end_of_turn_id == tokenizer.get_vocab()["<|end|>"]


def test_private_use_characters_of_a_user_are_kept_apart_from_the_markers(
    characters: PreTrainedTokenizerFast,
) -> None:
    own = template("guanaco", characters)
    ids = encode(talk("\U000f0000</s>", "a"), characters, own).input_ids
    unknown = characters.convert_tokens_to_ids("<unk>")
    assert ids.count(unknown) == 1
    assert "</s>### Assistant" in characters.decode(ids)
    with pytest.raises(RowRefused) as caught:
        encode(talk("\U000f0000\U00100000</s>", "a"), characters, own)
    assert caught.value.reason == "private_use_characters"


def test_bos_stands_exactly_where_the_template_writes_it(characters: PreTrainedTokenizerFast) -> None:
    conversation = talk("q", "a", "q", "a")
    counts = {
        name: encode(conversation, characters, template(name, characters)).input_ids.count(
            characters.bos_token_id
        )
        for name in ("world", "llama2", "mistral_instruct", "phi2")
    }
    assert counts == {"world": 1, "llama2": 2, "mistral_instruct": 1, "phi2": 0}


def test_a_tokenizer_that_adds_bos_itself_does_not_double_it(characters: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(characters)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert tokenizer("x")["input_ids"][0] == 1
    assert encode(talk("q", "a"), tokenizer, template("guanaco", tokenizer)).input_ids.count(1) == 1


def test_a_document_is_learned_whole_but_for_what_nothing_predicts(
    characters: PreTrainedTokenizerFast, without_bos: PreTrainedTokenizerFast
) -> None:
    document = Document("ab</s>c", "id", "group")
    with_bos = encode(document, characters, template("world", characters))
    assert characters.decode(with_bos.input_ids) == "<s>ab</s>c</s>"
    assert with_bos.input_ids.count(2) == 1
    assert with_bos.loss_mask == [False] + [True] * 8
    assert (with_bos.turn_starts, with_bos.turn_ends, with_bos.has_bos) == ([1], [9], True)
    bare = encode(document, without_bos, template("world", without_bos))
    assert without_bos.decode(bare.input_ids) == "ab</s>c</s>"
    assert bare.loss_mask == [False] + [True] * 7
    assert not bare.has_bos


def test_turns_behind_the_last_answer_are_not_encoded(characters: PreTrainedTokenizerFast) -> None:
    own = template("guanaco", characters)
    assert encode(talk("q", "a", "and?"), characters, own) == encode(talk("q", "a"), characters, own)


def test_many_rows_at_once_give_what_one_at_a_time_gives(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        talk("q", "a"),
        talk("q</s>", "a"),
        talk("", "a"),
        Document("text", "id", "g"),
        talk("q", "a", "r", "b"),
    ]
    encoder = Encoder(tokenizer, template("llama2", tokenizer))
    together = encoder.encode_many(rows)
    assert isinstance(together[2], RowRefused)
    assert together[2].reason == "empty_prompt"
    for index in (0, 1, 3, 4):
        assert together[index] == encoder.encode(rows[index])
    with pytest.raises(RowRefused, match="empty_prompt"):
        encoder.encode(rows[2])


def test_a_row_that_the_template_refuses_is_returned_with_the_reason(
    characters: PreTrainedTokenizerFast,
) -> None:
    row = Conversation((Message("assistant", "a"), Message("user", "q")), "id", "group")
    (refused,) = Encoder(characters, template("llama2", characters)).encode_many([row])
    assert isinstance(refused, RowRefused)
    assert refused.reason == "template_mismatch"


def test_an_end_of_turn_of_several_tokens_is_refused(characters: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"'<\|im_end\|>' is 10 tokens of this tokenizer.*model.add_tokens"):
        Encoder(characters, template("chatml", characters))


def test_the_fingerprint_of_a_tokenizer_changes_with_what_decides_ids(
    characters: PreTrainedTokenizerFast,
    prefixing: PreTrainedTokenizerFast,
    without_bos: PreTrainedTokenizerFast,
) -> None:
    own = tokenizer_fingerprint(characters)
    # A call with truncation leaves its setting in the backend.
    characters(["abc"], truncation=True, max_length=2)
    assert tokenizer_fingerprint(characters) == own
    assert len({own, tokenizer_fingerprint(prefixing), tokenizer_fingerprint(without_bos)}) == 3


def test_text_that_the_tokenizer_drops_is_refused() -> None:
    """A tokenizer without an unknown token gives nothing for what it does not know, and says nothing."""
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *(chr(code) for code in range(32, 127)), "\n"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert tokenizer("\u4e00\u4e8c", add_special_tokens=False)["input_ids"] == []
    encoder = Encoder(tokenizer, template("llama2", tokenizer))
    lost, found, empty = encoder.encode_many([talk("q", "\u4e00\u4e8c"), talk("q", "a\u4e00"), talk("\u4e00", "a")])
    assert isinstance(lost, RowRefused)
    assert lost.reason == "text_without_tokens"
    # What is learned of the others is there; that a prompt lost its words is for the audit to show.
    assert not isinstance(found, RowRefused)
    assert not isinstance(empty, RowRefused)
