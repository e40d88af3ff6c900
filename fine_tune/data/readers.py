"""Rows of local JSON, JSON lines and parquet files and of Hub data sets, each with its place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fine_tune.errors import DataError, EnvironmentProblem

SUFFIXES = (".jsonl", ".json", ".parquet")
MAX_PROBLEMS = 20
PROBE_SECONDS = 5.0


class RawRow(NamedTuple):
    """One record and where it stands: `file:line`, or `file[index]` where there are no lines."""

    data: dict[str, Any]
    where: str


Problem = Callable[[str], None]


class TooManyProblems(Exception):
    """Enough problems were collected to report."""


def local_files(path: str) -> list[Path]:
    """The data files that `data.path` names: one file, or all below a folder, sorted by name.

    Raises:
        DataError: Nothing there, or nothing of a known kind.
    """
    place = Path(path).expanduser()
    kinds = ", ".join(SUFFIXES)
    if place.is_file():
        if place.suffix not in SUFFIXES:
            raise DataError(f"data.path={path}: unknown kind of file. Use one of {kinds}.")
        return [place]
    if not place.is_dir():
        raise DataError(f"data.path={path}: no such file or folder. Check the path.")
    files = sorted(file for file in place.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"data.path={path}: the folder holds no data file. Use one of {kinds}.")
    return files


def read_local(path: str) -> list[RawRow]:
    """Read every row of a file or folder.

    Raises:
        DataError: Some rows are damaged. The message names file, line and problem of the first 20.
    """
    problems: list[str] = []

    def report(problem: str) -> None:
        problems.append(problem)
        if len(problems) >= MAX_PROBLEMS:
            raise TooManyProblems

    rows: list[RawRow] = []
    try:
        for file in local_files(path):
            before = len(rows) + len(problems)
            rows += _file_rows(file, report)
            if len(rows) + len(problems) == before:
                report(f"{file.name}: the file is empty")
    except TooManyProblems:
        problems.append("and possibly more")
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise DataError(f"data.path={path}: damaged data. Correct or remove these rows:\n{lines}")
    return rows


def read_hub(hub: str, *, subset: str | None, revision: str | None, split: str) -> Iterator[RawRow]:
    """Rows of a Hub data set, downloaded unless it is in the local cache.

    Raises:
        DataError: The Hub has no such data set, subset, revision or split.
        EnvironmentProblem: The Hub cannot be reached and the data set is not in the local cache.
    """
    for index, data in enumerate(_load_hub(hub, subset=subset, revision=revision, split=split)):
        yield RawRow(data, f"{split}[{index}]")


def _load_hub(hub: str, *, subset: str | None, revision: str | None, split: str) -> Any:
    # Imported here: it takes seconds, and local files do not need it.
    import datasets
    from huggingface_hub import errors

    name = f"{hub}@{revision or 'main'}"
    try:
        with _offline_unless_reachable(hub, revision):
            return datasets.load_dataset(hub, name=subset, revision=revision, split=split)
    except (errors.OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise _unreachable(name, error) from error
    except (datasets.exceptions.DatasetsError, ValueError, FileNotFoundError) as error:
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"}:
            raise _unreachable(name, error) from error
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"data.hub={name} (subset {subset}, split {split}) cannot be loaded: {reason} Check data.hub, "
            "data.subset, data.revision and data.hub_split, or pass data.path=<local file>."
        ) from error
    except (OSError, _transport_error()) as error:
        raise _unreachable(name, error) from error


def _transport_error() -> type[Exception]:
    """Return the base class of what the hub client's transport raises: the client knows which one it uses, and it has changed."""
    from huggingface_hub import errors

    found: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    return found


@contextmanager
def _offline_unless_reachable(hub: str, revision: str | None) -> Iterator[None]:
    """Work from the cache where nothing answers: the hub's client would retry for half a minute."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    before = constants.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(hub, revision=revision, timeout=PROBE_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        # It answered, or there is nothing to ask for; loading tells what is wrong.
        pass
    except (OSError, ValueError, _transport_error()):
        # Nothing answers, or something else does: a login page of the network's is no JSON (ValueError).
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _unreachable(name: str, error: Exception) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"data.hub={name} is not in the local cache and the hub cannot be reached "
        f"({type(error).__name__}): go online once (unset HF_HUB_OFFLINE), or pass data.path=<local file>."
    )


def _file_rows(file: Path, report: Problem) -> Iterator[RawRow]:
    if file.suffix == ".parquet":
        return _parquet_rows(file, report)
    try:
        raw = file.read_bytes()
    except OSError as error:
        report(f"{file.name}: cannot be read: {error.strerror}")
        return iter(())
    if file.suffix == ".json" and raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return _array_rows(file.name, raw, report)
    return _line_rows(file.name, raw, report)


def _line_rows(name: str, raw: bytes, report: Problem) -> Iterator[RawRow]:
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        value = _parse(line, where, report)
        if value is not None:
            row = _record(value, where, report)
            if row is not None:
                yield row


def _array_rows(name: str, raw: bytes, report: Problem) -> Iterator[RawRow]:
    for index, value in enumerate(_parse(raw.removeprefix(b"\xef\xbb\xbf"), name, report) or []):
        row = _record(value, f"{name}[{index}]", report)
        if row is not None:
            yield row


def _parse(raw: bytes, where: str, report: Problem) -> Any:
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_no_duplicate_keys)
        if "\\ud" in text.lower():
            # A lone surrogate is legal JSON but no text: no tokenizer takes it.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        report(f"{where}: not UTF-8 (byte {error.start})")
    except UnicodeEncodeError:
        report(f"{where}: a lone surrogate (half of a character)")
    except json.JSONDecodeError as error:
        place = where if ":" in where else f"{where}:{error.lineno}"
        report(f"{place}: not JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:
        report(f"{where}: {error}")
    else:
        if value is None:
            report(f"{where}: not an object but null")
        return value
    return None


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} appears twice")
    return record


def _record(value: Any, where: str, report: Problem) -> RawRow | None:
    if isinstance(value, dict):
        return RawRow(value, where)
    report(f"{where}: not an object but {type(value).__name__}")
    return None


def _parquet_rows(file: Path, report: Problem) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    index = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for data in batch.to_pylist():
                yield RawRow(data, f"{file.name}[{index}]")
                index += 1
    except (pyarrow.ArrowException, OSError) as error:
        report(f"{file.name}: not a readable parquet file: {str(error).partition(chr(10))[0]}")
