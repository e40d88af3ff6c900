"""N21 to N23: the reference scores as a model of its own would, is what was stored, and never moves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fine_tune.config import check_config
from fine_tune.data.table import TableBuilder
from fine_tune.device import DEVICE_KEYS, plan_device
from fine_tune.fitting import reference_key
from fine_tune.models.forward import completion_logps, supervised_logps
from fine_tune.modules.dpo import DPOModule
from fine_tune.modules.reference import FrozenAdapter, fingerprint, snapshot
from fine_tune.packing.batches import MicroBatch, Sample, pack
from fine_tune.packing.segments import Segments, Span
from fine_tune.reference_store import ReferenceStore
from fine_tune.text.encode import Encoded

from ..unit.modules.conftest import Taken, dpo, fit, moved_reference, pairs, policy, step_of
from .drawn import SEEDS, TOLERANCE, alone, pair_of, plain
from .judging import Step, exceeds, same, step

pytestmark = [
    # Lightning's advice about workers, logging and validation does not concern a loop this small.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    # Lightning 2.6 asks torch 2.11 for a class that it deprecates.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]
SIZES = st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=4)
DRAWN = [pair_of(6, 4, 7), pair_of(2, 8, 3, seed=1)]


def weighed(sums: Tensor) -> Tensor:
    """A weight of its own for each completion, so that no two can be mistaken for each other."""
    return sums * torch.arange(1.0, 1.0 + len(sums), dtype=sums.dtype)


def together(network: nn.Module, micro: MicroBatch) -> Step:
    return step(network, lambda: weighed(completion_logps(supervised_logps(network, micro), micro)))


def apart(network: nn.Module, samples: list[Sample]) -> Step:
    """Each completion behind its own copy of the prompt, one plain forward pass each."""

    def sums() -> Tensor:
        found = []
        for ids, _, (prompt, middle) in samples:
            for answer in (ids[prompt:middle], ids[middle:]):
                whole = np.concatenate([ids[:prompt], answer])
                found.append(alone(network, whole, np.arange(len(whole)) >= prompt).sum())
        return weighed(torch.stack(found))

    return step(network, sums)


@plain(6)
@given(sizes=SIZES, seed=SEEDS)
def test_n21_both_completions_in_one_pass_are_two_passes(
    exact_norm: None, network: nn.Module, sizes: list[tuple[int, int, int]], seed: int
) -> None:
    samples = [pair_of(*size, seed=seed + k) for k, size in enumerate(sizes)]
    same(together(network, pack(samples)), apart(network, samples), TOLERANCE)


def unshared(micro: MicroBatch) -> None:
    micro.segments = Segments.from_spans([Span(s.start, s.length) for s in micro.segments.spans])


def seeing_its_rival(micro: MicroBatch) -> None:
    micro.segments = Segments.of([len(sample.input_ids) for sample in DRAWN])


def running_on(micro: MicroBatch) -> None:
    micro.position_ids = torch.cat([torch.arange(len(sample.input_ids)) for sample in DRAWN])[None]


@pytest.mark.parametrize("change", [unshared, seeing_its_rival, running_on])
def test_n21_control_another_prompt_than_ones_own(exact_norm: None, network: nn.Module, change: Any) -> None:
    micro = pack(DRAWN)
    change(micro)
    exceeds(together(network, micro), apart(network, DRAWN), TOLERANCE)


def taken(module: DPOModule, *micros: MicroBatch) -> Step:
    found = Taken(module, *micros)
    slopes = torch.cat([slope.flatten() for slope in found.gradients.values()])
    return Step(torch.tensor([found.loss, *found.metrics.values()], dtype=torch.float64), slopes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_n22_stored_values_are_the_live_ones_in_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    network = policy(dtype)
    module, micros = dpo(network, moved_reference(network)), (pairs(5, 2), pairs(7))
    live = taken(module, *micros)
    store = ReferenceStore(tmp_path, {"of": str(dtype)}, num_rows=8)
    for micro in micros:
        store.put(micro.samples, module.reference_logps(micro))
    store.save()
    again = ReferenceStore(tmp_path, {"of": str(dtype)}, num_rows=8)
    assert again.read() == 3
    module.stored = again.values
    same(taken(module, *micros), live, 0.0)
    # The control: another row's values, though both are references.
    module.stored[[5, 2]] = module.stored[[2, 5]]
    exceeds(taken(module, *micros), live, 1e-6 if dtype == torch.float32 else TOLERANCE)


def key_of(tmp_path: Path, *words: str, ids: tuple[int, ...] = (1, 5, 9), **record: str) -> str:
    known = {"base_fingerprint": "b", "reference_fingerprint": "r", "tokenizer_fingerprint": "t", "template_hash": "h"}
    cfg = check_config(
        ["objective=dpo", "trainer=cpu", "trainer.speed=plain", "trainer.micro_batch_tokens=256", *words]
    ).cfg
    builder = TableBuilder()
    builder.add("row", Encoded(list(ids), [False, *[True] * (len(ids) - 1)]))
    job: Any = SimpleNamespace(cfg=cfg, plan=plan_device(**{name: cfg["trainer"][name] for name in DEVICE_KEYS}))
    data: Any = SimpleNamespace(prepared=SimpleNamespace(train=builder.build()))
    return ReferenceStore(tmp_path, reference_key(job, {**known, **record}, data), num_rows=1).path.name


DECIDES: list[tuple[list[str], dict[str, Any]]] = [
    ([], {"base_fingerprint": "B"}),
    ([], {"reference_fingerprint": "R"}),
    ([], {"tokenizer_fingerprint": "T"}),
    ([], {"template_hash": "H"}),
    ([], {"ids": (1, 5, 8)}),
    (["data.max_seq_len=64"], {}),
    (["model.dtype=bfloat16"], {}),
    (["method=lora"], {}),
    (["trainer.micro_batch_tokens=512"], {}),
]


def test_n22_what_decides_a_value_is_in_its_name(tmp_path: Path) -> None:
    names = [key_of(tmp_path), *(key_of(tmp_path, *words, **record) for words, record in DECIDES)]
    assert len(set(names)) == 1 + len(DECIDES)
    # The control: what decides nothing of it, the policy's rate and the loss, is not.
    assert key_of(tmp_path, "optim.lr=1e-6", "objective.beta=0.7") == names[0]


def three_steps(folder: Path, *, alias: bool) -> tuple[str, str, Step, Step]:
    """Fingerprints of the reference and what it scores, before and after training."""
    network = policy(torch.float32)
    reference = FrozenAdapter(network, snapshot(network))
    if alias:
        reference._slots = [(m, key, getattr(m, key)) for m, key, _ in reference._slots]
    module, micro = dpo(network, reference), pairs(0, 1)

    def look() -> tuple[str, Step]:
        values = {f"{number}.{key}": value.detach() for number, (_, key, value) in enumerate(reference._slots)}
        scores = module.reference_logps(micro)
        assert not scores.requires_grad
        slopes = [torch.zeros_like(v) if v.grad is None else v.grad for _, _, v in reference._slots]
        return fingerprint(values), Step(scores.clone(), torch.cat([slope.flatten() for slope in slopes]))

    before, scores = look()
    fit(module, folder, [step_of(pairs(0, 1), pairs(2), step=number) for number in range(3)])
    after, found = look()
    return before, after, scores, found


def test_n23_the_reference_stays_and_has_no_gradient(tmp_path: Path) -> None:
    before, after, scores, found = three_steps(tmp_path, alias=False)
    assert before == after
    same(found, scores, 0.0)
    assert found.gradients.abs().max().item() == 0.0


def test_n23_control_a_reference_that_is_the_policys_own_tensors(tmp_path: Path) -> None:
    before, after, scores, found = three_steps(tmp_path, alias=True)
    assert before != after
    exceeds(found.values, scores.values, 1e-6)
