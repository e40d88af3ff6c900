import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fine_tune.data.readers import RawRow, read_hub, read_local
from fine_tune.errors import DataError, EnvironmentProblem

GOOD = b'{"a": 1}\n'


def test_lines_arrays_and_parquet_give_the_same_records(tmp_path: Path) -> None:
    records = [{"a": 1, "b": "x\u00e9"}, {"a": 2, "b": None}]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
    (tmp_path / "r.json").write_text(json.dumps(records), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "r.parquet")
    assert read_local(str(tmp_path / "r.jsonl")) == [
        RawRow(records[0], "r.jsonl:1"),
        RawRow(records[1], "r.jsonl:2"),
    ]
    assert read_local(str(tmp_path / "r.json")) == [
        RawRow(records[0], "r.json[0]"),
        RawRow(records[1], "r.json[1]"),
    ]
    assert [row.data for row in read_local(str(tmp_path / "r.parquet"))] == records


def test_a_json_file_may_hold_lines(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_bytes(GOOD * 2)
    assert [row.where for row in read_local(str(file))] == ["r.json:1", "r.json:2"]


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf" + GOOD, b'{"a": 1}\r\n', b'\n\n{"a": 1}'])
def test_byte_order_marks_windows_lines_and_blank_lines_are_fine(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "r.jsonl"
    file.write_bytes(content)
    assert [row.data for row in read_local(str(file))] == [{"a": 1}]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "README.md").write_text("not data")
    assert [row.where for row in read_local(str(tmp_path))] == ["a.jsonl:1", "b.jsonl:1"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("r.jsonl", GOOD + b'{"a": 1', "r.jsonl:2: not JSON: Expecting ',' delimiter"),
        ("r.jsonl", GOOD + b"{'a': 1}", "r.jsonl:2: not JSON: Expecting property name"),
        ("r.jsonl", b'{"a": "caf\xe9"}', "r.jsonl:1: not UTF-8 (byte 10)"),
        ("r.jsonl", '{"a": 1}'.encode("utf-16"), "r.jsonl:1: not UTF-8 (byte 0)"),
        ("r.jsonl", b'{"a": "\\ud800"}', "r.jsonl:1: a lone surrogate"),
        ("r.jsonl", b'{"a": "\x00"}', "r.jsonl:1: not JSON: Invalid control character"),
        ("r.jsonl", b'{"a": 1, "a": 2}', "r.jsonl:1: the key 'a' appears twice"),
        ("r.jsonl", b"[1, 2]", "r.jsonl:1: not an object but list"),
        ("r.jsonl", b"null", "r.jsonl:1: not an object but null"),
        ("r.jsonl", b"", "r.jsonl: the file is empty"),
        ("r.json", b"[]", "r.json: the file is empty"),
        ("r.json", b'[{"a": 1}, 3]', "r.json[1]: not an object but int"),
        ("r.json", b'[{"a": 1},\n{"a"]', "r.json:2: not JSON: Expecting ':' delimiter"),
        ("r.parquet", b"PAR1 no", "r.parquet: not a readable parquet file"),
    ],
)
def test_damage_is_named_with_file_and_place(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_local(str(tmp_path / name))
    assert f"  - {problem}" in str(caught.value)
    assert str(caught.value).count("\n  - ") == 1


def test_a_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_bytes(b'{"a": "\\ud83d\\ude00"}')
    assert read_local(str(file))[0].data == {"a": "\U0001f600"}


def test_damage_is_reported_together_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"x\n" + GOOD + b"y\n")
    (tmp_path / "b.jsonl").write_bytes(b"z\n")
    with pytest.raises(DataError) as caught:
        read_local(str(tmp_path))
    named = [line.split(": ")[0] for line in str(caught.value).splitlines()[1:]]
    assert named == ["  - a.jsonl:1", "  - a.jsonl:3", "  - b.jsonl:1"]
    (tmp_path / "b.jsonl").write_bytes(b"z\n" * 100)
    with pytest.raises(DataError) as caught:
        read_local(str(tmp_path))
    assert str(caught.value).count("\n  - ") == 21
    assert str(caught.value).endswith("and possibly more")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "gone.jsonl", "no such file or folder"),
        (lambda folder: folder, "the folder holds no data file"),
    ],
)
def test_a_wrong_path_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_local(str(make(tmp_path)))


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"unknown kind of file. Use one of .jsonl, .json, .parquet"):
        read_local(str(tmp_path / "r.csv"))


def test_the_hub_out_of_reach_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        EnvironmentProblem, match=r"owner/name@abc is not in the local cache.*data.path="
    ) as caught:
        list(read_hub("owner/name", subset=None, revision="abc", split="train"))
    assert "\n" not in str(caught.value)


def probed(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[bool]:
    """Let the hub's client fail, and return a list that will say whether rows were then asked for offline."""
    import datasets
    from huggingface_hub import HfApi, constants

    offline: list[bool] = []

    def fail(*args: Any, **options: Any) -> None:
        raise error

    def load(*args: Any, **options: Any) -> list[Any]:
        offline.append(constants.HF_HUB_OFFLINE)
        return []

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", fail)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return offline


def transport_errors() -> list[Exception]:
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    transport = sys.modules[HTTPError.__module__.partition(".")[0]]
    names = ("ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError", "TooManyRedirects", "UnsupportedProtocol")
    return [*(getattr(transport, name)("no") for name in names), OfflineModeIsEnabled("off"), OSError("no route")]


@pytest.mark.parametrize("error", [*transport_errors(), ValueError("Expecting value: a login page")], ids=repr)
def test_where_nothing_answers_the_cache_is_read(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    offline = probed(monkeypatch, error)
    assert list(read_hub("owner/name", subset=None, revision=None, split="train")) == []
    assert offline == [True]


def test_a_name_that_is_none_does_not_mean_that_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import HFValidationError

    offline = probed(monkeypatch, HFValidationError("Repo id must be"))
    assert list(read_hub("a b", subset=None, revision=None, split="train")) == []
    assert offline == [False]


@pytest.mark.parametrize("error", [TypeError("an argument is gone"), KeyError("id"), AttributeError("dataset_info")])
def test_a_mistake_of_ours_is_not_taken_for_a_lost_connection(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    offline = probed(monkeypatch, error)
    with pytest.raises(type(error)):
        list(read_hub("owner/name", subset=None, revision=None, split="train"))
    assert offline == []


@pytest.mark.parametrize("error", transport_errors(), ids=repr)
def test_a_connection_lost_while_loading_is_the_environments(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import datasets

    def lost(*args: Any, **options: Any) -> None:
        raise error

    probed(monkeypatch, ConnectionError())
    monkeypatch.setattr(datasets, "load_dataset", lost)
    with pytest.raises(EnvironmentProblem, match="not in the local cache"):
        list(read_hub("owner/name", subset=None, revision=None, split="train"))


@pytest.mark.parametrize("name", ["DatasetGenerationError", "NonMatchingSplitsSizesError", "DefunctDatasetError"])
def test_what_datasets_cannot_build_is_a_data_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import datasets

    def fail(*args: Any, **options: Any) -> None:
        raise getattr(datasets.exceptions, name)("row 3 is odd")

    probed(monkeypatch, ConnectionError())
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="cannot be loaded: row 3 is odd"):
        list(read_hub("owner/name", subset=None, revision=None, split="train"))


def test_a_split_that_the_hub_lacks_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def no_split(*args: Any, **options: Any) -> None:
        raise ValueError('Unknown split "trian". Should be one of ["train"].')

    monkeypatch.setattr(datasets, "load_dataset", no_split)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(
        DataError, match=r'split trian\) cannot be loaded: Unknown split "trian".*data.hub_split'
    ):
        list(read_hub("owner/name", subset=None, revision=None, split="trian"))


def test_hub_rows_are_named_by_split_and_index(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def loaded(hub: str, **options: Any) -> list[dict[str, Any]]:
        asked.update(options, hub=hub)
        return [{"a": 1}, {"a": 2}]

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    rows = list(read_hub("owner/name", subset="sub", revision="abc", split="test"))
    assert rows == [RawRow({"a": 1}, "test[0]"), RawRow({"a": 2}, "test[1]")]
    assert asked == {"hub": "owner/name", "name": "sub", "revision": "abc", "split": "test"}
