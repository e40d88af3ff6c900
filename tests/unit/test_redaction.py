from __future__ import annotations

import pytest

from fine_tune.redaction import MASK, masked, redact, secret_in_override

HF = "hf_" + "Ab1" * 11
FORTY = "0123456789abcdef" * 2 + "01234567"


def test_every_secret_of_a_tree_is_masked_and_nothing_else() -> None:
    tree = {
        "model": {"path": "org/name", "revision": FORTY, "pad_token": "<pad>", "add_tokens": ["<a>"]},
        "logger": {"wandb": {"key": FORTY, "api_key": "x", "tags": [HF, "fine"]}},
        "data": {"path": "https://me:pw@host/x", "max_new_tokens": 4, "hub": None},
        "git_commit": FORTY,
        "line": f"login with {HF} now",
    }
    assert redact(tree) == {
        "model": {"path": "org/name", "revision": FORTY, "pad_token": "<pad>", "add_tokens": ["<a>"]},
        "logger": {"wandb": {"key": MASK, "api_key": MASK, "tags": [MASK, "fine"]}},
        "data": {"path": MASK, "max_new_tokens": 4, "hub": None},
        "git_commit": FORTY,
        "line": MASK,
    }


def test_the_original_is_left_alone() -> None:
    tree = {"token": "x"}
    assert redact(tree) == {"token": MASK}
    assert tree == {"token": "x"}


@pytest.mark.parametrize(
    "text",
    [
        f"a={HF}",
        "a=ghp_" + "a1" * 12,
        "a=github_pat_" + "a1" * 12,
        "a=AKIA" + "ABCD1234" * 2,
        "a=sk-" + "a1" * 12,
        "a=wandb_v1_" + "a1" * 12,
        "a=eyJ" + "hbGciOiJI" * 2 + ".eyJ" + "zdWIiOiIx" * 2 + ".sig",
        f"a='{FORTY}'",
        "x.api_key=1",
        "x.hf_token=1",
        "x.secret=1",
        "s3.password=1",
        f"a={{b: {HF}}}",
        f"a=[x,{HF}]",
        "a=s3://k:s@bucket",
    ],
)
def test_forms_of_secrets(text: str) -> None:
    assert secret_in_override(text)


@pytest.mark.parametrize(
    "text",
    [
        f"model.revision={FORTY}",
        f"data.sources={{a: {{revision: {FORTY}}}}}",
        f"model.path=snapshots/{FORTY}",
        "model.pad_token=<pad>",
        "data.max_new_tokens=4",
        "x.token=null",
        "data.path=s3://bucket/rows.jsonl",
        "data.path=https://host/rows.jsonl",
        "run_name=task-hf_small",
        "model.path=org/ask-me",
    ],
)
def test_what_is_no_secret(text: str) -> None:
    assert not secret_in_override(text)


def test_running_text_keeps_no_named_secret_and_none_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "hunter2hunter2")
    monkeypatch.setenv("PLAIN", "ordinary-text")
    text = masked("GET /x?api_key=abc123&n=1: hunter2hunter2, password=hush; model.pad_token=</s> ordinary-text HF_TOKEN=zzz")
    assert text == "GET /x?api_key=***&n=1: ***, password=***; model.pad_token=</s> ordinary-text HF_TOKEN=***"
