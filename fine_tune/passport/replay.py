"""What a network says to given token ids, greedily, and how sure it is: the part of a passport that depends on weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fine_tune.evaluation.generate import Decoding, Generated, generate, generating
from fine_tune.models.adapter import causal_lm

NUM_TOKENS = 32
TOP = 5


class Said(NamedTuple):
    """A greedy continuation.

    Attributes:
        ids: Its tokens, without the stop token.
        stop_id: The token that ended it, None where the limit did.
        top: Ids and log-probabilities (nats) of the likeliest first tokens.
        margins: Nats between each chosen token and the next best, the stop token's last; near zero is a tie.
    """

    ids: list[int]
    stop_id: int | None
    top: list[tuple[int, float]]
    margins: list[float]


def replay(
    network: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    precision: torch.dtype = torch.float32,
) -> list[Said]:
    """Continue each prompt greedily and measure the continuation in one more pass.

    Args:
        network: A causal language model, adapted or not.
        prompts: Token ids.
        stop_ids: Any of these ends a continuation.
        pad_id: Fills the left of shorter prompts.
        precision: What products are computed in; float32 for no autocast.
    """
    decoding = Decoding(tuple(stop_ids), pad_id, NUM_TOKENS)
    device = causal_lm(network).device
    # A compiled layer would be made anew for every length of the cache.
    eager = torch.compiler.set_stance("force_eager")
    with eager, torch.autocast(device.type, precision, enabled=precision != torch.float32):
        found = generate(network, prompts, decoding=decoding)
        with generating(network):
            said = []
            for prompt, generated in zip(prompts, found, strict=True):
                logits = logits_of(network, [*prompt, *generated.ids])[len(prompt) - 1 :]
                said.append(measure(generated, logits, stop_ids))
    return said


def logits_of(network: nn.Module, ids: Sequence[int]) -> Tensor:
    """Return the next-token logits at every position, ``[T, V]``, float32, on the CPU; call in evaluation mode."""
    inner: Any = causal_lm(network)
    with torch.no_grad():
        out = inner(input_ids=torch.tensor([list(ids)], device=inner.device), use_cache=False)
    logits: Tensor = out.logits[0].float().cpu()
    return logits


def measure(generated: Generated, logits: Tensor, stop_ids: Sequence[int]) -> Said:
    """Put a continuation and its logits together.

    Args:
        generated: The continuation of n tokens.
        logits: From the prompt's last position on, ``[n + 1, V]``.
        stop_ids: Tokens that end a continuation.
    """
    logps = logits.double().log_softmax(-1)
    values, ids = logps[0].topk(min(TOP, logps.shape[1]))
    stop_id = max(stop_ids, key=lambda i: float(logps[-1, i])) if generated.stopped else None
    chosen = generated.ids if stop_id is None else [*generated.ids, stop_id]
    margins = [_margin(row, token) for row, token in zip(logps[: len(chosen)], chosen, strict=True)]
    return Said(list(generated.ids), stop_id, list(zip(ids.tolist(), values.tolist(), strict=True)), margins)


def _margin(row: Tensor, token: int) -> float:
    others = row.clone()
    others[token] = -torch.inf
    return float(row[token] - others.max())
