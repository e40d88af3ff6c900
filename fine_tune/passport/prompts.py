"""The prompts of a passport: fixed, so that an artifact carries nobody's data, and unlike enough to tell formats apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fine_tune.errors import ConfigError
from fine_tune.text.conversation import Message, Role, RowRefused
from fine_tune.text.encode import Encoder
from fine_tune.text.template import ChatTemplate

NUM_PROMPTS = 8


class Asked(NamedTuple):
    """One prompt: its name, its messages, their render, and the token ids that training would make of it."""

    name: str
    messages: tuple[Message, ...]
    text: str
    ids: list[int]


def _turns(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    roles: tuple[Role, Role] = ("user", "assistant")
    turns = [Message(roles[i % 2], content) for i, content in enumerate(contents)]
    return tuple([Message("system", system), *turns] if system is not None else turns)


# The last ones stand in for those that a template refuses or another program would encode otherwise.
CANDIDATES: dict[str, tuple[Message, ...]] = {
    "question": _turns("What is the capital of France?"),
    "system": _turns("Name three colours.", system="Answer in one short sentence."),
    "second turn": _turns("Hello!", "Hello, how can I help you?", "Write the numbers from one to five."),
    "lines": _turns("Sort these words:\n- pear\n- apple\n\n- fig"),
    "code": _turns('def add(a, b):\n    return a + b\n\nWhat does add(2, 3) return? {"strict": true}'),
    "numbers": _turns("Compute 12345 + 678.90 - 3 * 7."),
    "languages": _turns("Translate to English: \u00dcbermorgen f\u00e4hrt der Zug. \u4f60\u597d \U0001f642"),
    "blanks": _turns("  Repeat this   line exactly.\t "),
    "third turn": _turns("Hi.", "Hi!", "Name a river.", "The Nile.", "And a mountain?"),
    "one word": _turns("Continue"),
    "longer": _turns("Explain in two sentences why the sky is blue, and in one sentence why a sunset is red."),
    "list": _turns("Give me a list of four animals, one per line."),
}


def ask(tokenizer: Any, template: ChatTemplate, *, max_tokens: int | None) -> tuple[list[Asked], dict[str, str]]:
    """Render and encode the first prompts that other programs can repeat; return them, and why the others were left out.

    Args:
        tokenizer: It carries the chat template as an export writes it.
        template: The template that was trained with.
        max_tokens: Longest prompt that leaves the model room to answer, None for any.
    """
    encoder = Encoder(tokenizer, template)
    chosen: list[Asked] = []
    left_out: dict[str, str] = {}
    for name, messages in CANDIDATES.items():
        if len(chosen) == NUM_PROMPTS:
            break
        try:
            text = template.render(messages, add_generation_prompt=True)
            ids = encoder.encode_prompt(messages)
        except (RowRefused, ConfigError) as refused:
            left_out[name] = str(refused)
            continue
        if max_tokens is not None and len(ids) > max_tokens:
            left_out[name] = f"{len(ids)} tokens leave the model no room to answer"
        elif (reason := _not_repeatable(tokenizer, messages, text, ids)) is not None:
            left_out[name] = reason
        else:
            chosen.append(Asked(name, messages, text, ids))
    return chosen, left_out


def _not_repeatable(tokenizer: Any, messages: Sequence[Message], text: str, ids: list[int]) -> str | None:
    """Tell why a program that has only the exported tokenizer would not see these ids, where it would not."""
    theirs = rendered(tokenizer, messages)
    if theirs != text:
        return "transformers renders it otherwise"
    if encoded(tokenizer, theirs) != ids:
        return "encoded in one piece it is other tokens"
    return None


def rendered(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Render a generation prompt as transformers does, with the template that a tokenizer carries."""
    plain = [{"role": message.role, "content": message.content} for message in messages]
    return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Encode a render in one piece; the template has written the special tokens already."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
