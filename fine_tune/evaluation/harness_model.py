"""The loaded network as a model of lm-evaluation-harness; imported only where that is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fine_tune.errors import ConfigError, DataError
from fine_tune.evaluation.generate import generating
from fine_tune.evaluation.protocol import Subject
from fine_tune.losses.logps import log_softmax_rows
from fine_tune.models.adapter import causal_lm
from fine_tune.models.base import decoder, output_head
from fine_tune.packing.segments import Segments, Span

if find_spec("lm_eval") is not None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs
else:
    # Tools that import every module find one here too; nobody is asked for this model without the library.
    HFLM = object

# Rows of logits that exist at a time.
HEAD_CHUNK_TOKENS = 1024


@dataclass
class Ask:
    """A context ``ids`` and the requests whose endings continue it; it is computed once for all of them."""

    ids: list[int]
    members: list[int]
    num_tokens: int


class NetworkLM(HFLM):  # type: ignore[misc]
    """HFLM over a subject: its tokenisation, its generation, and log-probabilities by packed passes without logits.

    Attributes:
        cut: Contexts that were too long and lost their beginning.
    """

    def __init__(self, subject: Subject, *, batch_size: int, micro_batch_tokens: int, templated: bool) -> None:
        """Wrap a subject; ``templated`` contexts bring their own special tokens."""
        self.network, self.inner = subject.network, causal_lm(subject.network)
        half = subject.precision != torch.float32
        # Not the model itself: HFLM would tie its weights anew, whatever an adapter wraps them in.
        handle = SimpleNamespace(config=self.inner.config, device=subject.device, generate=self.inner.generate)
        super().__init__(
            pretrained=handle,
            backend="causal",
            tokenizer=subject.tokenizer,
            batch_size=batch_size,
            mixed_precision_dtype=subject.precision if half else None,
            add_bos_token=False if templated else None,
        )
        self.micro_batch_tokens = micro_batch_tokens
        self.cut: set[str] = set()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Generate with a cache, as HFLM does.

        Raises:
            ConfigError: The context has no room for what a task wants to generate.
        """
        for context, options in {str(request.args): request.args for request in requests}.values():
            wanted = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            if wanted >= self.max_length:
                raise ConfigError(
                    f"eval.tasks: a task generates up to {wanted} tokens, and the context has {self.max_length}. Choose another "
                    "model, or set max_gen_toks in a task file of your own (eval.include_path=)."
                )
            if len(self.tok_encode(context)) > self.max_length - wanted:
                self.cut.add(context)
        with generating(self.network):
            return list(super().generate_until(list(requests), disable_tqdm=disable_tqdm))

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score endings, each ``(texts, context ids, ending ids)``, and tell whether greedy decoding would write them."""
        found = [(0.0, True)] * len(requests)
        endings = [list(request[2]) for request in requests]
        for batch in self._batches(self._asks(requests)):
            for member, logp, greedy in self._score(batch, endings):
                total, all_greedy = found[member]
                found[member] = (total + logp, all_greedy and greedy)
        return found

    def _asks(self, requests: Sequence[Any]) -> list[Ask]:
        asks: dict[tuple[int, ...], Ask] = {}
        full: list[Ask] = []
        for index, (texts, context, ending) in enumerate(requests):
            if not context or not ending or len(ending) > self.max_length:
                raise DataError(
                    f"eval.tasks: {str(texts)[-80:]!a} has {len(ending)} tokens to score behind {len(context)}, and the "
                    f"context has {self.max_length}. Leave the task out, or use another model."
                )
            # The last token of an ending is predicted and never read.
            whole = [*context, *ending][-(self.max_length + 1) :]
            if len(context) + len(ending) > len(whole) and texts is not None:
                self.cut.add(texts[0])
            ids = whole[: len(whole) - len(ending)]
            ask = asks.get(tuple(ids))
            if ask is None or ask.num_tokens + len(ending) > self.micro_batch_tokens:
                ask = asks[tuple(ids)] = Ask(ids, [], len(ids))
                full.append(ask)
            ask.members.append(index)
            ask.num_tokens += len(ending) - 1
        return full

    def _batches(self, asks: Sequence[Ask]) -> Iterator[list[Ask]]:
        """Fill passes, the longest first: what does not fit in memory fails at once."""
        batch: list[Ask] = []
        for ask in sorted(asks, key=lambda ask: -ask.num_tokens):
            if batch and sum(one.num_tokens for one in batch) + ask.num_tokens > self.micro_batch_tokens:
                yield batch
                batch = []
            batch.append(ask)
        if batch:
            yield batch

    def _score(self, batch: Sequence[Ask], endings: Sequence[list[int]]) -> Iterator[tuple[int, float, bool]]:
        """Run one packed pass; yields request, log-probability and greediness of every token that is scored."""
        ids: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        reads: list[tuple[int, int, int]] = []
        for ask in batch:
            start, size = len(ids), len(ask.ids)
            ids += ask.ids
            positions += range(size)
            spans.append(Span(start, size))
            for member in ask.members:
                ending = endings[member]
                fed = ending[:-1]
                places = [start + size - 1, *range(len(ids), len(ids) + len(fed))]
                reads += [(member, place, token) for place, token in zip(places, ending, strict=True)]
                if len(ids) == start + size:
                    # The first one that has tokens of its own follows the context as in any text.
                    spans[-1] = Span(start, size + len(fed))
                elif fed:
                    spans.append(Span(len(ids), len(fed), start, size))
                ids += fed
                positions += range(size, size + len(fed))
        logps, greedy = self._read(ids, positions, spans, reads)
        yield from zip((member for member, _, _ in reads), logps, greedy, strict=True)

    def _read(
        self, ids: list[int], positions: list[int], spans: list[Span], reads: Sequence[tuple[int, int, int]]
    ) -> tuple[list[float], list[bool]]:
        place = self.inner.device
        states: Tensor = decoder(self.inner)(
            input_ids=torch.tensor([ids], device=place),
            position_ids=torch.tensor([positions], device=place),
            use_cache=False,
            segments=Segments.from_spans(spans).to(place),
        ).last_hidden_state[0]
        logps: list[float] = []
        greedy: list[bool] = []
        for start in range(0, len(reads), HEAD_CHUNK_TOKENS):
            _, at, targets = (
                torch.tensor(column, device=place)
                for column in zip(*reads[start : start + HEAD_CHUNK_TOKENS], strict=True)
            )
            rows = log_softmax_rows(states[at], *output_head(self.inner))
            logps += rows.gather(1, targets[:, None]).squeeze(1).double().tolist()
            greedy += (rows.argmax(1) == targets).tolist()
        return logps, greedy
