"""A passport replayed against folders and servers, sound ones and tampered ones: each names where it first differs."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fine_tune.cli.verify import main
from fine_tune.passport.document import read_passport
from fine_tune.verifying.endpoint import Endpoint
from fine_tune.verifying.finding import FIRST, LATER, PROMPT
from fine_tune.verifying.served import verify_served

from ..passport.speaking import write_folder
from .small_server import Served, serving


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture(scope="module")
def tampered_once(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tampered folders by what was done to them, to be read only."""
    root = tmp_path_factory.mktemp("tampered")
    return functools.cache(lambda what: tampered(sound, root / what, what))


def tampered(sound: Path, place: Path, what: str) -> Path:
    shutil.copytree(sound, place)
    if what == "template":
        file = place / "chat_template.jinja"
        text = file.read_text(encoding="utf-8")
        assert "assistant" in text
        file.write_text(text.replace("assistant", "Assistant"), encoding="utf-8")
    elif what == "tokenizer":
        # Two letters have changed places: the same text is other ids.
        file = place / "tokenizer.json"
        found = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = found["model"]["vocab"]
        vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
        file.write_text(json.dumps(found), encoding="utf-8")
    elif what == "weight":
        file = place / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.down_proj.weight"] *= 1.1
        save_file(tensors, file, {"format": "pt"})
    elif what == "late weight":
        # The row of a token that no answer begins with, but some answers hold.
        file = place / "model.safetensors"
        tensors = load_file(file)
        tensors["lm_head.weight"][late_token(sound)] *= 0.0
        save_file(tensors, file, {"format": "pt"})
    else:
        (place / "generation_config.json").write_text('{"eos_token_id": 300, "pad_token_id": 0}', encoding="utf-8")
    return place


def late_token(sound: Path) -> int:
    passport = read_passport(sound)
    first = {i for said in passport.said for i, _ in said.top}
    return next(i for said in passport.said for i in said.ids[1:] if i not in first)


def verdict(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main([*words])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_a_sound_folder_says_the_same(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = verdict(capsys, f"passport={sound}", f"model={sound}", "accelerator=cpu")
    assert code == 0
    assert text.endswith("the same on 8 prompts\n")
    assert "question     same         " in text


@pytest.mark.parametrize(
    ("what", "where", "why"),
    [
        (
            "template",
            "diverges at the prompt ids (8 of 8 prompts)",
            "another template renders it otherwise from character",
        ),
        ("tokenizer", "diverges at the prompt ids (8 of 8 prompts)", "another tokenizer encodes it otherwise"),
        ("weight", "diverges at the first token", "token 1"),
        ("late weight", "diverges later in the answer", "token "),
    ],
)
def test_a_tampered_folder_differs_where_it_was_tampered_with(
    what: str, where: str, why: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tampered(sound, tmp_path / "model", what)
    code, text = verdict(capsys, f"passport={sound}/passport.json", f"model={folder}", "accelerator=cpu")
    assert code == 10
    assert where in text
    if what != "weight":
        assert why in text.splitlines()[-1]


def test_a_folder_that_does_not_stop_differs_later(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # An answer of this model that ends at a stop token: made by calling one of its tokens so.
    passport = read_passport(sound)
    stop = passport.said[0].ids[3]
    ending = tmp_path / "ending"
    shutil.copytree(sound, ending)
    found = json.loads((ending / "passport.json").read_text(encoding="utf-8"))
    for entry in found["prompts"]:
        if stop in entry["greedy_ids"]:
            at = entry["greedy_ids"].index(stop)
            entry.update(greedy_ids=entry["greedy_ids"][:at], greedy_pieces=entry["greedy_pieces"][:at], stop_id=stop)
            entry["margins"] = entry["margins"][: at + 1]
    found["special_ids"]["stop"] = [2, 4, stop]
    (ending / "passport.json").write_text(json.dumps(found), encoding="utf-8")
    code, text = verdict(capsys, f"passport={ending}", f"model={sound}", "accelerator=cpu")
    assert code == 10
    assert "token" in text.splitlines()[-1]
    settings = {"eos_token_id": [2, 4, stop], "pad_token_id": 0}
    (ending / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert verdict(capsys, f"passport={ending}", f"model={ending}", "accelerator=cpu")[0] == 0


@functools.cache
def loaded(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(str(folder)), AutoTokenizer.from_pretrained(str(folder))


def served(folder: Path, **options: Any) -> Served:
    return Served(*loaded(folder), **options)


@pytest.mark.parametrize(
    ("with_logprobs", "speaks"),
    [
        *((True, speaks) for speaks in ("vllm", "llama", "plain")),
        (False, "plain"),
        *(pytest.param(False, speaks, marks=pytest.mark.drill) for speaks in ("vllm", "llama")),
    ],
)
def test_a_sound_server_says_the_same(
    speaks: str, with_logprobs: bool, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(served(sound, speaks=speaks, with_logprobs=with_logprobs)) as url:
        code, text = verdict(capsys, f"passport={sound}", f"url={url}")
    assert (code, text.splitlines()[-1]) == (0, "the same on 8 prompts")


# What a server does not tell cannot be told apart: without prompt ids, a changed prompt shows in the answer.
CASES = [
    ("template", "vllm", PROMPT), ("tokenizer", "vllm", PROMPT), ("weight", "vllm", FIRST), ("late weight", "vllm", LATER),
    ("template", "llama", PROMPT), ("tokenizer", "llama", PROMPT), ("weight", "llama", FIRST),
    ("template", "ids only", PROMPT), ("weight", "ids only", FIRST), ("late weight", "ids only", LATER),
    ("template", "plain", FIRST), ("weight", "plain", FIRST), ("late weight", "plain", LATER),
]  # fmt: skip


# What of another server stands for: the same stage of the same tampering.
ALIKE = [("template", "llama", PROMPT), ("weight", "llama", FIRST), ("weight", "ids only", FIRST), ("late weight", "plain", LATER)]


@pytest.mark.parametrize(
    ("what", "speaks", "stage"), [pytest.param(*case, marks=pytest.mark.drill if case in ALIKE else ()) for case in CASES]
)
def test_a_tampered_server_differs_where_it_was_tampered_with(
    what: str, speaks: str, stage: str, sound: Path, tampered_once: Callable[[str], Path]
) -> None:
    folder = tampered_once(what)
    with serving(served(folder, speaks=speaks)) as url:
        server = Endpoint(url, model=None, key_env=None, timeout=30)
        findings = verify_served(read_passport(sound), server, tolerance=None)
    order = [PROMPT, FIRST, LATER]
    stages = {finding.stage for finding in findings} - {None}
    assert min(stages, key=order.index) == stage, findings
    if (what, speaks) == ("template", "llama"):
        assert "it renders" in findings[0].detail
    if (what, speaks) == ("template", "ids only"):
        assert findings[0].detail.startswith("given these ids the server answers as expected, through its chat not")
    if speaks == "plain":
        assert "its prompt may differ, too" in next(f.detail for f in findings if f.stage)


def test_the_key_goes_to_the_server_and_nowhere_else(
    sound: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = served(sound, key="canary-of-a-key")
    monkeypatch.setenv("SERVER_KEY", "canary-of-a-key")
    with serving(one) as url:
        code, text = verdict(capsys, f"passport={sound}", f"url={url}", "key_env=SERVER_KEY")
        assert code == 0
        refused, told = verdict(capsys, f"passport={sound}", f"url={url}")
    assert refused == 5
    assert "401. Pass key_env=" in told
    assert "canary" not in text + told
    assert {headers.get("Authorization") for _, headers, _ in one.seen[:-1]} == {"Bearer canary-of-a-key"}


def test_what_a_server_says_cannot_write_to_the_terminal(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = served(sound, speaks="plain")
    one.text = lambda ids: "\x1b[2J\u202e"  # type: ignore[method-assign]
    with serving(one) as url:
        code, text = verdict(capsys, f"passport={sound}", f"url={url}")
    assert code == 10
    assert "\x1b" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=x"], "passport: no value. Pass passport=<value>."),
        (["passport=x"], "model, url: pass one of them"),
        (["passport=x", "model=x", "url=http://localhost/v1"], "model, url: pass one of them"),
        (["passport=x", "model=x", "key_env=X"], "key_env: belongs to url=. Leave it out."),
        (["passport=x", "modle=x"], "modle=x: no such setting. Did you mean model=?"),
        (["passport=x", "model=x", "tolerance=-1"], "tolerance=-1: must be a number above 0."),
        (["passport=x", "url=http://me:secret@host/v1"], "url: holds a secret."),
    ],
)
def test_wrong_words_are_told(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = verdict(capsys, *words)
    assert code == 2
    assert message in text
    assert "me:secret" not in text


def test_the_tampered_weights_are_really_other_weights(sound: Path, tmp_path: Path) -> None:
    for what in ("weight", "late weight"):
        one, other = (load_file(f / "model.safetensors") for f in (sound, tampered(sound, tmp_path / what, what)))
        assert sum(not torch.equal(one[name], other[name]) for name in one) == 1
