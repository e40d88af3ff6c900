"""Ask a model in the words of its training template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from fine_tune.evaluation.generate import Decoding, generate
from fine_tune.evaluation.sampling import Sampling
from fine_tune.models.adapter import adapter_off, causal_lm
from fine_tune.text.conversation import Message
from fine_tune.text.encode import Encoder
from fine_tune.text.template import ChatTemplate


@dataclass(frozen=True)
class Completion:
    """What a model said: its text without the stop token, and its length in tokens.

    ``stopped`` is True where a stop token ended it, False where the limit did, None where nobody wrote it down.
    """

    text: str
    num_tokens: int
    stopped: bool | None = None


@dataclass
class Answerer:
    """Answers to conversations, greedy by default, through the training path's own rendering and encoding.

    ``batch_size`` is in prompts. Prompts longer than ``max_prompt_tokens`` keep their last tokens. ``of_base`` remembers what
    the base answered without its adapter, under names that begin with ``base_key``, which tells bases and their ways apart.
    """

    network: nn.Module
    tokenizer: Any
    template: ChatTemplate
    max_prompt_tokens: int
    precision: torch.dtype = torch.float32
    batch_size: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    of_base: MutableMapping[str, list[Completion]] | None = None
    base_key: str = ""

    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        base: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Continue each conversation, with the adapter or (``base``) without it."""
        prompts = [self.encoder.encode_prompt(c) for c in conversations]
        return self.continue_prompts(prompts, max_new_tokens=max_new_tokens, base=base, progress=progress)

    def continue_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        base: bool = False,
        keys: Sequence[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Continue prompts that are encoded already; ``keys`` name them where tokens are drawn."""
        if not base or self.of_base is None:
            return self._continued(prompts, max_new_tokens, base=base, keys=keys, progress=progress)
        asked = [self.base_key, self.max_prompt_tokens, self.batch_size, str(self.sampling), self.stop_ids(), max_new_tokens, keys]
        name = hashlib.sha256(json.dumps([asked, [list(map(int, prompt)) for prompt in prompts]]).encode()).hexdigest()
        if name not in self.of_base:
            self.of_base[name] = self._continued(prompts, max_new_tokens, base=base, keys=keys, progress=progress)
        elif progress is not None:
            progress(len(prompts))
        return self.of_base[name]

    def _continued(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        base: bool,
        keys: Sequence[str] | None,
        progress: Callable[[int], None] | None,
    ) -> list[Completion]:
        decoding = Decoding(tuple(self.stop_ids()), self.tokenizer.pad_token_id, max_new_tokens, self.sampling)
        device = causal_lm(self.network).device.type
        half = self.precision != torch.float32
        # A compiled layer would be made anew for every length of the cache.
        eager = torch.compiler.set_stance("force_eager")
        with eager, torch.autocast(device, self.precision, enabled=half), adapter_as_asked(self.network, base=base):
            rows = generate(
                self.network,
                [prompt[-self.max_prompt_tokens :] for prompt in prompts],
                decoding=decoding,
                keys=keys,
                batch_size=self.batch_size,
                progress=progress,
            )
        texts = [self.tokenizer.decode(row.ids, skip_special_tokens=True).strip() for row in rows]
        return [Completion(text, len(row.ids), row.stopped) for text, row in zip(texts, rows, strict=True)]

    @cached_property
    def encoder(self) -> Encoder:
        """The training path's own encoder."""
        return Encoder(self.tokenizer, self.template)

    def stop_ids(self) -> list[int]:
        """Return the ids that end a completion: the end of turn and the end of text."""
        return sorted({self.encoder.end_of_turn_id, self.tokenizer.eos_token_id} - {None})

    def has_adapter(self) -> bool:
        """Tell whether there is an adapter to switch off."""
        return isinstance(self.network, PeftModel)


@contextmanager
def adapter_as_asked(network: nn.Module, *, base: bool) -> Iterator[None]:
    """Run a block with the adapter, or (``base``) without it."""
    with adapter_off(network) if base else nullcontext():
        yield
