"""The words of ckpt= to labels: short, each its own, safe as a folder's name."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from fine_tune.config import check_config
from fine_tune.errors import CheckpointError, ConfigError
from fine_tune.evaluation_config import check_evaluation
from fine_tune.subjects import find

LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
DEFAULTS = check_evaluation(["ckpt=base"])
CONFIG = yaml.safe_dump({key: check_config([]).cfg[key] for key in ("model", "method", "data", "objective")})


def make_run(folder: Path) -> str:
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    (folder / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    (folder / "adapter" / "adapter_model.safetensors").touch()
    return str(folder)


def labels(*words: str) -> list[str]:
    found = [one.label for one in find(words, DEFAULTS)]
    assert all(LABEL.fullmatch(label) for label in found), found
    assert len({label.casefold() for label in found}) == len(found), "one folder each, also where capitals do not count"
    return found


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (["a/run", "b/other"], ["run", "other"]),
        (["a/run", "b/run"], ["a-run", "b-run"]),
        (["a/run", "b/run", "b/free"], ["a-run", "b-run", "free"]),
        (["one/a/run", "two/a/run", "two/b/run"], ["one-a-run", "two-a-run", "b-run"]),
        (["a/Run", "b/run"], ["a-Run", "b-run"]),
        (["a/x y", "a/x-y"], None),
        (["a/run", "a-run"], ["run", "a-run"]),
        (["a/run", "b/run", "a-run"], None),
        (["a/[b]\x1b[31m\u202e", "b/[b]\x1b[31m\u202e"], ["a-b-31m", "b-b-31m"]),
        (["a/" + "x" * 70 + "-1", "a/" + "x" * 70 + "-2"], ["x" * 62 + "-1", "x" * 62 + "-2"]),
        (["a/1" + "x" * 70, "a/2" + "x" * 70], None),
    ],
)
def test_labels_are_names_with_as_many_folders_above_as_it_takes(
    places: list[str], expected: list[str] | None, tmp_path: Path
) -> None:
    found = labels(*(make_run(tmp_path / place) for place in places))
    assert expected is None or found == expected


def test_adapter_folders_and_the_word_base_are_told_apart_as_well(tmp_path: Path) -> None:
    one, other, base = (make_run(tmp_path / place) for place in ("a/run", "b/run", "b/base"))
    assert labels(f"{one}/adapter", f"{other}/adapter", "base") == ["a-run-adapter", "b-run-adapter", "base"]
    assert labels("base", base) == ["base", "b-base"]
    assert labels(one, f"{one}/adapter") == ["run", "run-adapter"]


def test_models_of_the_hub_are_told_apart_by_their_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert labels("some/model", "other/model") == ["some-model", "other-model"]


def test_one_checkpoint_in_two_spellings_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=re.escape(f"ckpt: two of them are {run}. Leave one out.")):
        find([run, os.path.join(run, "..", "run")], DEFAULTS)


def test_a_damaged_config_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    Path(run, "config.yaml").write_text("model: [", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"its config\.yaml cannot be read"):
        find([run], DEFAULTS)
