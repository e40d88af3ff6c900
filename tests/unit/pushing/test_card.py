"""A card of hostile names and figures: markup in them shows and does nothing, and its front matter is data."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from fine_tune.pushing.card import card
from fine_tune.pushing.facts import Facts
from fine_tune.pushing.inert import block, code, short_name, without_folders

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[click](javascript:alert(1))", "![x](http://evil.example/p.png)",
    "`</code><b>", "```\n# heading\n```", "a | b | c",
    "~~~", "\n\n# Title", "---\nlicense: evil\n---", "\x1b[31mred", "\u202egnp.exe",
    "http://evil.example", "@someone", "{{ 7*7 }}", "``` ``` ````", "x\\", "\u2028- list", "&lt;b&gt;", "<!-- -->", "|\n|---|",
]  # fmt: skip
ALLOWED = {"h1", "h2", "p", "code", "pre", "table", "thead", "tbody", "tr", "th", "td"}


class Tags(HTMLParser):
    """Which tags and attributes a page has, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {f"{name}={value}" for name, value in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def page(markdown: str) -> Tags:
    # HTML stays HTML, as on the hub: what is not inert would show up as a tag.
    found = Tags()
    found.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))
    return found


def facts(text: str) -> Facts:
    return Facts(
        config={
            "model": {"path": f"/home/me/{text}", "revision": text},
            "objective": {"name": text},
            "method": {"name": text, "bits": 4, "quant_type": text, "target_modules": [text]},
            "optim": {"name": text},
            "data": {"name": text, "format": text, "hub": text, "path": text, "sources": {text: {"hub": text}}},
        },
        summary={"device": text, "steps": 3, "final_loss": float("nan")},
        manifest={"command": text, "chat_template": text, "versions": {text: text}},
        ledger={"read": text, "dropped": {text: text}},
        metrics={text: {text: 0.5}},
        sentences=[text],
        merge={"base": text, "against_base_and_adapter": {"greedy_equal": text}},
    )


def wanted(text: str) -> str:
    return " ".join(text.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e").replace("\u2028", r"\u2028").split())


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("merged", [True, False])
def test_hostile_text_shows_and_does_nothing(text: str, merged: bool) -> None:
    written = card(facts(text), repo="me/model", merged=merged, licence=text)
    _, front, body = written.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["license"] == wanted(text)
    assert head["library_name"] == ("transformers" if merged else "peft")
    assert head.keys() <= {
        "library_name",
        "pipeline_tag",
        "license",
        "tags",
        "base_model",
        "base_model_relation",
        "datasets",
    }
    shown = page(body)
    assert shown.tags <= ALLOWED
    assert {a for a in shown.attributes if not a.startswith("style=text-align")} <= {
        "class=language-text",
        "class=language-python",
    }
    assert "\x1b" not in written
    assert "\u202e" not in written


@pytest.mark.parametrize("text", HOSTILE)
def test_the_text_itself_is_still_there(text: str) -> None:
    assert page(f"| {code(text)} |\n|---|").text.strip() == wanted(text)
    assert wanted(text) in " ".join(page(block(text)).text.split())


def test_secrets_and_folders_are_not_told() -> None:
    told = card(facts("hf_abcdefghijklmnopqrstuvwx"), repo="me/model", merged=False, licence="mit") + card(
        facts("/home/me/private/rows.jsonl"), repo="me/model", merged=False, licence="mit"
    )
    assert "hf_abc" not in told
    command = (
        "train.py data.path=/home/me/private/rows.jsonl init_from=~/runs/sft model.path=C:\\Users\\me\\model lr=1e-3"
    )
    assert without_folders(command) == "train.py data.path=rows.jsonl init_from=sft model.path=model lr=1e-3"
    assert without_folders("python train.py data.hub=owner/name") == "python train.py data.hub=owner/name"
    assert short_name("/home/me/models/llama") == "llama"


def real(**changes: Any) -> Facts:
    config = {
        "model": {"path": "meta-llama/Llama-2-7b-hf", "revision": "0" * 40},
        "objective": {"name": "dpo"},
        "method": {"name": "qlora", "bits": 4, "quant_type": "nf4", "double_quant": True, "rank": 16},
        "data": {
            "name": "ultrafeedback",
            "hub": "HuggingFaceH4/ultrafeedback_binarized",
            "revision": "abc",
            "sources": None,
        },
    }
    return Facts(config, summary={"steps": 70, "exact_match": 0.93}, sentences=["sft is better than base."], **changes)


def test_an_ordinary_card_says_what_matters() -> None:
    written = card(
        real(metrics={"mmlu": {"accuracy": 0.45, "by_subject": {}}}), repo="me/model", merged=False, licence="llama2"
    )
    head = yaml.safe_load(written.split("---\n")[1])
    assert head == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "llama2",
        "tags": ["fine-tune", "dpo", "lora"],
        "base_model": "meta-llama/Llama-2-7b-hf",
        "base_model_relation": "adapter",
        "datasets": ["HuggingFaceH4/ultrafeedback_binarized"],
    }
    text = page(written.split("---\n", 2)[2]).text
    for part in (
        "meta-llama/Llama-2-7b-hf",
        "sft is better than base.",
        "0.93",
        "Evaluation: mmlu",
        "0.45",
        "load_in_4bit=True",
        f"revision {'0' * 40}",
    ):
        assert part in text
    assert "by_subject" not in text


@pytest.mark.parametrize("merged", [True, False])
def test_code_of_the_bases_repository_is_told(merged: bool) -> None:
    plain = card(real(), repo="me/model", merged=merged, licence="mit")
    assert "trust_remote_code" not in plain
    trusting = real()
    trusting.config["model"]["trust_remote_code"] = True
    written = card(trusting, repo="me/model", merged=merged, licence="mit")
    assert f"The base runs code of its own: `meta-llama/Llama-2-7b-hf`, commit `{'0' * 40}`." in written
    assert ("trust_remote_code=True" if merged else f"revision='{'0' * 40}', trust_remote_code=True") in written


def test_an_unknown_licence_is_said_to_be_unknown() -> None:
    written = card(real(), repo="me/model", merged=True, licence=None)
    assert yaml.safe_load(written.split("---\n")[1])["license"] == "other"
    assert "The licence of the base is not known here" in written
