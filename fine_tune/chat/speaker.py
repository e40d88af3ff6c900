"""A checkpoint that answers, token by token, in the words of its training template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from peft import PeftModel

from fine_tune.chat.kept_cache import KeptCache
from fine_tune.chat.unfolding import Unfolding
from fine_tune.evaluation.answers import Answerer, adapter_as_asked
from fine_tune.evaluation.asking import context_of
from fine_tune.evaluation.generate import Batch, generating
from fine_tune.evaluation.protocol import Subject, evaluating
from fine_tune.evaluation.sampling import Chooser, Sampling
from fine_tune.models.adapter import causal_lm
from fine_tune.subjects import Named, Stage
from fine_tune.text.conversation import Message
from fine_tune.text.encode import Encoder

End = Literal["whole", "limit", "context", "stopped"]


@dataclass(frozen=True)
class Answer:
    """What a checkpoint said.

    ``ended`` says what ended it: a stop token (``whole``), ``max_new_tokens`` (``limit``), a full context (``context``)
    or the person (``stopped``). ``read_again`` is True where what was streamed is not how the text reads now.
    """

    text: str
    ended: End
    read_again: bool = False


class SharedStage:
    """A loaded base that remembers which adapter is on it: what is on it already is not loaded again."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._on: Named | None = None
        self._known: dict[str, Subject] = {}

    def show(self, named: Named) -> Subject:
        """Return a checkpoint ready to answer.

        Raises:
            CheckpointError: Its adapter does not fit this base, or is gone.
        """
        if named.label not in self._known or (named.weights is not None and self._on is not named):
            self._load(named)
        # Another adapter's shape may have replaced the network since; the base answers with the adapter off.
        network = self._stage.network
        base = named.weights is None and isinstance(network, PeftModel)
        return replace(self._known[named.label], network=network, base=base)

    def _load(self, named: Named) -> None:
        if named.weights is not None:
            # Half-loaded, should it break off here.
            self._on = None
        self._known[named.label] = self._stage.show(named)
        if named.weights is not None:
            self._on = named


class Speaker:
    """One checkpoint in a conversation.

    Args:
        named: The checkpoint.
        stage: Its base, perhaps shared.
        sampling: How tokens are drawn.
        max_new_tokens: Most tokens of an answer.

    Attributes:
        label: Its name.
        context: Most tokens of a prompt and its answer together.
        room: Most tokens of a prompt: a full answer, or one of half the context, must find place behind it.
    """

    def __init__(self, named: Named, stage: SharedStage, sampling: Sampling, max_new_tokens: int) -> None:
        self.label, self._named, self._stage = named.label, named, stage
        self._sampling, self._max_new_tokens = sampling, max_new_tokens
        self._kept = KeptCache()
        subject = stage.show(named)
        self.template = subject.template
        self._answerer = Answerer(subject.network, subject.tokenizer, subject.template, max_prompt_tokens=1)
        self.context = context_of(subject)
        self.room = self.context - min(max_new_tokens, self.context // 2)

    @property
    def encoder(self) -> Encoder:
        """The training path's own encoder."""
        return self._answerer.encoder

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        return frozenset(self._answerer.stop_ids())

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids that training sees before the answer.

        Raises:
            RowRefused: The template takes no such conversation.
        """
        return self.encoder.encode_prompt(messages)

    def answer(
        self, prompt: Sequence[int], *, key: str, say: Callable[[str], None], stopped: Callable[[], bool]
    ) -> Answer:
        """Answer, handing over the text as it comes.

        Args:
            prompt: Ids of at most ``room`` tokens.
            key: Name of the prompt, from which sampling takes its numbers.
            say: Takes each piece of text.
            stopped: Asked before each token; True ends the answer.
        """
        subject = self._stage.show(self._named)
        text = Unfolding(subject.tokenizer)
        with _speaking(subject):
            ended = self._continue(subject, prompt, key=key, take=lambda token: say(text.add(token)), stopped=stopped)
        whole = text.text()
        if whole.startswith(text.shown):
            say(whole[len(text.shown) :])
            return Answer(whole, ended)
        return Answer(whole, ended, read_again=True)

    def _continue(
        self,
        subject: Subject,
        prompt: Sequence[int],
        *,
        key: str,
        take: Callable[[int], None],
        stopped: Callable[[], bool],
    ) -> End:
        model: Any = causal_lm(subject.network)
        cache, known = self._kept.take(prompt, model.config.get_text_config())
        batch = Batch(model, torch.ones(1, len(prompt), dtype=torch.long, device=model.device), cache)
        chooser = Chooser(self._sampling, [key], self._max_new_tokens)
        limit = min(self._max_new_tokens, self.context - len(prompt))
        ended: End = "limit" if limit == self._max_new_tokens else "context"
        ids, new, done = list(prompt), torch.tensor([prompt[known:]], device=model.device), known
        for place in range(limit):
            if stopped():
                ended = "stopped"
                break
            chosen = chooser.choose(batch.step(new), batch.rows, place)
            done = len(ids)
            token = int(chosen)
            if token in self.stop_ids:
                ended = "whole"
                break
            ids.append(token)
            take(token)
            new = chosen[:, None]
        self._kept.put(cache, ids[:done])
        return ended


@contextmanager
def _speaking(subject: Subject) -> Iterator[None]:
    """Run a block as an evaluation generates: its modes, precision, attention, and the adapter as asked."""
    # A compiled layer would be made anew for every length of the cache.
    eager, adapter = torch.compiler.set_stance("force_eager"), adapter_as_asked(subject.network, base=subject.base)
    with evaluating(subject), eager, adapter, generating(subject.network):
        yield
