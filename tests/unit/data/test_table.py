import pickle
from pathlib import Path

import numpy as np
import pytest

from fine_tune.data.table import TokenTable
from fine_tune.text.encode import Encoded
from fine_tune.text.pairs import EncodedPair

ROWS = [
    ("a", Encoded([1, 5, 6], [False, True, True])),
    ("b", Encoded([1, 7], [False, True])),
    ("c", Encoded([1, 8, 9, 70000], [False, False, True, False])),
]


def check(table: TokenTable) -> None:
    assert len(table) == 3
    assert table.row_ids == ["a", "b", "c"]
    assert (table.ids.dtype, table.loss_mask.dtype, table.offsets.dtype) == (np.int32, np.bool_, np.int64)
    assert table.ids.tolist() == [1, 5, 6, 1, 7, 1, 8, 9, 70000]
    assert table.offsets.tolist() == [0, 3, 5, 9]
    assert table.lengths.tolist() == [3, 2, 4]
    assert table.supervised.tolist() == [2, 1, 1]
    for index, (_, encoded) in enumerate(ROWS):
        ids, mask = table.row(index)
        assert (ids.tolist(), mask.tolist()) == (encoded.input_ids, encoded.loss_mask)


def test_rows_lie_end_to_end() -> None:
    check(TokenTable.from_rows(ROWS))


def test_a_saved_table_is_mapped_back_without_a_copy(tmp_path: Path) -> None:
    TokenTable.from_rows(ROWS).save(tmp_path / "t.arrow")
    table = TokenTable.open(tmp_path / "t.arrow")
    check(table)
    assert not table.ids.flags.owndata
    assert not table.ids.flags.writeable


def test_a_mapped_table_can_be_sent_to_a_worker_process(tmp_path: Path) -> None:
    TokenTable.from_rows(ROWS).save(tmp_path / "t.arrow")
    check(pickle.loads(pickle.dumps(TokenTable.open(tmp_path / "t.arrow"))))


def test_an_empty_table_has_no_rows(tmp_path: Path) -> None:
    TokenTable.from_rows([]).save(tmp_path / "t.arrow")
    for table in (TokenTable.from_rows([]), TokenTable.open(tmp_path / "t.arrow")):
        assert (len(table), table.lengths.tolist(), table.supervised.tolist()) == (0, [], [])


def test_a_pair_says_where_its_completions_begin_and_other_rows_say_nothing(tmp_path: Path) -> None:
    pair = EncodedPair([1, 5], [6, 7, 2], [8, 2])
    TokenTable.from_rows([*ROWS[:1], ("p", pair), *ROWS[1:], ("q", pair)]).save(tmp_path / "t.arrow")
    for table in (
        TokenTable.open(tmp_path / "t.arrow"),
        pickle.loads(pickle.dumps(TokenTable.open(tmp_path / "t.arrow"))),
    ):
        assert [table.branches(i) for i in range(5)] == [(), (2, 5), (), (), (2, 5)]
        assert [array.tolist() for array in table.row(1)] == [[1, 5, 6, 7, 2, 8, 2], [False] * 2 + [True] * 5]
        assert (table.lengths[1], table.supervised[1]) == (7, 5)
        assert all(type(branch) is int for branch in table.branches(1))


@pytest.mark.parametrize("index", [-1, 3])
def test_a_row_that_is_not_there_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match=f"row {index} of a table of 3 rows"):
        TokenTable.from_rows(ROWS).row(index)
    with pytest.raises(IndexError, match=f"row {index} of a table of 3 rows"):
        TokenTable.from_rows(ROWS).branches(index)


def test_rows_that_are_there_twice_are_named() -> None:
    same, other_mask = Encoded([1, 5], [False, True]), Encoded([1, 5, 6], [False, False, True])
    rows = [
        ("a", same), ("b", Encoded([1, 5, 6], [False, True, True])), ("c", same), ("d", other_mask), ("e", same),
        # A copy that a mix asks for has its row's name.
        ("b", Encoded([1, 5, 6], [False, True, True])),
        ("p", EncodedPair([1], [5], [6])), ("q", EncodedPair([1], [5, 6], [7])), ("r", EncodedPair([1], [5], [6])),
        # The same tokens in the same order, the sides cut elsewhere.
        ("s", EncodedPair([1], [5], [6, 7])),
    ]  # fmt: skip
    assert TokenTable.from_rows(rows).repeated() == [("c", "a"), ("e", "a"), ("r", "p")]
    assert TokenTable.from_rows([]).repeated() == []
