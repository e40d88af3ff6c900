"""Verbs that take the words of a run beside their own: one way to part them, every mistake told at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fine_tune.cli import audit, plan
from fine_tune.cli.words import above_zero, flag, read_beside_config
from fine_tune.errors import ConfigError

OWN = {"card_gb": above_zero, "rehearse": flag}


def refused(*words: str, **more: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_beside_config(words, OWN, **more)
    return caught.value.problems


def test_own_words_are_read_and_the_rest_is_the_configs() -> None:
    own, cfg = read_beside_config(["card_gb=24", "seed=7", "rehearse=true", "optim.lr=1e-3"], OWN)
    assert own == {"card_gb": 24.0, "rehearse": True}
    assert (cfg["seed"], cfg["optim"]["lr"]) == (7, 1e-3)
    own, cfg = read_beside_config([], OWN)
    assert (own, cfg["model"]["name"]) == ({}, "tiny")


def test_every_mistake_is_told_the_verbs_own_first() -> None:
    problems = refused("card_gb=-1", "optim.lrr=1", "rehearse=maybe", "method.rank=abc", "card_gb")
    assert problems[:3] == [
        "card_gb=-1: must be a number above 0.", "rehearse=maybe: must be true or false.", "card_gb: must be a number above 0.",
    ]  # fmt: skip
    assert len(problems) == 5
    assert "optim.lr" in problems[3] + problems[4]
    assert "method.rank" in problems[3] + problems[4]


def test_a_setting_given_twice_is_not_silently_the_last() -> None:
    assert refused("card_gb=24", "card_gb=80") == ["card_gb: given twice."]


def test_a_secret_in_an_own_word_is_not_repeated() -> None:
    secret = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7" * 2
    [problem] = refused(f"card_gb={secret}")
    assert secret not in problem
    assert "holds a secret" in problem


def test_what_is_wrong_together_is_told_with_the_rest() -> None:
    def rule(own: Mapping[str, Any]) -> str | None:
        return "not both." if len(own) == 2 else None

    problems = refused("card_gb=24", "rehearse=true", "optim.lrr=1", rule=rule)
    assert problems[0] == "not both."
    assert len(problems) == 2
    assert read_beside_config(["card_gb=24"], OWN, rule=rule)[0] == {"card_gb": 24.0}


@pytest.mark.parametrize("verb", [audit, plan])
def test_words_of_a_verb_are_no_keys_of_a_run(verb: Any) -> None:
    for key in verb.OWN:
        with pytest.raises(ConfigError, match=f"{key}: unknown key"):
            read_beside_config([f"{key}=1"], {})


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("rows=many", "rows=many: must be a whole number, such as rows=5."),
        ("rows=-1", "rows=-1: must be a whole number, such as rows=5."),
        ("rows", "rows: must be a whole number, such as rows=5."),
        ("out=", "out=: must name a file, such as out=audit.html."),
        ("out", "out: must name a file, such as out=audit.html."),
    ],
)
def test_an_audit_says_what_its_words_want(word: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main([word]) == 2
    assert told in capsys.readouterr().err


def test_an_audits_page_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder\. Pass the name of a file, such as .*audit\.html"):
        audit.OWN["out"](str(tmp_path))
    assert audit.OWN["out"]("~/audit.html") == Path.home() / "audit.html"


@pytest.mark.parametrize(("verb", "word"), [("audit", "rows=many"), ("plan", "card_gb=-1")])
def test_a_wrong_word_is_told_before_torch_is_imported(verb: str, word: str) -> None:
    code = f"import sys; from fine_tune.cli.{verb} import main; print(main(['{word}']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "2 False"
