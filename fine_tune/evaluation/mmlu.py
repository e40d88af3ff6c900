"""MMLU: multiple choice by the log-probability of the letter, with zero or more examples in the prompt."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

from fine_tune.errors import ConfigError
from fine_tune.evaluation.answers import adapter_as_asked
from fine_tune.evaluation.choice_rows import ChoicePrompt, encode_choices
from fine_tune.evaluation.choices import choice_logps
from fine_tune.evaluation.mmlu_data import CATEGORIES, LETTERS, Prompt, category_of, read_csv, read_hub_set, read_json
from fine_tune.evaluation.packed_choices import packed_choice_logps
from fine_tune.evaluation.protocol import Subject, evaluating
from fine_tune.evaluation.scores import share
from fine_tune.evaluation.shared_beginnings import share_beginnings
from fine_tune.models.adapter import causal_lm
from fine_tune.text.template import ChatTemplate

FORMATS = ("json", "csv", "hub")
# Tokens of a forward pass. A CPU has small caches and many threads, a GPU wants few large products.
CPU_PASS_TOKENS, GPU_PASS_TOKENS = 1024, 8192


@dataclass(frozen=True)
class MMLUItem:
    """A prompt with its tokens; ``prompt`` is all that the model reads."""

    id: str
    subject: str
    prompt: str
    target: str
    encoded: ChoicePrompt = field(repr=False, compare=False)


@dataclass
class MMLU:
    """Zero-shot and few-shot MMLU, in the prompts' own words, without a chat template.

    Attributes:
        path: QLoRA's JSON file or its folder, or MMLU's CSV folder.
        format: ``json``, ``csv`` or ``hub``.
        hub: Data set on the Hub, for ``format=hub``.
        revision: Its commit, branch or tag; None takes the newest.
        shots: Examples before each question.
        split: ``val`` or ``test``.
        num_items: So many questions, spread evenly over the subjects; None takes all.
        context_length: Most tokens that the model sees; None takes the model's own limit. Longer prompts keep their last
            tokens, and ``num_cut`` says how many there were.
        pass_tokens: Most tokens of one forward pass, on a CPU without shared examples; None takes few on a CPU, where caches are
            small, and many on a GPU.
    """

    path: str | None = None
    format: str = "json"
    hub: str = "cais/mmlu"
    revision: str | None = None
    shots: int = 5
    split: str = "val"
    num_items: int | None = None
    context_length: int | None = None
    pass_tokens: int | None = None
    name: str = "mmlu"
    compares: str | None = field(default="correct", init=False)
    better: Literal["higher", "lower"] = field(default="higher", init=False)

    def __post_init__(self) -> None:
        """Refuse a format that is none, and files without a path."""
        problems = []
        if self.format not in FORMATS:
            problems.append(f"eval.format={self.format}: unknown. Choose one of {', '.join(FORMATS)}.")
        elif self.format != "hub" and self.path is None:
            problems.append(f"eval.path=null: eval.format={self.format} reads files. Pass eval.path=<folder>.")
        if problems:
            raise ConfigError(problems)

    def prepare(self, tokenizer: Any, template: ChatTemplate) -> list[MMLUItem]:
        """Read and encode the prompts; the chat template has no part in them."""
        prompts = spread(self._read(), self.num_items)
        encoded = encode_choices(tokenizer, [prompt.prompt for prompt in prompts], LETTERS)
        return [MMLUItem(p.id, p.subject, p.prompt, p.target, e) for p, e in zip(prompts, encoded, strict=True)]

    def _read(self) -> list[Prompt]:
        if self.format == "hub":
            return read_hub_set(self.hub, revision=self.revision, shots=self.shots, split=self.split)
        read = read_json if self.format == "json" else read_csv
        return read(str(self.path), shots=self.shots, split=self.split)

    def chunks(self, items: Sequence[MMLUItem]) -> list[list[int]]:
        """Divide each subject by what its prompts begin with, and put together what fits one pass of a GPU."""
        chunks: list[list[int]] = []
        room = 0
        for members, tokens in self._groups(items):
            if not chunks or tokens > room:
                chunks.append([])
                room = GPU_PASS_TOKENS
            chunks[-1] += members
            room -= tokens
        return chunks

    def _groups(self, items: Sequence[MMLUItem]) -> list[tuple[list[int], int]]:
        """Return what shares a beginning, with the tokens that have to be computed for it."""
        subjects: dict[str, list[int]] = {}
        for index, item in enumerate(items):
            subjects.setdefault(item.subject, []).append(index)
        groups = []
        for members in subjects.values():
            ids = [items[i].encoded.ids for i in members]
            for shared in share_beginnings(ids):
                own = sum(len(ids[i]) - shared.length for i in shared.members)
                groups.append(([members[i] for i in shared.members], shared.length + own))
        return groups

    def score(self, subject: Subject, items: Sequence[MMLUItem], chunk: list[int]) -> list[dict[str, Any]]:
        """Score the letters of each question of one chunk."""
        [lines] = self.score_each(subject, items, [chunk])
        return lines

    def score_each(
        self, subject: Subject, items: Sequence[MMLUItem], chunks: Sequence[list[int]]
    ) -> Generator[list[dict[str, Any]], None, None]:
        """Score chunk after chunk, on a CPU with the next ones under way: no thread waits for the last pass of a subject."""
        context = self.context_length or _own_context(subject)
        on_cpu = subject.device.type == "cpu"
        tokens = self.pass_tokens or (CPU_PASS_TOKENS if on_cpu else GPU_PASS_TOKENS)
        scorer = choice_logps if on_cpu else packed_choice_logps
        asked = [[items[i].encoded for i in chunk] for chunk in chunks]
        with (
            evaluating(subject),
            adapter_as_asked(subject.network, base=subject.base),
            closing(scorer(subject.network, asked, context=context, pass_tokens=tokens)) as found,
        ):
            for chunk, scores in zip(chunks, found, strict=True):
                yield [_line(items[i], logps, context) for i, logps in zip(chunk, scores, strict=True)]

    def metrics(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return accuracy over questions, its mean over subjects, and both by subject and category."""
        by_subject = _accuracies(lines, lambda line: str(line["subject"]))
        prefixes = _prefixes((line["subject"], line["prompt"]) for line in lines)
        by_category = _accuracies(lines, lambda line: str(line["category"]))
        order = [name for name in (*CATEGORIES, *sorted(by_category)) if name in by_category]
        return {
            "accuracy": share([line["correct"] for line in lines]),
            "accuracy_macro": share([one["accuracy"] for one in by_subject.values()]),
            "by_category": {name: by_category[name] for name in dict.fromkeys(order)},
            "by_subject": {name: {**one, "num_prefixes": len(prefixes[name])} for name, one in by_subject.items()},
            "choices": {letter: sum(line["choice"] == letter for line in lines) for letter in LETTERS},
            "num_cut": sum(line["cut_tokens"] > 0 for line in lines),
            "token_ids": _scored(line["token_ids"] for line in lines),
        }

    def groups(self, line: Mapping[str, Any]) -> str | None:
        """Group by subject."""
        return str(line["subject"])

    def note(self, items: Sequence[MMLUItem], tokenizer: Any) -> str:
        """Say which tokens are scored and how prompts begin, for the terminal."""
        scored = _scored(_token_ids(item.encoded) for item in items)
        told = [f"{letter} {ways}" for letter, ways in _told(scored, tokenizer).items()]
        prefixes = _prefixes((item.subject, item.prompt) for item in items)
        several = sum(len(texts) > 1 for texts in prefixes.values())
        return (
            f"scores the tokens that a prompt gains by ' A' to ' D': {'; '.join(told)}\n"
            f"{sum(map(len, prefixes.values()))} different prefixes (up to a prompt's last empty line), more than one in "
            f"{several} of {len(prefixes)} subjects; {len(self._groups(items))} groups share the tokens they begin with"
        )


def spread(prompts: Sequence[Prompt], num_items: int | None) -> list[Prompt]:
    """Take evenly spaced prompts: the first so many would be of a few subjects only."""
    size = len(prompts)
    if num_items is None or num_items >= size:
        return list(prompts)
    return [prompts[i * size // num_items] for i in range(num_items)]


def _prefixes(prompts: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """Collect what stands before the last empty line, by subject: the examples, and more where a question has such a line."""
    found: dict[str, set[str]] = {}
    for subject, prompt in prompts:
        found.setdefault(subject, set()).add(prompt.rpartition("\n\n")[0])
    return found


def _own_context(subject: Subject) -> int:
    limit = getattr(causal_lm(subject.network).config.get_text_config(), "max_position_embeddings", None)
    if not limit:
        raise ConfigError(
            "eval.context_length=null: the model's config names no limit. Pass eval.context_length=<tokens>."
        )
    return int(limit)


def _line(item: MMLUItem, logps: Sequence[float], context: int) -> dict[str, Any]:
    # Of equal scores the first letter wins.
    choice = LETTERS[max(range(len(LETTERS)), key=lambda i: logps[i])]
    longest = len(item.encoded.ids) + max(map(len, item.encoded.endings)) - 1
    return {
        "id": item.id,
        "prompt": item.prompt,
        "choice": choice,
        "target": item.target,
        "correct": choice == item.target,
        "logps": dict(zip(LETTERS, logps, strict=True)),
        "subject": item.subject,
        "category": category_of(item.subject),
        "cut_tokens": max(0, longest - context),
        "token_ids": _token_ids(item.encoded),
    }


def _token_ids(encoded: ChoicePrompt) -> dict[str, list[int]]:
    return {letter: list(ending) for letter, ending in zip(LETTERS, encoded.endings, strict=True)}


def _scored(found: Any) -> dict[str, list[list[int]]]:
    """Collect the distinct token ids of each letter; more than one list means that prompts differ in them."""
    distinct: dict[str, dict[tuple[int, ...], None]] = {letter: {} for letter in LETTERS}
    for token_ids in found:
        for letter, ids in token_ids.items():
            distinct[letter][tuple(ids)] = None
    return {letter: sorted(list(ids) for ids in ways) for letter, ways in distinct.items()}


def _told(scored: Mapping[str, Sequence[Sequence[int]]], tokenizer: Any) -> dict[str, str]:
    return {
        letter: " or ".join("+".join(f"{i} {tokenizer.convert_ids_to_tokens(i)!r}" for i in ids) for ids in ways)
        for letter, ways in scored.items()
    }


def _accuracies(
    lines: Sequence[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], str]
) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[bool]] = {}
    for line in lines:
        groups.setdefault(key(line), []).append(bool(line["correct"]))
    return {name: {"num_items": len(right), "accuracy": share(right)} for name, right in groups.items()}
