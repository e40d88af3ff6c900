"""The passport of an artifact: what it must say again wherever it is served."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fine_tune.errors import CheckpointError
from fine_tune.passport.prompts import Asked, ask
from fine_tune.passport.replay import NUM_TOKENS, Said, replay
from fine_tune.storage import finite, write_json
from fine_tune.text.conversation import Message
from fine_tune.text.encode import Encoder
from fine_tune.text.template import ChatTemplate
from fine_tune.text.tokenizer import tokenizer_fingerprint

FILE = "passport.json"
FORMAT = 1
# What a decoder writes for the beginning of a character.
PARTIAL = "\ufffd"


@dataclass(frozen=True)
class Passport:
    """A passport that was read.

    Attributes:
        asked: The prompts.
        said: The continuation of each, as ids.
        pieces: The same as text, a piece per token; they join to the whole.
        texts_of_top: The likeliest first tokens of each prompt as text.
        special: Names and ids of special tokens; ``stop`` is a list.
        template: Name and hashes of the chat template.
        precision: What the continuations were computed in.
    """

    asked: list[Asked]
    said: list[Said]
    pieces: list[list[str]]
    texts_of_top: list[list[str]]
    special: dict[str, Any]
    template: dict[str, Any]
    precision: str
    tokenizer: str = ""
    origin: dict[str, Any] = field(default_factory=dict)


def write_passport(
    folder: Path,
    network: nn.Module,
    *,
    tokenizer: Any,
    template: ChatTemplate,
    origin: Mapping[str, Any],
    precision: torch.dtype,
) -> None:
    """Ask a network the fixed prompts and write what it says into its artifact's folder.

    Args:
        folder: The artifact.
        network: What was exported, on its device.
        tokenizer: It carries the chat template as it was exported.
        template: The same template.
        origin: What the artifact says about itself.
        precision: What products are computed in.
    """
    asked, left_out = questions(network, tokenizer, template)
    stop_ids = stops(tokenizer, template)
    prompts = [one.ids for one in asked]
    said = replay(network, prompts, stop_ids=stop_ids, pad_id=tokenizer.pad_token_id, precision=precision)
    found = document(asked, said, tokenizer=tokenizer, template=template, left_out=left_out)
    name = str(precision).removeprefix("torch.")
    write_json(folder / FILE, {**found, "precision": name, "origin": dict(origin)})


def questions(network: nn.Module, tokenizer: Any, template: ChatTemplate) -> tuple[list[Asked], dict[str, str]]:
    """Choose the prompts for which a model has room."""
    config: Any = network.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return ask(tokenizer, template, max_tokens=context and context - NUM_TOKENS)


def stops(tokenizer: Any, template: ChatTemplate) -> list[int]:
    """Return the ids that end a turn: the template's end of turn, and the end of text."""
    return sorted({Encoder(tokenizer, template).end_of_turn_id, tokenizer.eos_token_id} - {None})


def document(
    asked: Sequence[Asked],
    said: Sequence[Said],
    *,
    tokenizer: Any,
    template: ChatTemplate,
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    """Return a passport as plain values, but for ``precision`` and ``origin``."""
    end_of_turn = Encoder(tokenizer, template).end_of_turn_id
    return {
        "format": FORMAT,
        "template": {
            "name": template.name,
            "sha256": template.sha256,
            "text_sha256": hash_text(tokenizer.chat_template),
            "end_of_turn": template.end_of_turn,
        },
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        "special_ids": {
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "pad": tokenizer.pad_token_id,
            "end_of_turn": end_of_turn,
            "stop": stops(tokenizer, template),
        },
        "prompts": [_entry(one, answer, tokenizer) for one, answer in zip(asked, said, strict=True)],
        "left_out": dict(left_out),
    }


def _entry(one: Asked, said: Said, tokenizer: Any) -> dict[str, Any]:
    return {
        "name": one.name,
        "messages": [{"role": message.role, "content": message.content} for message in one.messages],
        "text": one.text,
        "ids": one.ids,
        "greedy_ids": said.ids,
        "greedy_pieces": pieces(tokenizer, said.ids),
        "stop_id": said.stop_id,
        "margins": [round(margin, 6) for margin in said.margins],
        "first_token": [{"id": i, "text": tokenizer.decode([i]), "logprob": round(logp, 6)} for i, logp in said.top],
    }


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Part a continuation's text by its tokens; a token that ends inside a character leaves it to the next.

    Special tokens have no text: no server sends them.
    """
    whole = tokenizer.decode(list(ids), skip_special_tokens=True).rstrip(PARTIAL)
    found, done = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:end]), skip_special_tokens=True).rstrip(PARTIAL)
        upto = max(done, _shared(text, whole))
        found.append(whole[done:upto])
        done = upto
    return found


def _shared(one: str, other: str) -> int:
    """Count the characters that two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def hash_text(text: str | None) -> str | None:
    """Hash a chat template's text."""
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def read_passport(place: Path) -> Passport:
    """Read a passport file, or the one in an artifact's folder.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    file = place / FILE if place.is_dir() else place
    if place.is_dir() and not file.is_file():
        # A run's own is beside its adapter.
        file = place / "adapter" / FILE
    if not file.is_file():
        raise CheckpointError(
            f"passport={place}: no {FILE} there. Pass a run, an adapter or a merged folder made by fine-tune."
        )
    try:
        found = finite(json.loads(file.read_text(encoding="utf-8")))
        if found["format"] != FORMAT:
            raise CheckpointError(f"{file}: format {found['format']}, this version reads {FORMAT}. Make it again.")
        return _read(found)
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: damaged ({type(error).__name__}: {error}). Make it again.") from error


def _read(found: Mapping[str, Any]) -> Passport:
    prompts = found["prompts"]
    for entry in prompts:
        if not entry["ids"] or len(entry["margins"]) < len(entry["greedy_ids"]) or not entry["first_token"]:
            raise ValueError(f"prompt {entry['name']} is not complete")
    if not prompts:
        raise ValueError("no prompts")
    return Passport(
        asked=[
            Asked(
                one["name"], tuple(Message(m["role"], m["content"]) for m in one["messages"]), one["text"], one["ids"]
            )
            for one in prompts
        ],
        said=[
            Said(
                one["greedy_ids"], one["stop_id"], [(t["id"], t["logprob"]) for t in one["first_token"]], one["margins"]
            )
            for one in prompts
        ],
        pieces=[one["greedy_pieces"] for one in prompts],
        texts_of_top=[[token["text"] for token in one["first_token"]] for one in prompts],
        special=dict(found["special_ids"]),
        template=dict(found["template"]),
        precision=found["precision"],
        tokenizer=found["tokenizer_sha256"],
        origin=dict(found["origin"]),
    )
