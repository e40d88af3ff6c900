"""Every file of the config tree composes and passes the checks; nothing in it escapes these tests."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from fine_tune.config import check_config, find_conf_dir
from fine_tune.data.sources.registry import FORMATS
from fine_tune.errors import ConfigError
from fine_tune.evaluation_schema import EVALUATIONS
from fine_tune.overrides import group_options
from fine_tune.sweeps.spec import read_sweep

CONF = find_conf_dir()
GROUPS = group_options(CONF)
OPTIONS = [(group, option) for group, options in GROUPS.items() for option in options]
LEAF = re.compile(r"^\s*[\w.]+:\s*[^\s#]")


def companions(group: str, option: str) -> list[str]:
    """The overrides that a file's header declares it needs."""
    lines = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    return [word for line in lines if line.startswith("# with: ") for word in line.removeprefix("# with: ").split()]


def problems(overrides: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        read_sweep(overrides) if overrides[0].startswith("sweep=") else check_config(overrides)
    return refused.value.problems


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: value)
def test_every_option_composes_and_passes(group: str, option: str) -> None:
    words = [f"{group}={option}", *companions(group, option)]
    cfg = check_config(words, multirun=group == "sweep").cfg
    if group == "sweep":
        assert read_sweep(words).kind == cfg["sweep"]["kind"]
    if group in ("model", "method", "data", "objective", "optim"):
        assert cfg[group]["name"] == option


@pytest.mark.parametrize("data", GROUPS["data"])
def test_data_options_state_every_setting_of_their_format(data: str) -> None:
    # Right behind the above: what was composed there is still kept.
    cfg = check_config([f"data={data}", *companions("data", data)]).cfg["data"]
    if cfg["format"] == "mix":
        assert cfg["options"] == {}
    else:
        assert sorted(cfg["options"]) == sorted(field.name for field in fields(FORMATS[cfg["format"]].options))


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if companions(*pair)], ids=lambda value: value)
def test_declared_companions_are_needed(group: str, option: str) -> None:
    for word in companions(group, option):
        key = word.partition("=")[0]
        # early_stopping: its own key is named, the companion in what to do
        assert any(key.split(".")[0] in sentence for sentence in problems([f"{group}={option}"]))


def test_the_groups_are_those_a_user_may_choose() -> None:
    assert set(GROUPS) == {
        "model",
        "method",
        "objective",
        "optim",
        "trainer",
        "callbacks",
        "logger",
        "data",
        "experiment",
        "debug",
        "sweep",
    }
    assert all(GROUPS.values())


def test_every_file_is_an_option_or_serves_one() -> None:
    served = {CONF / "train.yaml", CONF / "evaluate.yaml", CONF / "chat.yaml"}
    served |= {CONF / group / f"{option}.yaml" for group, option in [*OPTIONS, *(("eval", name) for name in EVALUATIONS)]}
    for file in sorted(set(CONF.rglob("*.yaml")) - served):
        if file.parent.name == "base":
            options = [option.read_text() for option in file.parent.parent.glob("*.yaml")]
            others = [base.read_text() for base in file.parent.glob("*.yaml")]
            assert any(f"- base/{file.stem}@_here_" in text for text in options) or any(
                f"- {file.stem}@_here_" in text for text in others
            ), file
        else:
            assert file.parent == CONF / "recipe", f"{file} is in no group"
            assert file.stem in {f"{m}_{d}" for m in GROUPS["model"] for d in GROUPS["objective"]}, file


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: str(file.relative_to(CONF)))
def test_every_value_has_a_comment_and_every_file_a_header(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# ")
    body = text.split("\nhydra:")[0].split("\nhints:")[0]
    # What is set for Hydra, and hints, which are sentences themselves, are commented as a whole.
    bare = [line for line in body.splitlines() if LEAF.match(line) and "#" not in line]
    assert bare == []
    assert text.isascii()


def test_every_revision_is_a_commit_or_says_why_not() -> None:
    for group in ("model", "data"):
        for file in (CONF / group).glob("*.yaml"):
            for line in re.findall(r"^revision: (.*)$", file.read_text(), flags=re.MULTILINE):
                value, _, comment = line.partition(" # ")
                if value == "main":
                    assert "no commit" in comment, file
                elif value != "null":
                    assert re.fullmatch(r"[0-9a-f]{40}", value), file


def batch_in_file(data: str) -> str:
    """What a data option says that its rows are, read without our code: its own word, else that of its base."""
    text = (CONF / "data" / f"{data}.yaml").read_text(encoding="utf-8")
    [base] = re.findall(r"^  - (base/\w+)@_here_$", text, flags=re.MULTILINE)
    own = yaml.safe_load(text)
    return str(own.get("batch") or yaml.safe_load((CONF / "data" / f"{base}.yaml").read_text())["batch"])


def of_its_kind(data: str) -> bool:
    """Tell whether it is the first option that gives such rows; pairs with the others are a drill."""
    return data == next(name for name in GROUPS["data"] if batch_in_file(name) == batch_in_file(data))


@pytest.mark.parametrize("objective", GROUPS["objective"])
@pytest.mark.parametrize(
    "data", [pytest.param(data, marks=() if of_its_kind(data) else pytest.mark.drill) for data in GROUPS["data"]]
)
def test_a_pair_of_data_and_objective_is_legal_exactly_if_declared(data: str, objective: str) -> None:
    needed = [word for word in companions("data", data) if not word.startswith("objective=")]
    chosen = [f"objective={objective}", f"data={data}", *needed]
    accepts = yaml.safe_load((CONF / "objective" / f"{objective}.yaml").read_text())["accepts"]
    batch = batch_in_file(data)
    if batch in accepts:
        assert check_config(chosen).cfg["data"]["batch"] == batch
    else:
        [sentence] = problems(chosen)
        assert sentence.startswith(f"data = {data}: gives {batch}, but objective={objective} takes")


def test_both_objectives_have_rows_and_rows_that_they_refuse() -> None:
    batches = {batch_in_file(data) for data in GROUPS["data"]}
    assert batches == {"conversations", "documents", "pairs"}


def test_an_illegal_pair_exists_for_every_objective() -> None:
    for objective in GROUPS["objective"]:
        accepts = yaml.safe_load((CONF / "objective" / f"{objective}.yaml").read_text())["accepts"]
        assert {"conversations", "documents", "pairs"} - set(accepts)
