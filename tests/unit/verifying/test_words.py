"""Verdicts on single replays, and how the server is talked to."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fine_tune.errors import ConfigError, EnvironmentProblem
from fine_tune.verifying.endpoint import Answer, Endpoint, Refused
from fine_tune.verifying.finding import (
    FIRST,
    LATER,
    PROMPT,
    Finding,
    answer_finding,
    probability_finding,
    prompt_finding,
)
from fine_tune.verifying.served import text_place
from fine_tune.verifying.verify import conclusion


@pytest.mark.parametrize(
    ("text", "ended", "stopped", "place"),
    [
        ("The sky is blue", True, True, None),
        (" The sky is blue\n", True, True, None),
        ("The sky is blue", None, True, None),
        ("The sky is blue", False, True, 4),
        ("The sky is blue and", False, True, 4),
        ("The sky is blue", False, False, None),
        ("The sky is bl", True, True, 3),
        ("The sea is blue", True, True, 1),
        ("A sky", True, True, 0),
        ("", True, True, 0),
        ("The sky is blue\ufffd", False, False, None),
    ],
)
def test_the_place_of_the_first_other_token(text: str, ended: bool | None, stopped: bool, place: int | None) -> None:
    assert text_place([" The", " sky", " is", " blue"], Answer(text, ended, {}), stopped=stopped) == place


@pytest.mark.parametrize(
    ("place", "stage", "detail"),
    [
        (None, None, "3 tokens"),
        (0, FIRST, "token 1: expected 'a', which won by 2 nats, got 'b'"),
        (1, None, "1 tokens, then a tie (0.05 nats)"),
        (2, LATER, "token 3: expected 'a', which won by 0.3 nats, got 'b'"),
        (3, LATER, "token 4: expected 'a', got 'b'"),
    ],
)
def test_ties_are_no_difference(place: int | None, stage: str | None, detail: str) -> None:
    found = answer_finding("x", place, margins=[2.0, 0.05, 0.3], tolerance=0.1, length=3, sides=("'a'", "'b'"))
    assert found == Finding("x", stage, detail)


def test_probabilities_of_shared_tokens_are_compared() -> None:
    expected = {"a": -0.5, "b": -2.0}
    assert probability_finding("x", expected, {"a": -0.55, "c": -9.0}, tolerance=0.1) is None
    assert probability_finding("x", expected, {}, tolerance=0.1) is None
    found = probability_finding("x", expected, {"a": -0.5, "b": -1.5}, tolerance=0.1)
    assert found == Finding("x", FIRST, "'b' has log-probability -1.500, expected -2.000 (allowed difference 0.1)")


def test_prompt_ids_are_compared_to_their_end() -> None:
    assert prompt_finding("x", [1, 2], [1, 2], why="", show=("", "")) is None
    found = prompt_finding("x", [1, 2, 3], [1, 2], why="another template", show=("z", ""))
    assert found == Finding("x", PROMPT, "token 3 of 3: expected 3 'z', got nothing; another template")


def test_the_earliest_difference_is_the_conclusion() -> None:
    same, later, first, prompt = (
        Finding(name, stage, f"of {name}") for name, stage in (("s", None), ("l", LATER), ("f", FIRST), ("p", PROMPT))
    )
    assert conclusion([same, same]) is None
    assert conclusion([same, later]) == 'diverges later in the answer (1 of 2 prompts), first in "l": of l'
    assert conclusion([later, first, first]) == 'diverges at the first token (2 of 3 prompts), first in "f": of f'
    assert conclusion([later, first, prompt]) == 'diverges at the prompt ids (1 of 3 prompts), first in "p": of p'


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/v1", "localhost:8000", "http:///v1"])
def test_only_web_addresses_are_asked(url: str) -> None:
    with pytest.raises(ConfigError, match="must be http://host:port/v1"):
        Endpoint(url, model="m", key_env=None, timeout=1)


def test_a_key_that_is_not_set_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match="key_env=SOME_KEY: this environment variable is not set"):
        Endpoint("http://localhost:1/v1", model="m", key_env="SOME_KEY", timeout=1)


def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(EnvironmentProblem, match=r"gives no answer that can be read \(URLError\)\. Is it running\?"):
        Endpoint("http://127.0.0.1:1/v1", model=None, key_env=None, timeout=1)


@pytest.mark.parametrize(
    ("render", "special", "seen"),
    [("[INST] hi", True, "<s>[INST] hi"), ("<s>[INST] hi", False, "<s>[INST] hi"), ("hi", False, "hi")],
)
def test_a_server_that_begins_texts_itself_is_asked_to(
    render: str, special: bool, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []

    def call(self: Endpoint, url: str, body: dict[str, object]) -> dict[str, object]:
        if url.endswith("/apply-template"):
            return {"prompt": render}
        asked.append(body)
        return {"tokens": [1, 2] if "content" in body else []}

    monkeypatch.setattr(Endpoint, "_call", call)
    server = Endpoint("http://localhost:1/v1", model="m", key_env=None, timeout=1)
    expected = "<s>[INST] hi" if "INST" in render else "hallo"
    assert server.tokenize([], expected) == ([1, 2], seen)
    assert asked[-1] == {"content": render, "add_special": special, "parse_special": True}


@pytest.mark.parametrize(
    "reply", [{}, {"choices": []}, {"choices": [{"message": 3}]}, {"choices": [{"finish_reason": "stop"}]}]
)
def test_an_answer_of_another_form_is_refused(reply: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Endpoint, "_call", lambda self, url, body: reply)
    server = Endpoint("http://localhost:1/v1", model="m", key_env=None, timeout=1)
    for ask in (lambda: server.chat([], 4), lambda: server.complete([1], 4)):
        with pytest.raises(Refused, match="an answer of another form"):
            ask()


def test_a_redirect_is_not_followed_with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Away(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{server.server_port}/elsewhere")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Print nothing."""

    server = HTTPServer(("127.0.0.1", 0), Away)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("SOME_KEY", "canary-of-a-key")
    try:
        with pytest.raises(EnvironmentProblem) as refused:
            Endpoint(f"http://127.0.0.1:{server.server_port}/v1", model=None, key_env="SOME_KEY", timeout=5)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert seen == ["/v1/models"]
    assert "canary" not in str(refused.value)
