"""N1 to N5: neither padding nor neighbours, neither the cut into micro-batches nor the order of rows is in the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fine_tune.losses.sft import sft_loss
from fine_tune.models.adapter import causal_lm
from fine_tune.models.forward import completion_logps, supervised_logps
from fine_tune.modules.optim import OptimSpec
from fine_tune.modules.ratios import Ratios
from fine_tune.modules.sft import SFTModule
from fine_tune.packing.batches import MicroBatch, StepBatch, pack
from fine_tune.packing.segments import Segments

from ..unit.models.conftest import VOCABULARY
from .drawn import LENGTHS, SEEDS, TOLERANCE, Row, alone, own_logits, plain, rows_of
from .judging import Step, distance, exceeds, same, step

pytestmark = pytest.mark.usefixtures("exact_norm")
ROWS = rows_of([5, 9, 3, 7])


def num_supervised(rows: list[Row]) -> int:
    return sum(int(mask.sum()) for _, mask in rows)


def packed(network: nn.Module, rows: list[Row], neighbours: list[Row] | None = None) -> Step:
    """Ours: all rows end to end, beside others that teach nothing."""
    micro = pack([*rows, *(neighbours or [])])
    return step(network, lambda: sft_loss(supervised_logps(network, micro), num_step_tokens=num_supervised(rows)))


def one_by_one(network: nn.Module, rows: list[Row]) -> Step:
    return step(network, lambda: -torch.cat([alone(network, *row) for row in rows]).sum() / num_supervised(rows))


def padded(network: nn.Module, rows: list[Row], fill: Tensor, *, left: bool, masked: bool = True) -> Step:
    """The rows as one padded batch through the model's own forward; ``fill [R, T]`` stands where no row does."""
    ids, valid, positions = fill.clone(), torch.zeros_like(fill), torch.zeros_like(fill)
    learned = torch.zeros_like(fill, dtype=torch.bool)
    for number, (tokens, mask) in enumerate(rows):
        start = fill.shape[1] - len(tokens) if left else 0
        place = slice(start, start + len(tokens))
        ids[number, place], valid[number, place] = torch.from_numpy(tokens), 1
        positions[number, place], learned[number, place] = torch.arange(len(tokens)), torch.from_numpy(mask)
    told = {"attention_mask": valid, "position_ids": positions} if masked else {}

    def loss() -> Tensor:
        logps = own_logits(network, ids, **told)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return -(logps * learned[:, 1:]).sum() / num_supervised(rows)

    return step(network, loss)


def silent(lengths: list[int], seed: int) -> list[Row]:
    """Rows of which nothing is learned."""
    return [(ids, np.zeros_like(mask)) for ids, mask in rows_of(lengths, seed)]


def leaking(micro: MicroBatch) -> MicroBatch:
    micro.segments = Segments.of([micro.num_tokens])
    return micro


@plain(8)
@given(lengths=LENGTHS, extra=st.integers(0, 64), pad=st.integers(0, VOCABULARY - 1), left=st.booleans())
def test_n01_any_padding_on_either_side_gives_what_ours_gives_without(
    network: nn.Module, lengths: list[int], extra: int, pad: int, left: bool
) -> None:
    # Token 2 is the end of text: padding may look like it.
    rows, pad = rows_of(lengths), 2 if pad % 3 == 0 else pad
    fill = torch.full((len(rows), max(lengths) + extra), pad)
    same(packed(network, rows), padded(network, rows, fill, left=left), TOLERANCE)


def test_n01_control_padding_that_is_attended_to(network: nn.Module) -> None:
    fill = torch.full((len(ROWS), 12), 2)
    exceeds(padded(network, ROWS, fill, left=True, masked=False), packed(network, ROWS), TOLERANCE)


@plain(8)
@given(lengths=LENGTHS, others=LENGTHS, seed=SEEDS, left=st.booleans())
def test_n02_tokens_that_no_row_attends_to_are_irrelevant(
    network: nn.Module, lengths: list[int], others: list[int], seed: int, left: bool
) -> None:
    rows = rows_of(lengths, seed)
    one, other = (packed(network, rows, silent(others, seed + k)) for k in (1, 2))
    # Beside other tokens the shapes are the same, and so is every bit.
    same(one, other, 0.0)
    same(one, packed(network, rows), TOLERANCE)
    generator = torch.Generator().manual_seed(seed)
    fill = torch.randint(0, VOCABULARY, (len(rows), max(lengths) + 5), generator=generator)
    same(padded(network, rows, fill, left=left), one, TOLERANCE)


def test_n02_control_tokens_that_are_attended_to(network: nn.Module) -> None:
    def beside(seed: int) -> Step:
        micro = leaking(pack([*silent([6, 4], seed), *ROWS]))
        return step(network, lambda: sft_loss(supervised_logps(network, micro), num_step_tokens=num_supervised(ROWS)))

    exceeds(beside(1), beside(2), TOLERANCE)


@plain(8)
@given(lengths=LENGTHS, seed=SEEDS)
def test_n03_packed_is_the_token_weighted_sum_of_rows_alone(network: nn.Module, lengths: list[int], seed: int) -> None:
    rows = rows_of(lengths, seed)
    same(packed(network, rows), one_by_one(network, rows), TOLERANCE)
    micro = pack(rows)
    ends = np.cumsum(lengths)
    owner = np.searchsorted(ends, micro.rows.numpy(), side="right")
    assert (owner == np.searchsorted(ends, micro.rows.numpy() + 1, side="right")).all(), "no target of another row"
    assert torch.equal(micro.input_ids[0, micro.rows + 1], micro.targets)


@plain(8)
@given(lengths=LENGTHS, seed=SEEDS)
def test_n03_another_first_row_leaves_every_bit_of_the_others(
    network: nn.Module, lengths: list[int], seed: int
) -> None:
    (first, mask), *others = rows_of(lengths, seed)
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    hook = causal_lm(network).get_input_embeddings().register_forward_hook(keep)
    try:
        ours, theirs = (
            supervised_logps(network, pack([((first + k) % VOCABULARY, mask), *others]))[int(mask.sum()) :]
            for k in (0, 1)
        )
    finally:
        hook.remove()
    assert torch.equal(ours, theirs)
    ours.sum().backward()
    assert seen[0].grad is not None
    assert seen[0].grad[0, : len(first)].abs().max().item() == 0.0
    assert seen[0].grad[0, len(first) :].abs().max().item() > 0.0


def test_n03_control_rows_that_see_their_neighbours(network: nn.Module) -> None:
    micro = leaking(pack(ROWS))
    broken = step(network, lambda: sft_loss(supervised_logps(network, micro), num_step_tokens=num_supervised(ROWS)))
    exceeds(broken, one_by_one(network, ROWS), TOLERANCE)


def test_n03_control_targets_across_the_border_of_rows(network: nn.Module) -> None:
    micro, first = pack(ROWS), len(ROWS[0][0])
    # The first token of the second row as a target of the first row's last.
    micro.rows[0], micro.targets[0] = first - 1, micro.input_ids[0, first]
    broken = step(network, lambda: sft_loss(supervised_logps(network, micro), num_step_tokens=num_supervised(ROWS)))
    exceeds(broken, one_by_one(network, ROWS), TOLERANCE)


def in_parts(network: nn.Module, parts: list[list[Row]]) -> Step:
    """One optimizer step of the training module, a micro-batch per part."""
    spec = OptimSpec(torch.optim.AdamW, lr=1e-3)
    module = SFTModule(network, optim=spec, num_steps=1, head_chunk_tokens=5)
    micros = [pack(part) for part in parts]
    supervised = sum(len(micro.rows) for micro in micros)
    batch = StepBatch(0, 0, micros, supervised, sum(map(len, parts)), sum(micro.num_tokens for micro in micros))
    ratios = Ratios((), module.device)
    return step(network, lambda: torch.stack([module.micro_loss(micro, batch, ratios) for micro in micros]).sum())


@plain(4)
@given(lengths=LENGTHS, labels=st.lists(st.integers(0, 3), min_size=6, max_size=6), seed=SEEDS)
def test_n04_any_partition_of_a_step_is_the_step(
    network: nn.Module, lengths: list[int], labels: list[int], seed: int
) -> None:
    rows = rows_of(lengths, seed)
    dealt = list(zip(rows, labels, strict=False))
    parts = [part for k in range(4) if (part := [row for row, label in dealt if label == k])]
    whole = in_parts(network, [rows])
    same(whole, one_by_one(network, rows), TOLERANCE)
    # A micro-batch of which nothing is learned is none of the denominator.
    for cut in (parts, [[row] for row in rows], [*parts, silent([4, 3], seed)]):
        same(in_parts(network, cut), whole, TOLERANCE)


def test_n04_control_a_mean_of_the_micro_batches_own_means(network: nn.Module) -> None:
    micros = [pack(ROWS[:1]), pack(ROWS[1:])]
    broken = step(network, lambda: torch.stack([-supervised_logps(network, m).mean() for m in micros]).mean())
    exceeds(broken, in_parts(network, [ROWS[:1], ROWS[1:]]), TOLERANCE)


def weighed(network: nn.Module, micro: MicroBatch) -> Step:
    """The loss of each row times a weight of its own, so that no two can be mistaken for each other."""
    weights = torch.tensor([1.0 + index for index in micro.samples], dtype=torch.float64)
    return step(network, lambda: -weights * completion_logps(supervised_logps(network, micro), micro))


@plain(8)
@given(lengths=LENGTHS, seed=SEEDS)
def test_n05_losses_of_rows_move_with_their_rows(network: nn.Module, lengths: list[int], seed: int) -> None:
    rows = rows_of(lengths, seed)
    order = np.random.default_rng(seed).permutation(len(rows))
    straight, moved = weighed(network, pack(rows)), weighed(network, pack([rows[i] for i in order], order.tolist()))
    same(moved, Step(straight.values[torch.from_numpy(order)], straight.gradients), TOLERANCE)
    expected = torch.stack([-(1.0 + index) * alone(network, *row).sum() for index, row in enumerate(rows)])
    assert distance(straight.values, expected.detach()) <= TOLERANCE


def test_n05_control_rows_move_and_their_counts_do_not(network: nn.Module) -> None:
    right, micro = pack(ROWS[::-1]), pack(ROWS[::-1])
    micro.completion_tokens = pack(ROWS).completion_tokens
    assert not torch.equal(micro.completion_tokens, right.completion_tokens)
    exceeds(weighed(network, micro), weighed(network, right), TOLERANCE)
