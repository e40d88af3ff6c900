"""The exactness of the main job and of preference pairs with compiled layers: the shipped speeds against plain ones (float64).

Compiling takes minutes, so these run with `-m drill`; traced graphs are looked at in every run (tests/unit/models).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fine_tune.losses.sft import sft_loss
from fine_tune.models.execution import LayerRuns, prepare_layers
from fine_tune.models.forward import supervised_logps
from fine_tune.packing.batches import Sample, pack
from fine_tune.packing.segments import Segments
from fine_tune.speed import SPEEDS
from tests.reference.conftest import Tiny, adapt, largest_difference, llama, random_rows
from tests.reference.test_exact_gradients import EVERY, one_at_a_time, padded_loss, step_loss
from tests.reference.test_exact_pairs import PAIRS, VOCABULARY, norm_without_casts, one_by_one, weighed

pytestmark = [
    pytest.mark.drill,
    pytest.mark.timeout(900),
    # Torch's own, on the way through its compiler.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
TOLERANCE, BROKEN = 1e-9, 1e-5


@pytest.fixture(params=["fast", "balanced", "lean"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Tiny, Tiny, LayerRuns]]:
    """The same network twice: as PyTorch and PEFT run it, and compiled."""
    # The norm's way through float32 is rounded anew by every order of additions.
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_without_casts)
    torch._dynamo.reset()
    plain = Tiny(adapt(llama()), random_rows())
    compiled = copy.deepcopy(plain)
    runs = prepare_layers(compiled.network, SPEEDS[request.param])
    assert runs.fused == 21
    yield plain, compiled, runs
    assert runs.compiles, "it was not given up"
    torch._dynamo.reset()


def test_the_main_job(both: tuple[Tiny, Tiny, LayerRuns]) -> None:
    plain, compiled, _ = both
    exact = one_at_a_time(plain)
    padded = plain.gradients(lambda: padded_loss(plain, left=False))
    for parts in ([EVERY], [EVERY[:2], EVERY[2:]], [EVERY[::-1]]):
        found = compiled.gradients(lambda parts=parts: step_loss(compiled, parts))
        assert largest_difference(exact, found) < TOLERANCE
        assert largest_difference(padded, found) < TOLERANCE
    # The control: rows that see each other.
    leaking = compiled.micro(*EVERY)
    leaking.segments = Segments.of([leaking.num_tokens])

    def leaked() -> Tensor:
        return sft_loss(supervised_logps(compiled.network, leaking), num_step_tokens=compiled.num_supervised)

    assert largest_difference(exact, compiled.gradients(leaked)) > BROKEN


def test_preference_pairs(both: tuple[Tiny, Tiny, LayerRuns]) -> None:
    plain, compiled, _ = both
    generator, samples = np.random.default_rng(5), []
    for prompt, chosen, rejected in PAIRS:
        ids = generator.integers(0, VOCABULARY, prompt + chosen + rejected)
        samples.append(Sample(ids, np.arange(len(ids)) >= prompt, (prompt, prompt + chosen)))
    exact = one_by_one(plain.network, samples)
    logps = supervised_logps(compiled.network, pack(samples), chunk_tokens=7)
    assert (torch.cat(exact) - logps).abs().max() < TOLERANCE
    wanted = plain.gradients(lambda: weighed(one_by_one(plain.network, samples)))
    found = compiled.gradients(lambda: weighed([supervised_logps(compiled.network, pack(samples), chunk_tokens=7)]))
    assert largest_difference(wanted, found) < TOLERANCE
    swapped = [samples[1], samples[0], *samples[2:]]
    other = compiled.gradients(lambda: weighed([supervised_logps(compiled.network, pack(swapped), chunk_tokens=7)]))
    assert largest_difference(wanted, other) > BROKEN
