"""Gradients do not depend on how a step is computed; each equality has a control that breaks it on purpose."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fine_tune.losses.logps import token_logps
from fine_tune.losses.sft import sft_loss
from fine_tune.models import attention
from fine_tune.models.adapter import causal_lm
from fine_tune.models.base import decoder
from fine_tune.models.execution import Execution, prepare_layers
from fine_tune.models.forward import supervised_logps
from fine_tune.packing.batches import MicroBatch
from fine_tune.packing.segments import Segments

from .conftest import LENGTHS, Tiny, adapt, largest_difference, llama

TOLERANCE = 1e-9  # float64 with sdpa: rounding stays near 1e-15
BROKEN = 1e-5  # a real mistake is at least this far away
EVERY = tuple(range(len(LENGTHS)))


def step_loss(tiny: Tiny, parts: list[tuple[int, ...]]) -> Tensor:
    shares = [
        sft_loss(supervised_logps(tiny.network, tiny.micro(*p)), num_step_tokens=tiny.num_supervised) for p in parts
    ]
    return torch.stack(shares).sum()


def padded_loss(tiny: Tiny, *, left: bool, masked: bool = True) -> Tensor:
    """The whole step as one padded batch through the model's own forward and torch's cross-entropy."""
    width = max(LENGTHS)
    ids = torch.zeros(len(LENGTHS), width, dtype=torch.long)
    valid, labels, positions = torch.zeros_like(ids), torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (tokens, mask) in enumerate(tiny.rows):
        start = width - len(tokens) if left else 0
        place = slice(start, start + len(tokens))
        ids[row, place] = torch.from_numpy(tokens)
        valid[row, place] = 1
        positions[row, place] = torch.arange(len(tokens))
        labels[row, place] = torch.where(torch.from_numpy(mask), ids[row, place], -100)
    model = causal_lm(tiny.network)
    model.set_attn_implementation("sdpa")
    logits = tiny.network(
        input_ids=ids,
        attention_mask=valid if masked else torch.ones_like(valid),
        position_ids=positions,
        use_cache=False,
    ).logits
    model.set_attn_implementation(attention.PACKED)
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / tiny.num_supervised


def one_at_a_time(tiny: Tiny) -> dict[str, Tensor]:
    return tiny.gradients(lambda: step_loss(tiny, [(i,) for i in EVERY]))


def test_any_packing_equals_one_row_at_a_time(tiny: Tiny) -> None:
    alone = one_at_a_time(tiny)
    for order in (EVERY, EVERY[::-1], (3, 0, 5, 1, 4, 2)):
        assert largest_difference(alone, tiny.gradients(lambda order=order: step_loss(tiny, [order]))) < TOLERANCE


def test_packing_without_segments_is_caught(tiny: Tiny) -> None:
    def leaking(micro: MicroBatch) -> Tensor:
        micro.segments = Segments.of([micro.num_tokens])
        return sft_loss(supervised_logps(tiny.network, micro), num_step_tokens=tiny.num_supervised)

    assert largest_difference(one_at_a_time(tiny), tiny.gradients(lambda: leaking(tiny.micro(*EVERY)))) > BROKEN


def test_packing_without_restarting_positions_is_caught(tiny: Tiny) -> None:
    # Rotary positions only matter relatively, so each row moves by its own stretch.
    def stretched(micro: MicroBatch) -> Tensor:
        micro.position_ids = micro.position_ids + torch.arange(micro.num_tokens) // 2
        return sft_loss(supervised_logps(tiny.network, micro), num_step_tokens=tiny.num_supervised)

    assert largest_difference(one_at_a_time(tiny), tiny.gradients(lambda: stretched(tiny.micro(*EVERY)))) > BROKEN


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(labels=st.lists(st.integers(0, 3), min_size=len(LENGTHS), max_size=len(LENGTHS)))
def test_any_split_into_micro_batches_is_the_same_step(tiny: Tiny, labels: list[int]) -> None:
    parts = [tuple(i for i in EVERY if labels[i] == k) for k in sorted(set(labels))]
    whole = tiny.gradients(lambda: step_loss(tiny, [EVERY]))
    assert largest_difference(whole, tiny.gradients(lambda: step_loss(tiny, parts))) < TOLERANCE


def test_mean_of_micro_batch_means_is_caught(tiny: Tiny) -> None:
    def mean_of_means() -> Tensor:
        means = [-supervised_logps(tiny.network, tiny.micro(*part)).mean() for part in ((0, 1), (2, 3), (4, 5))]
        return torch.stack(means).mean()

    whole = tiny.gradients(lambda: step_loss(tiny, [EVERY]))
    assert largest_difference(whole, tiny.gradients(mean_of_means)) > BROKEN


@pytest.mark.parametrize("left", [False, True])
def test_padding_free_equals_padded(tiny: Tiny, left: bool) -> None:
    packed = tiny.gradients(lambda: step_loss(tiny, [EVERY]))
    assert largest_difference(packed, tiny.gradients(lambda: padded_loss(tiny, left=left))) < TOLERANCE


def test_left_padding_without_a_mask_is_caught(tiny: Tiny) -> None:
    packed = tiny.gradients(lambda: step_loss(tiny, [EVERY]))
    assert largest_difference(packed, tiny.gradients(lambda: padded_loss(tiny, left=True, masked=False))) > BROKEN


def plain_head_loss(tiny: Tiny, *, with_bias: bool = True) -> Tensor:
    """The same hidden states under torch's own linear layer and cross-entropy."""
    micro, model = tiny.micro(*EVERY), causal_lm(tiny.network)
    hidden = decoder(model)(
        input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False, segments=micro.segments
    ).last_hidden_state
    logits = F.linear(hidden[0], model.lm_head.weight, model.lm_head.bias if with_bias else None)
    return F.cross_entropy(logits[micro.rows], micro.targets, reduction="sum") / tiny.num_supervised


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_chunked_head_equals_plain_cross_entropy(tiny: Tiny, chunk: int) -> None:
    tiny.network = adapt(llama(bias=True))
    plain = tiny.gradients(lambda: plain_head_loss(tiny))

    def chunked() -> Tensor:
        logps = supervised_logps(tiny.network, tiny.micro(*EVERY), chunk_tokens=chunk)
        return sft_loss(logps, num_step_tokens=tiny.num_supervised)

    assert largest_difference(plain, tiny.gradients(chunked)) < TOLERANCE
    assert abs(plain_head_loss(tiny).item() - chunked().item()) < 1e-12


def test_a_forgotten_head_bias_is_caught(tiny: Tiny) -> None:
    tiny.network = adapt(llama(bias=True))
    right = tiny.gradients(lambda: step_loss(tiny, [EVERY]))
    assert largest_difference(right, tiny.gradients(lambda: plain_head_loss(tiny, with_bias=False))) > BROKEN


def test_trained_head_gets_the_gradients_of_plain_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((23, 8), (31, 8), (31,))
    )
    targets, upstream = (
        torch.randint(0, 31, (23,), generator=generator),
        torch.randn(23, generator=generator, dtype=torch.float64),
    )

    def grads(score: object) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        (score(*leaves) * upstream).sum().backward()  # type: ignore[operator]
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    ours = grads(lambda h, w, b: token_logps(h, w, targets, bias=b, chunk_tokens=5))
    plain = grads(lambda h, w, b: -F.cross_entropy(h @ w.T + b, targets, reduction="none"))
    assert len(ours) == 3
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_activation_checkpointing_changes_nothing(tiny: Tiny) -> None:
    tiny.network = adapt(llama(), dropout=0.2)
    checkpointed = copy.deepcopy(tiny)
    prepare_layers(checkpointed.network, Execution("full"))
    recomputed = 0

    def count(*_: object) -> None:
        nonlocal recomputed
        recomputed += 1

    causal_lm(checkpointed.network).model.layers[0].mlp.register_forward_pre_hook(count)
    grads = []
    for each in (tiny, checkpointed):
        torch.manual_seed(5)
        grads.append(each.gradients(lambda each=each: step_loss(each, [EVERY[:3], EVERY[3:]])))
    assert largest_difference(*grads) < TOLERANCE
    assert recomputed == 4, "two micro-batches, each run forward and again in the backward pass"


def test_checkpointing_that_forgets_the_random_state_is_caught(tiny: Tiny) -> None:
    tiny.network = adapt(llama(), dropout=0.2)
    broken = copy.deepcopy(tiny)
    causal_lm(broken.network).gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    grads = []
    for each in (tiny, broken):
        torch.manual_seed(5)
        grads.append(each.gradients(lambda each=each: step_loss(each, [EVERY])))
    assert largest_difference(*grads) > BROKEN


def test_sliding_window_equals_a_banded_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 26, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    ours, _ = attention.packed_attention(
        torch.nn.Identity(), q, k, v, None, segments=Segments.of([17, 9]), sliding_window=5
    )
    begin = 0
    for length in (17, 9):
        part = slice(begin, begin + length)
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        scores = torch.einsum("hqd,hkd->hqk", q[0, :, part], k[0, :, part].repeat_interleave(2, 0)) / 8**0.5
        scores = scores.masked_fill(~((distance >= 0) & (distance < 5)), float("-inf"))
        theirs = torch.einsum("hqk,hkd->qhd", scores.softmax(-1), v[0, :, part].repeat_interleave(2, 0))
        torch.testing.assert_close(ours[0, part], theirs, rtol=0, atol=1e-12)
        begin += length
    free, _ = attention.packed_attention(torch.nn.Identity(), q, k, v, None, segments=Segments.of([17, 9]))
    assert (free - ours).abs().max() > BROKEN


@pytest.mark.parametrize(("name", "words"), [("softcap", "soft-capped"), ("s_aux", "sinks")])
def test_attention_it_does_not_compute_is_refused_by_name(name: str, words: str) -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match=words):
        attention.packed_attention(
            torch.nn.Identity(), q, q, q, None, segments=Segments.of([4]), **{name: torch.ones(1)}
        )
