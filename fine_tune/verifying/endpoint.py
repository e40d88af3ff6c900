"""An OpenAI-compatible server, as far as a passport needs it: urllib, no redirects, nothing of a key in any message."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fine_tune.errors import ConfigError, EnvironmentProblem
from fine_tune.text.conversation import Message

MAX_BYTES = 16_000_000
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Refused(Exception):
    """The server answers, but not to this."""


@dataclass(frozen=True)
class Answer:
    """What a server said.

    Attributes:
        text: The continuation.
        ended: A stop token ended it; None where the server does not say.
        top: Log-probabilities of the likeliest first tokens by their text, empty where the server does not say.
    """

    text: str
    ended: bool | None
    top: dict[str, float]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        """Follow nothing."""


class Endpoint:
    """Talks to one server.

    Args:
        url: Up to and including ``/v1``.
        key_env: The environment variable that holds the key, None for no key.
        timeout: Seconds to wait for an answer.

    Attributes:
        model: The name of the model that is asked.
    """

    def __init__(self, url: str, *, model: str | None, key_env: str | None, timeout: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url={url}: must be http://host:port/v1 or https://...")
        self.url, self.timeout = url.rstrip("/"), timeout
        self.root = self.url.removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if key_env is not None:
            if not os.environ.get(key_env):
                raise ConfigError(f"key_env={key_env}: this environment variable is not set.")
            self._headers["Authorization"] = f"Bearer {os.environ[key_env]}"
        proxies = [urllib.request.ProxyHandler({})] if parts.hostname in LOOPBACK else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        try:
            return str(self._call(f"{self.url}/models")["data"][0]["id"])
        except (Refused, KeyError, IndexError, TypeError) as error:
            raise EnvironmentProblem(f"url={self.url}: names no model. Pass model_name=<name>.") from error

    def tokenize(self, messages: Sequence[Message], text: str) -> tuple[list[int] | None, str | None]:
        """Return the ids and the render that the server makes of a conversation, each None where it does not say.

        ``text`` is the render that is expected. vLLM renders and encodes in one call, llama.cpp's server in two.
        """
        try:
            found = self._call(
                f"{self.root}/tokenize",
                {"model": self.model, "messages": _plain(messages), "add_generation_prompt": True},
            )
            if found.get("tokens"):
                return [int(token) for token in found["tokens"]], None
        except (Refused, ValueError, TypeError):
            pass
        try:
            seen = str(self._call(f"{self.root}/apply-template", {"messages": _plain(messages)})["prompt"])
        except (Refused, KeyError):
            return None, None
        # It leaves the token that begins a text to its tokenizer.
        begun = seen != text and text.endswith(seen)
        try:
            asked = {"content": seen, "add_special": begun, "parse_special": True}
            ids = [int(token) for token in self._call(f"{self.root}/tokenize", asked)["tokens"]]
        except (Refused, KeyError, ValueError, TypeError):
            return None, seen
        return ids, text if begun else seen

    def chat(self, messages: Sequence[Message], max_tokens: int) -> Answer:
        """Continue a conversation greedily."""
        body = {"messages": _plain(messages), "logprobs": True, "top_logprobs": 5}
        choice = self._choice("chat/completions", body, max_tokens)
        with _understood("chat/completions"):
            content = (choice.get("logprobs") or {}).get("content") or [{}]
            top = content[0].get("top_logprobs") or []
            text = choice["message"].get("content") or ""
            return _answer(choice, text, {one["token"]: one["logprob"] for one in top})

    def complete(self, prompt: list[int] | str, max_tokens: int) -> Answer:
        """Continue token ids (or a text) greedily.

        Raises:
            Refused: The server takes no such prompt.
        """
        choice = self._choice("completions", {"prompt": prompt, "logprobs": 5}, max_tokens)
        with _understood("completions"):
            top = (choice.get("logprobs") or {}).get("top_logprobs") or [{}]
            return _answer(choice, choice["text"], dict(top[0] or {}))

    def _choice(self, path: str, body: dict[str, Any], max_tokens: int) -> dict[str, Any]:
        settings = {"model": self.model, "max_tokens": max_tokens, "temperature": 0, "seed": 0, **body}
        try:
            found = self._call(f"{self.url}/{path}", settings)
        except Refused:
            # Not every server tells probabilities.
            plain = {key: value for key, value in settings.items() if key not in ("logprobs", "top_logprobs")}
            found = self._call(f"{self.url}/{path}", plain)
        with _understood(path):
            return dict(found["choices"][0])

    def _call(self, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, headers=self._headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                found = json.loads(response.read(MAX_BYTES))
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (401, 403):
                raise EnvironmentProblem(f"{url}: {error.code}. Pass key_env=<variable that holds the key>.") from None
            raise Refused(f"{url}: {error.code}") from None
        except (OSError, ValueError) as error:
            raise EnvironmentProblem(
                f"{url} gives no answer that can be read ({type(error).__name__}). Is it running?"
            ) from None
        if not isinstance(found, dict):
            raise Refused(f"{url}: no JSON object")
        return found


@contextmanager
def _understood(path: str) -> Iterator[None]:
    """Refuse an answer that has another form than OpenAI's."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise Refused(f"{path}: an answer of another form ({type(error).__name__})") from error


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _answer(choice: dict[str, Any], text: str, top: dict[str, Any]) -> Answer:
    reason = choice.get("finish_reason")
    ended = None if reason is None else reason == "stop"
    return Answer(str(text), ended, {str(token): float(logp) for token, logp in top.items() if logp is not None})
