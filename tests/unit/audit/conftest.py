from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fine_tune.data.table import TokenTable
from fine_tune.text.encode import Encoded
from fine_tune.text.pairs import EncodedPair
from fine_tune.text.template import ChatTemplate, load_template

SPECIAL = ["<unk>", "<s>", "</s>"]
MakeTable = Callable[..., TokenTable]


@pytest.fixture(scope="session")
def characters() -> PreTrainedTokenizerFast:
    """One token per character: ids can be written down by hand."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *(chr(code) for code in range(32, 127)), "\n"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def template() -> ChatTemplate:
    return load_template("guanaco", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def make_table() -> MakeTable:
    """A table of rows written as ids and, with as many characters, a mask: `x` is learned."""

    def make(*rows: tuple[list[int], str]) -> TokenTable:
        encoded = [Encoded(ids, [mark == "x" for mark in marks]) for ids, marks in rows]
        return TokenTable.from_rows((f"row{n}", one) for n, one in enumerate(encoded))

    return make


@pytest.fixture(scope="session")
def pair_table() -> TokenTable:
    sides = [EncodedPair([1, 5], [6, 2], [7, 8, 2]), EncodedPair([1, 5, 5], [6], [2])]
    return TokenTable.from_rows((f"pair{n}", one) for n, one in enumerate(sides))


@pytest.fixture(scope="session")
def byte_level(repository: Path) -> PreTrainedTokenizerFast:
    """The built-in tokenizer."""
    return PreTrainedTokenizerFast.from_pretrained(str(repository / "fine_tune" / "world" / "base"))
