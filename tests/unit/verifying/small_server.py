"""A small OpenAI-compatible server on loopback that serves a real model; each part of the interface can be left out."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


@functools.lru_cache(maxsize=4096)
def logps_after(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    """Score the next token; kept, since many servers are asked the same of one model."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


@dataclass
class Served:
    """What is served, and how much of the interface.

    Attributes:
        speaks: ``vllm`` tokenizes conversations and takes token ids; ``llama`` renders and tokenizes; ``plain`` does neither.
        with_logprobs: Log-probabilities are told.
        stops: Tokens that end an answer.
        key: The key that a request must carry.
        seen: The requests so far: path, headers and body.
    """

    model: Any
    tokenizer: Any
    speaks: str = "vllm"
    with_logprobs: bool = True
    stops: tuple[int, ...] = (2, 4)
    key: str | None = None
    seen: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "small"}]}
        if path == "/tokenize" and "messages" in body and self.speaks == "vllm":
            return 200, {"tokens": self.prompt(body["messages"])}
        if path == "/tokenize" and "content" in body and self.speaks == "llama":
            return 200, {"tokens": self.tokenizer(body["content"], add_special_tokens=False)["input_ids"]}
        if path == "/apply-template" and self.speaks == "llama":
            return 200, {"prompt": self.render(body["messages"])}
        if path == "/v1/chat/completions":
            return self.chat(body)
        if path == "/v1/completions" and self.speaks != "plain":
            return self.complete(body)
        return 404, {"error": "no such path"}

    def render(self, messages: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        return list(self.tokenizer(self.render(messages), add_special_tokens=False)["input_ids"])

    def chat(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body.get("logprobs") and not self.with_logprobs:
            return 400, {"error": "no logprobs here"}
        text, reason, top = self.answer(self.prompt(body["messages"]), body["max_tokens"])
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
        if body.get("logprobs"):
            listed = [{"token": token, "logprob": logp} for token, logp in top.items()]
            choice["logprobs"] = {"content": [{"token": "x", "top_logprobs": listed}]}
        return 200, {"choices": [choice]}

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body.get("logprobs") and not self.with_logprobs:
            return 400, {"error": "no logprobs here"}
        text, reason, top = self.answer(body["prompt"], body["max_tokens"])
        told = {"top_logprobs": [top]} if body.get("logprobs") else None
        return 200, {"choices": [{"text": text, "finish_reason": reason, "logprobs": told}]}

    def answer(self, ids: list[int], limit: int) -> tuple[str, str, dict[str, float]]:
        made, top = list(ids), {}
        for place in range(limit):
            logps = logps_after(self.model, tuple(made))
            if place == 0:
                values, best = logps.topk(5)
                top = dict(zip((self.tokenizer.decode([i]) for i in best.tolist()), values.tolist(), strict=True))
            token = int(logps.argmax())
            if token in self.stops:
                return self.text(made[len(ids) :]), "stop", top
            made.append(token)
        return self.text(made[len(ids) :]), "length", top

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


@contextmanager
def serving(served: Served) -> Iterator[str]:
    """Serve until the block ends; yields the address up to and including ``/v1``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.respond({})

        def do_POST(self) -> None:
            self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def respond(self, body: dict[str, Any]) -> None:
            served.seen.append((self.path, dict(self.headers), body))
            allowed = served.key is None or self.headers.get("Authorization") == f"Bearer {served.key}"
            code, found = served.reply(self.path, body) if allowed else (401, {})
            content = json.dumps(found).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
