"""The typed settings of each evaluation; every default lives in ``conf/eval``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fine_tune.schema import RowFormat
from fine_tune.schema_types import AtLeast0, AtLeast1, Node, NotNegative, Text

TopP = Annotated[float, Field(gt=0, le=1)]


class Generating(Node):
    """How questions are answered."""

    max_new_tokens: AtLeast1 | None
    batch_size: AtLeast1
    temperature: NotNegative
    top_p: TopP
    top_k: AtLeast1 | None


class ExactMatch(Generating):
    """Answers against the right ones."""

    name: Literal["exact_match"]
    path: Text | None
    answer_rule: Literal["first_sentence", "whole"] | None
    normalisation: Literal["squad", "plain"]
    limit_words: AtLeast1 | None
    num_items: AtLeast1 | None


class Compare(Generating):
    """Answers side by side."""

    name: Literal["compare"]
    path: Text | None
    prompts: list[Text] | None
    num_items: AtLeast1 | None


class GSM8K(Generating):
    """Grade-school mathematics."""

    name: Literal["gsm8k"]
    path: Text
    num_items: AtLeast1 | None


class Scoring(Node):
    """Rows whose log-probabilities are taken."""

    path: Text | None
    format: RowFormat | None
    num_items: AtLeast1 | None
    micro_batch_tokens: AtLeast1
    head_chunk_tokens: AtLeast1


class Perplexity(Scoring):
    """Nats per learned token."""

    name: Literal["perplexity"]


class Preference(Scoring):
    """Chosen above rejected."""

    name: Literal["preference"]
    by: Literal["sum", "mean", "reward"]


class MMLU(Node):
    """Multiple choice over 57 subjects."""

    name: Literal["mmlu"]
    path: Text | None
    format: Literal["json", "csv", "hub"]
    hub: Text
    revision: Text | None
    shots: Annotated[int, Field(ge=0, le=5)]
    split: Literal["val", "test"]
    num_items: AtLeast1 | None
    context_length: AtLeast1 | None
    pass_tokens: AtLeast1 | None


class LMEval(Node):
    """Tasks of lm-evaluation-harness."""

    name: Literal["lm_eval"]
    tasks: Annotated[list[Text], Field(min_length=1)]
    include_path: Text | None
    num_fewshot: AtLeast0 | None
    limit: AtLeast1 | None
    apply_chat_template: bool
    batch_size: AtLeast1
    micro_batch_tokens: AtLeast1
    download: bool
    unsafe_code: bool


# By the name that chooses among them.
EVALUATIONS: dict[str, type[Node]] = {
    "exact_match": ExactMatch, "compare": Compare, "gsm8k": GSM8K, "perplexity": Perplexity, "preference": Preference, "mmlu": MMLU,
    "lm_eval": LMEval,
}  # fmt: skip
AnyEvaluation = ExactMatch | Compare | GSM8K | Perplexity | Preference | MMLU | LMEval
