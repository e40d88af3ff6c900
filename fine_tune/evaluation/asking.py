"""What the evaluations by generation share: prompts in fixed batches, and a completion for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fine_tune.errors import ConfigError
from fine_tune.evaluation.answers import Answerer, Completion
from fine_tune.evaluation.protocol import Subject, evaluating
from fine_tune.evaluation.questions import Question, encode_questions
from fine_tune.evaluation.sampling import Sampling
from fine_tune.evaluation.scores import share
from fine_tune.models.adapter import causal_lm
from fine_tune.text.template import ChatTemplate

# Where a config says nothing, what a plain llama is made for.
DEFAULT_CONTEXT = 2048
Row = TypeVar("Row", bound=Question)


@dataclass(frozen=True)
class Generation:
    """How questions are answered.

    Attributes:
        max_new_tokens: Most tokens of an answer.
        batch_size: Most prompts at a time.
        batch_tokens: Most tokens of a batch, padding and room for the answers included; one prompt is always taken.
        temperature: 0 is greedy; the next three then do nothing.
        top_p: As in :class:`Sampling`.
        top_k: As in :class:`Sampling`.
        seed: As in :class:`Sampling`.
    """

    max_new_tokens: int = 256
    batch_size: int = 64
    batch_tokens: int = 65536
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        problems = [
            f"eval.{key}={getattr(self, key)}: must be at least 1."
            for key in ("max_new_tokens", "batch_size", "batch_tokens")
            if getattr(self, key) < 1
        ]
        if problems:
            raise ConfigError(problems)
        _ = self.sampling

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.seed)

    def encoded(self, questions: Sequence[Row], tokenizer: Any, template: ChatTemplate) -> list[Row]:
        """Return the questions with their prompts encoded."""
        encoded = encode_questions(questions, tokenizer, template)
        return [replace(q, prompt_ids=tuple(ids)) for q, ids in zip(questions, encoded, strict=True)]

    def chunks(self, questions: Sequence[Question]) -> list[list[int]]:
        """Batch prompts of similar length, the longest first: what does not fit in memory fails at once."""
        order = sorted(range(len(questions)), key=lambda i: (-len(questions[i].prompt_ids), i))
        chunks: list[list[int]] = []
        size = 0
        for index in order:
            if not chunks or len(chunks[-1]) == size:
                width = len(questions[index].prompt_ids) + self.max_new_tokens
                size = max(1, min(self.batch_size, self.batch_tokens // width))
                chunks.append([])
            chunks[-1].append(index)
        return chunks

    def complete(self, subject: Subject, questions: Sequence[Question]) -> list[Completion]:
        """Answer the questions of one chunk together; a prompt longer than the context keeps its last tokens."""
        answerer = Answerer(
            subject.network,
            subject.tokenizer,
            subject.template,
            max_prompt_tokens=max(1, context_of(subject) - self.max_new_tokens),
            precision=subject.precision,
            batch_size=max(1, len(questions)),
            sampling=self.sampling,
        )
        with evaluating(subject):
            return answerer.continue_prompts(
                [question.prompt_ids for question in questions],
                max_new_tokens=self.max_new_tokens,
                base=subject.base,
                keys=[question.id for question in questions],
            )


def context_of(subject: Subject) -> int:
    """Return the most tokens that a prompt and its answer may have together."""
    config = causal_lm(subject.network).config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT


def line_of(question: Question, said: Completion) -> dict[str, Any]:
    """Return what every line of a generation holds."""
    return {
        "id": question.id,
        "prompt": question.prompt,
        "completion": said.text,
        "num_tokens": said.num_tokens,
        "num_words": len(said.text.split()),
        "stopped": said.stopped,
    }


def length_metrics(lines: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return mean lengths and the share of answers that ended themselves."""
    return {
        "mean_completion_tokens": share([line["num_tokens"] for line in lines]),
        "mean_completion_words": share([line["num_words"] for line in lines]),
        "stop_rate": share([line["stopped"] for line in lines]),
    }
