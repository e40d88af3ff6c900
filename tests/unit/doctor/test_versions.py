from importlib import metadata

import pytest
from packaging.specifiers import SpecifierSet

from fine_tune.doctor import versions
from fine_tune.doctor.versions import KNOWN_BAD, installed, known_bad, version_findings


def told(**found: str) -> list[tuple[str, str]]:
    return [
        (one.state, one.says) for one in known_bad({name.replace("_", "-"): version for name, version in found.items()})
    ]


def test_good_versions_are_not_told_of() -> None:
    assert told(torch="2.13.0+cpu", lightning="2.6.6", python="3.11.9") == [
        ("ok", f"none of the {len(KNOWN_BAD)} that are on the list.")
    ]


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_the_malicious_uploads_are_broken_and_told_once(version: str) -> None:
    [(state, says)] = told(lightning=version)
    assert state == "broken"
    assert says == f"lightning {version}: malicious upload: steals credentials when imported (GHSA-w37p-236h-pfx3)."


@pytest.mark.parametrize(
    ("package", "bad", "good", "state"),
    [
        ("torch", "2.14.0", "2.13.1", "look"),
        ("torch", "2.10.0+cu128", "2.11.0", "look"),
        ("peft", "0.19.1", "0.20.0", "broken"),
        ("bitsandbytes", "0.46.0", "0.46.1", "broken"),
        ("jinja2", "3.1.5", "3.1.6", "broken"),
        ("transformers", "5.23.0", "5.22.2", "look"),
        ("hydra_core", "1.3.2", "1.3.8", "look"),
        ("omegaconf", "2.4.0rc1", "2.3.1", "ok"),
        ("omegaconf", "2.4.0", "2.3.1", "look"),
        ("wandb", "0.32.0", "0.31.0", "look"),
        ("lightning", "2.6.5", "2.6.6", "look"),
        ("python", "3.14.1", "3.13.5", "broken"),
    ],
)
def test_each_entry_of_the_list_is_where_it_should_be(package: str, bad: str, good: str, state: str) -> None:
    assert [found for found, _ in told(**{package: bad})] == [state]
    assert [found for found, _ in told(**{package: good})] == ["ok"]


def test_every_entry_says_why_and_who_says_so() -> None:
    assert all(bad.reason and bad.source and len(SpecifierSet(bad.versions)) for bad in KNOWN_BAD)


def findings(found: dict[str, str]) -> dict[str, str]:
    return {one.name: f"{one.state}: {one.says}" for one in version_findings(found)}


def test_this_environment_has_what_it_needs() -> None:
    found = findings(installed())
    assert found["requirements"].startswith("ok: all ")
    assert found["known-bad versions"].startswith("ok: none")
    assert f"torch {metadata.version('torch')}" in found["packages"]


def test_what_is_missing_is_broken_and_what_is_outside_is_told() -> None:
    have = installed()
    del have["peft"]
    lines = [
        f"{one.state}: {one.says}"
        for one in version_findings({**have, "datasets": "1.0"})
        if one.name == "requirements"
    ]
    assert lines == [
        "broken: peft>=0.20 is not installed: pip install -c constraints.txt -e .",
        "look: datasets 1.0 is outside >=4.8: pip install -c constraints.txt -e .",
    ]


def test_extras_say_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2", 'lm-eval>=0.4; extra == "lm-eval"', 'pytest>=9; extra == "dev"', 'ruff>=1; extra == "dev"']
    monkeypatch.setattr(versions.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(versions, "_extras_named", lambda: ["lm-eval", "dev"])
    have = {"fine-tune": "0.1", "python": "3.11", "torch": "2.13", "lm-eval": "0.4.13", "pytest": "8.0", "ruff": "1.0"}
    found = findings(have)
    assert found["extras"] == "ok: lm-eval is installed, dev lacks pytest"
    # What extras ask for is not needed.
    assert found["requirements"] == "ok: all 1 are installed, within the ranges that are known to work."


def test_a_copy_that_is_not_installed_is_no_error() -> None:
    assert findings({"python": "3.11"})["requirements"].startswith("look: fine-tune is not installed")
