from types import SimpleNamespace
from typing import Any

import pytest

from fine_tune.audit.account import Account, take_account
from fine_tune.audit.stretches import learned_stretches, row_stretches
from fine_tune.data.table import TokenTable

from .conftest import MakeTable

UNK, BOS, EOS = 0, 1, 2


def names(bos: int | None = BOS, eos: int = EOS, unk: int | None = UNK) -> Any:
    return SimpleNamespace(bos_token_id=bos, eos_token_id=eos, unk_token_id=unk)


def counted(train: TokenTable, *, val: TokenTable | None = None, tokenizer: Any = None) -> Account:
    empty = TokenTable.from_rows([])
    return take_account(train, empty if val is None else val, tokenizer or names(), stop_ids={EOS})


def test_stretches_end_with_the_mask_and_with_the_row(make_table: MakeTable) -> None:
    table = make_table(([1, 5, 6, 2, 5, 7, 2], "..xx.xx"), ([8, 2], "xx"), ([1, 9], ".."), ([1, 2], ".x"))
    starts, ends = learned_stretches(table)
    assert starts.tolist() == [2, 5, 7, 12]
    assert ends.tolist() == [4, 7, 9, 13]
    assert row_stretches(table, 0) == [(2, 4), (5, 7)]
    assert row_stretches(table, 2) == []


def test_the_sides_of_a_pair_are_two_stretches(pair_table: TokenTable) -> None:
    starts, ends = learned_stretches(pair_table)
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == [(2, 4), (4, 7), (10, 11), (11, 12)]
    assert row_stretches(pair_table, 1) == [(3, 4), (4, 5)]


def test_an_empty_table_has_no_stretch() -> None:
    assert [found.tolist() for found in learned_stretches(TokenTable.from_rows([]))] == [[], []]
    found = counted(TokenTable.from_rows([]))
    assert (found.num_rows, found.learned_share, found.stop_rate, found.unknown_share) == (0, 0.0, 0.0, 0.0)


def test_figures_are_over_both_tables(make_table: MakeTable, pair_table: TokenTable) -> None:
    train = make_table(([1, 5, 6, 2], "..xx"), ([1, 5, 6], "..x"))
    found = counted(train, val=pair_table)
    assert (found.num_rows, found.num_tokens, found.num_learned) == (4, 19, 10)
    assert found.learned_share == 10 / 19
    # Of the turns 562, 56; 62, 782; 6, 2 four end in 2.
    assert (found.num_turns, found.num_stops, found.stop_rate) == (6, 4, 4 / 6)
    assert found.num_train_turns == 2


def test_unknown_tokens_count_unless_they_are_the_end_of_text(make_table: MakeTable) -> None:
    train = make_table(([1, 0, 0, 2], "..xx"))
    assert counted(train).unknown_share == 0.5
    assert counted(train, tokenizer=names(bos=0, eos=0, unk=0)).num_unknown == 0
    assert counted(train, tokenizer=names(unk=None)).num_unknown == 0


def test_rows_without_anything_learned_are_named(make_table: MakeTable) -> None:
    train = make_table(([1, 5], ".."), ([1, 5], ".x"), ([1, 5, 6], "..."))
    assert counted(train).masked == ("row0", "row2")


def test_one_begin_of_text_behind_another_is_named(make_table: MakeTable) -> None:
    # Of row 2 the end and of row 3 the beginning meet, and row 1 has one before each exchange.
    train = make_table(([1, 1, 5, 2], "...x"), ([1, 5, 2, 1, 5, 2], "..x..x"), ([1, 5, 1], "..x"), ([1, 5], ".x"))
    assert counted(train).doubled_bos == ("row0",)
    assert counted(train, tokenizer=names(bos=None)).doubled_bos == ()


def test_an_end_that_is_also_the_begin_may_be_followed_by_it(make_table: MakeTable) -> None:
    train = make_table(([1, 1, 5, 1], "...x"), ([1, 5, 1, 1, 5, 1], "..x..x"))
    assert counted(train, tokenizer=names(eos=BOS)).doubled_bos == ("row0",)


@pytest.mark.parametrize(("bos", "expected"), [(1, 1), (5, 1), (None, 0)])
def test_rows_that_do_not_begin_with_it_are_counted(make_table: MakeTable, bos: int | None, expected: int) -> None:
    train = make_table(([1, 6], ".x"), ([5, 6], ".x"))
    assert counted(train, tokenizer=names(bos=bos)).num_without_bos == expected


def test_what_is_said_again_and_again(make_table: MakeTable) -> None:
    train = make_table(
        ([1, 5, 6, 2], "..xx"),
        ([1, 7, 6, 2], "..xx"),
        ([1, 5, 6, 2], "..xx"),
        ([1, 5, 6, 2], ".xxx"),
        ([1, 9, 8, 2], "..xx"),
    )
    found = counted(train)
    assert found.frequent == ((3, (6, 2)),)
    # The fourth row has the ids of the first, and another mask.
    assert found.num_repeated == 1
