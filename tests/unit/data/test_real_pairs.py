"""Real preference pairs through real tokenizers: both sides are the two answers, and the prompt is never learned."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fine_tune.data.prepare import Prepared, PrepareSpec, prepare
from fine_tune.data.readers import read_local
from fine_tune.data.sources.registry import find_format, parse_options
from fine_tune.text.conversation import PreferencePair
from fine_tune.text.encode import Encoder
from fine_tune.text.pairs import EncodedPair, encode_pairs
from fine_tune.text.template import load_template

pytestmark = pytest.mark.real

TOKENIZERS = ["llama", "mistral", "phi", "pythia"]
OVERFLOWS = ["drop", "truncate_prompt", "truncate_completion", "keep_last_turns"]
# Every tokenizer and every policy once by default, and a fifth of the rows; all of them in the drill.
POLICIES = [
    pytest.param(name, overflow, marks=() if (one - other) % 4 == 1 else pytest.mark.drill)
    for one, name in enumerate(TOKENIZERS)
    for other, overflow in enumerate(OVERFLOWS)
]
every = pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.drill)])
FILES = {
    "ultrafeedback": ("ultrafeedback", "preference/ultrafeedback_train_1000.jsonl", 1000),
    "ultrafeedback_eval": ("ultrafeedback", "preference/ultrafeedback_eval_200.jsonl", 200),
    "instructions": ("preferences", "preference/instruction-data-with-preference.json", 1100),
}


@cache
def load(folder: Path, name: str) -> PreTrainedTokenizerBase:
    place = str(folder / "tokenizers" / name)
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        place, trust_remote_code=False, local_files_only=True
    )
    return found


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, real_data: Path) -> PreTrainedTokenizerBase:
    return load(real_data, request.param)


@cache
def pairs(folder: Path, name: str) -> list[PreferencePair]:
    format_name, file, count = FILES[name]
    refused: list[str] = []
    reader = find_format(format_name).read
    rows = reader(read_local(str(folder / file)), parse_options(format_name, {}), lambda *why: refused.append(why[1]))
    found = [row for row in rows if isinstance(row, PreferencePair)]
    assert len(found) + len(refused) == count
    return found


def normal(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """What a tokenizer keeps of a text: Pythia's composes characters (NFC)."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None or "NFC" not in repr(normalizer):
        return lambda text: text
    return lambda text: str(normalizer.normalize_str(text))


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of ids in the middle of a text: SentencePiece drops the first space, so a line goes before."""
    line = tokenizer("\n", add_special_tokens=False)["input_ids"]
    text: str = tokenizer.decode([*line, *ids], clean_up_tokenization_spaces=False)
    return text.partition("\n")[2]


@every
@pytest.mark.parametrize("template_name", ["guanaco", "llama2", "mistral_instruct", "phi2"])
@pytest.mark.parametrize("name", ["ultrafeedback_eval", "instructions"])
def test_the_completions_are_the_two_answers_and_their_ends(
    real_data: Path, tokenizer: PreTrainedTokenizerBase, name: str, template_name: str, every: int
) -> None:
    template = load_template(template_name, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    encoder, keep, stop = Encoder(tokenizer, template), normal(tokenizer), template.end_of_turn
    rows = pairs(real_data, name)[:: 4 * every]
    assert len(rows) >= 10
    same = tokenizer.bos_token_id == tokenizer.eos_token_id
    for row, encoded in zip(rows, encode_pairs(encoder, rows), strict=True):
        assert isinstance(encoded, EncodedPair)
        for answer, ids in ((row.chosen, encoded.chosen_ids), (row.rejected, encoded.rejected_ids)):
            # The space that a format puts around an answer belongs to the completion.
            tidy = decode(tokenizer, ids).strip().removesuffix(stop).rstrip() + stop
            assert tidy == keep(answer.strip()) + stop
            assert ids[-1] == tokenizer.eos_token_id
            assert ids.count(tokenizer.bos_token_id) == same
        bos = 0 if template_name == "phi2" else 1
        assert encoded.prompt_ids.count(tokenizer.bos_token_id) == bos
        assert (encoded.has_bos, encoded.num_stops) == (bool(bos), 2)


@every
@pytest.mark.parametrize("template_name", ["guanaco", "llama2", "instruct", "phi2"])
def test_training_generation_and_preferences_see_the_same_tokens(
    real_data: Path, tokenizer: PreTrainedTokenizerBase, template_name: str, every: int
) -> None:
    template = load_template(template_name, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    encoder = Encoder(tokenizer, template)
    rows = pairs(real_data, "ultrafeedback")[:: 10 * every] + pairs(real_data, "instructions")[:: 20 * every]
    assert len(rows) >= 20
    for row, encoded in zip(rows, encode_pairs(encoder, rows), strict=True):
        assert isinstance(encoded, EncodedPair)
        assert encoded.prompt_ids == encoder.encode_prompt(row.prompt)
        for side, ids in ((row.chosen, encoded.chosen_ids), (row.rejected, encoded.rejected_ids)):
            talk = row.conversation(side)
            whole = tokenizer(template.render(talk.messages), add_special_tokens=False)["input_ids"]
            assert encoded.prompt_ids + ids == encoder.encode(talk).input_ids
            assert encoded.prompt_ids + ids == whole[: len(encoded.prompt_ids) + len(ids)]


def prepared(folder: Path, tokenizer_name: str, cache_dir: Path, **changes: Any) -> Prepared:
    tokenizer = load(folder, tokenizer_name)
    template = load_template("guanaco", bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    spec = PrepareSpec(
        format="ultrafeedback",
        path=str(folder / FILES["ultrafeedback"][1]),
        val_path=str(folder / FILES["ultrafeedback_eval"][1]),
        max_lost_share=1.0,
        cache_dir=str(cache_dir),
        num_eval_items=5,
        max_examples=150,
        max_val_examples=100,
        lint="drop",
        **changes,
    )
    return prepare(spec, tokenizer, template)


@pytest.mark.parametrize(("name", "overflow"), POLICIES)
def test_the_ledger_of_real_pairs_adds_up_and_only_one_policy_cuts_an_end(
    real_data: Path, name: str, overflow: str, tmp_path: Path
) -> None:
    found = prepared(real_data, name, tmp_path, overflow=overflow, max_seq_len=256)
    found.ledger.check()
    total = found.ledger.total
    assert total.read == 1200
    assert total.kept == len(found.train) + len(found.val) > 30
    assert total.tokens.kept == len(found.train.ids) + len(found.val.ids)
    assert total.tokens.supervised == found.train.supervised.sum() + found.val.supervised.sum()
    assert total.dropped["identical_pair"] >= 4
    stop = load(real_data, name).eos_token_id
    ends = set()
    for table in (found.train, found.val):
        for index in range(len(table)):
            ids, mask = table.row(index)
            chosen, rejected = table.branches(index)
            assert not mask[:chosen].any()
            assert mask[chosen:].all()
            assert 0 < chosen < rejected < len(ids)
            assert chosen + max(rejected - chosen, len(ids) - rejected) <= 256
            assert not np.array_equal(ids[chosen:rejected], ids[rejected:])
            ends |= {bool(ids[rejected - 1] == stop), bool(ids[-1] == stop)}
    assert ends == ({True, False} if overflow == "truncate_completion" else {True})
    assert (total.tokens.cut > 0) == (overflow in ("truncate_prompt", "truncate_completion"))


def test_the_length_bias_of_ultrafeedback_is_told(real_data: Path, tmp_path: Path) -> None:
    found = prepared(real_data, "llama", tmp_path, max_seq_len=2048)
    bias = found.length_bias
    assert bias is not None
    assert bias.num_pairs == len(found.train)
    sides = [
        (b - a, n - b)
        for (a, b), n in ((found.train.branches(i), found.train.lengths[i]) for i in range(bias.num_pairs))
    ]
    assert bias.mean_chosen == pytest.approx(np.mean([chosen for chosen, _ in sides]))
    assert bias.mean_rejected == pytest.approx(np.mean([rejected for _, rejected in sides]))
    assert bias.chosen_longer == np.mean([chosen > rejected for chosen, rejected in sides])
    assert found.warnings[-2:] == bias.sentences()
