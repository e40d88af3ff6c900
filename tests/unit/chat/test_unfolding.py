"""Text comes in pieces that are certain, and together they are what decoding at once gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fine_tune.chat.unfolding import Unfolding
from fine_tune.world import tokenizer as world

TEXTS = [
    "Plain words, one after the other.",
    "  leading and trailing  \n\n",
    "\u00dcber \u4e2d\u6587 \U0001f469\u200d\U0001f680 caf\u00e9 \u0928\u092e\u0938\u094d\u0924\u0947 na\u00efve",
    "def f(x):\n\treturn [x ** 2\n\n\n        for _ in range(3)]  # done",
    "\U0001f600" * 40,
    "do n't , you see ? It 's \ufffd in the middle .",
    "a" * 300 + " \u20ac" * 60,
    "",
    "\n",
]


def byte_level() -> PreTrainedTokenizerFast:
    """One token per byte: every character beyond ASCII comes in parts."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As SentencePiece does it: a space before the first word, bytes for what the vocabulary lacks."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127)), "\u2581", "\u20ac"]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def unfold(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[list[str], Unfolding]:
    text = Unfolding(tokenizer)
    return [text.add(token) for token in ids], text


def check(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces, unfolding = unfold(tokenizer, ids)
    whole = tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert unfolding.text() == whole
    assert whole.startswith(unfolding.shown), (whole, unfolding.shown)
    assert "".join(pieces) == unfolding.shown
    # What waits is white space that may be the end; a character that is whole does not wait.
    assert unfolding.shown == whole.rstrip("\ufffd").rstrip()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_pieces_join_to_the_whole(make: object, text: str) -> None:
    check(make(), text)  # type: ignore[operator]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_the_built_in_tokenizer_join_to_the_whole(text: str) -> None:
    folder = Path(world.__file__).parent / "base"
    check(AutoTokenizer.from_pretrained(str(folder), local_files_only=True), text)


@pytest.mark.real
@pytest.mark.parametrize("name", ["llama", "mistral", "phi", "pythia"])
def test_pieces_of_real_tokenizers_join_to_the_whole(name: str, real_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(real_data / "tokenizers" / name), local_files_only=True)
    for text in TEXTS:
        check(tokenizer, text)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_no_character_is_shown_before_its_last_byte(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    text = "a\u00e9\u4e2d\U0001f600"
    shown = ""
    text_of = Unfolding(tokenizer)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        shown += text_of.add(token)
        assert text.startswith(shown)
    assert shown == text


def test_white_space_waits_for_what_follows() -> None:
    tokenizer = byte_level()
    ids = tokenizer("\n a \n b \n", add_special_tokens=False)["input_ids"]
    pieces, text = unfold(tokenizer, ids)
    assert [piece for piece in pieces if piece] == ["a", " \n b"]
    assert text.text() == "a \n b"


def test_bytes_that_are_no_character_are_shown_at_the_end() -> None:
    tokenizer = byte_level()
    ids = tokenizer("ok\U0001f600", add_special_tokens=False)["input_ids"][:-1]
    pieces, text = unfold(tokenizer, ids)
    assert "".join(pieces) == "ok"
    assert text.text() == "ok\ufffd"


def test_a_decoder_that_changes_its_mind_is_noticed() -> None:
    tokenizer = byte_fallback()
    euro = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "\u00e9".encode()]
    pieces, text = unfold(tokenizer, [*euro, tokenizer.convert_tokens_to_ids("<0xFF>")])
    assert pieces == ["", "\u00e9", ""]
    assert text.text() == "\ufffd\ufffd\ufffd"
    assert not text.text().startswith(text.shown)


def test_only_the_last_tokens_are_decoded_again() -> None:
    tokenizer = byte_level()
    lengths: list[int] = []

    class Counting:
        def decode(self, ids: list[int], **options: bool) -> str:
            lengths.append(len(ids))
            return str(tokenizer.decode(ids, **options))

    ids = tokenizer("word " * 400, add_special_tokens=False)["input_ids"]
    text = Unfolding(Counting())
    for token in ids:
        text.add(token)
    assert len(ids) == 2000
    assert max(lengths) <= 40
