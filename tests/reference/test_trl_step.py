"""One step of preference training against TRL's own trainer: a real checkpoint, real pairs, TRL's token ids (float32)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from fine_tune.models.adapter import AdapterSpec, attach, trainable
from fine_tune.models.base import BaseSpec, load_base
from fine_tune.modules.dpo import DPOModule
from fine_tune.modules.optim import OptimSpec
from fine_tune.modules.ratios import Ratios
from fine_tune.modules.reference import FrozenAdapter
from fine_tune.packing.batches import Sample, StepBatch, pack

pytestmark = pytest.mark.real

RANK, ALPHA, BETA = 8, 16, 0.1
LONGEST = 512  # positions that the checkpoint knows
ROWS_READ, PAIRS = 20, 6  # of the first 20 rows, these fit
END_OF_TURN = 2
SIZE = 0.05  # of the entries of A and B: mean rewards of some units, where the loss is curved
# TRL adds up a completion's log-probabilities in float32, ours in float64. Sums reach 1000 nats, where float32 has
# steps of 6e-5; times beta, and averaged over the pairs, that is a few 1e-6 of loss. Measured: 2e-6 of the loss,
# and 1e-6 of a metric, relative to its size.
LOSS_TOLERANCE = METRIC_TOLERANCE = 1e-5
# The same products in another order: padded rows with the prompt twice against packed ones with the prompt once.
# Measured: 2e-6 of all gradients together, 3e-6 of the worst parameter's. Relative to their norms.
GRADIENT_TOLERANCE = 1e-4
WRONG = 5e-2  # a wrong reference is at least this far away
METRICS = [f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")]
Values = dict[str, Tensor]


@dataclass(repr=False)
class Step:
    """What one step gives before its update."""

    loss: float
    gradients: Values
    metrics: dict[str, float]


@dataclass(repr=False)
class Theirs:
    """TRL's step, with what it was made from."""

    step: Step
    folder: Path
    samples: list[Sample]
    policy: Values
    reference: Values
    other_reference: Values


def network_of(folder: Path) -> nn.Module:
    spec = BaseSpec(folder, 16, torch.float32, torch.float32, torch.device("cpu"))
    return attach(load_base(spec), AdapterSpec("adapter", rank=RANK, alpha=ALPHA))


def drawn(network: nn.Module, seed: int) -> Values:
    """A and B alike are not zero: at B = 0 half of all gradients vanish and hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) * SIZE for name, p in sorted(trainable(network).items())}


def put(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            network.get_parameter(name).copy_(value)


def trainer_of(model: Any, data: Path, output: Path, **options: Any) -> Any:
    """TRL's trainer on the pairs that fit, as its own tokenising has them: the checkpoint has no chat template."""
    from datasets import Dataset

    trl: Any = pytest.importorskip("trl", reason="TRL is a dependency of the tests")
    with (data / "preference" / "ultrafeedback_train_1000.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(ROWS_READ), strict=False)]
    texts = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint(data)))
    settings = trl.DPOConfig(
        output_dir=str(output), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        beta=BETA, max_length=LONGEST, per_device_train_batch_size=PAIRS, gradient_checkpointing=False,
        max_steps=1, max_grad_norm=0.0, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(model, args=settings, train_dataset=texts, processing_class=tokenizer, **options)
    trainer.train_dataset = trainer.train_dataset.filter(
        lambda row: len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= LONGEST
    )
    return trainer


def checkpoint(data: Path) -> Path:
    return data / "weights" / "stories260K"


def sample_of(chosen: tuple[Tensor, Tensor], rejected: tuple[Tensor, Tensor]) -> Sample:
    """One pair from the ids and the completion mask of its two unpadded rows."""
    (ids, mask), (others, others_mask) = chosen, rejected
    prompt = int((mask == 0).sum())
    assert prompt > 0
    assert torch.equal(ids[:prompt], others[:prompt])
    assert int((others_mask == 0).sum()) == prompt
    assert mask[prompt:].all()
    assert others_mask[prompt:].all()
    laid = np.concatenate([ids.numpy(), others[prompt:].numpy()])
    return Sample(laid, np.arange(len(laid)) >= prompt, (prompt, len(ids)))


def samples_of(batch: Mapping[str, Tensor]) -> list[Sample]:
    rows = [
        (ids[seen.bool()], mask[seen.bool()])
        for ids, seen, mask in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True)
    ]
    half = len(rows) // 2
    return [sample_of(*pair) for pair in zip(rows[:half], rows[half:], strict=True)]


@pytest.fixture(scope="module", params=["copy", pytest.param("base", marks=pytest.mark.drill)])
def theirs(request: pytest.FixtureRequest, real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """TRL's step in the two ways in which it finds its reference.

    Given a model with an adapter it keeps a frozen copy of that adapter under the name "ref"; given an adapter's config
    it makes the adapter itself, and its reference is the model with the adapter off. The policy moves on before the
    step, as it does in training.
    """
    folder, output = checkpoint(real_data), tmp_path_factory.mktemp("trl")
    mine = network_of(folder)
    policy, start = drawn(mine, 1), drawn(mine, 2)
    off = {name: torch.zeros_like(value) for name, value in policy.items()}
    base = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="sdpa")
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    if request.param == "base":
        trainer = trainer_of(base, real_data, output, peft_config=config)
        assert list(trainer.model.peft_config) == ["default"]
    else:
        adapted = get_peft_model(base, config)
        put(adapted, start)
        trainer = trainer_of(adapted, real_data, output)
        copied = {name: trainer.model.get_parameter(name.replace(".default.", ".ref.")) for name in start}
        assert all(torch.equal(copied[name], value) for name, value in start.items())
    assert base.config._attn_implementation == "sdpa"
    put(trainer.model, policy)
    step, batch = step_of(trainer)
    reference, other = (start, off) if request.param == "copy" else (off, start)
    return Theirs(step, folder, samples_of(batch), policy, reference, other)


def step_of(trainer: Any) -> tuple[Step, Mapping[str, Tensor]]:
    """Run one step of TRL's training loop and note its batch, its loss, and the gradients that the update gets."""
    seen: dict[str, Any] = {}
    scored = trainer.compute_loss

    def compute_loss(model: nn.Module, inputs: Mapping[str, Tensor], **rest: Any) -> Tensor:
        loss: Tensor = scored(model, inputs, **rest)
        seen.update(batch=inputs, loss=loss.item())
        return loss

    class Note(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **event: Any) -> None:
            named = event["model"].named_parameters()
            seen["gradients"] = {name: p.grad.clone() for name, p in named if p.grad is not None}
            seen["metrics"] = {name: trainer._metrics["train"][name] for name in METRICS}

    trainer.compute_loss = compute_loss
    trainer.add_callback(Note())
    trainer.train()
    return Step(seen["loss"], seen["gradients"], {k: v for k, (v,) in seen["metrics"].items()}), seen["batch"]


def ours(theirs: Theirs, samples: list[Sample], cuts: list[int], *, reference: Values | None = None) -> Step:
    """Our step on pairs, cut into micro-batches."""
    network = network_of(theirs.folder)
    put(network, theirs.policy)
    frozen = FrozenAdapter(network, theirs.reference if reference is None else reference)
    spec = OptimSpec(torch.optim.AdamW, lr=1e-3)
    module = DPOModule(network, reference=frozen, beta=BETA, allow_other_start=True, optim=spec, num_steps=1)
    micros = [pack(samples[a:b]) for a, b in pairwise([0, *cuts, len(samples)])]
    tokens = sum(micro.num_tokens for micro in micros)
    batch = StepBatch(0, 0, micros, sum(len(m.targets) for m in micros), len(samples), tokens)
    ratios = Ratios(module.metric_names, module.device)
    loss = 0.0
    for micro in micros:
        share = module.micro_loss(micro, batch, ratios)
        share.backward()
        loss += share.item()
    gradients = {name: p.grad for name, p in trainable(network).items() if p.grad is not None}
    return Step(loss, gradients, {name: ratios.means()[name] for name in METRICS})


def gaps(mine: Values, others: Values) -> tuple[float, float]:
    """Distance of all gradients, and the largest of any one parameter, relative by norm."""
    assert mine.keys() == others.keys()
    apart = {name: (mine[name] - others[name]).norm().item() for name in mine}
    sizes = {name: gradient.norm().item() for name, gradient in others.items()}
    assert min(sizes.values()) > 0
    return math.hypot(*apart.values()) / math.hypot(*sizes.values()), max(apart[n] / sizes[n] for n in apart)


def test_trl_ends_every_completion_with_the_end_of_turn(theirs: Theirs) -> None:
    """What both sides below are fed: whole pairs, each prompt begun and each completion ended."""
    assert len(theirs.samples) == PAIRS
    for ids, mask, (prompt, middle) in theirs.samples:
        assert (ids[0], ids[middle - 1], ids[-1]) == (1, END_OF_TURN, END_OF_TURN)
        assert mask.sum() == len(ids) - prompt
        assert max(middle, prompt + len(ids) - middle) <= LONGEST


@pytest.mark.parametrize("cuts", [[], [1, 3]], ids=["one micro-batch", "three micro-batches"])
def test_loss_gradients_and_metrics_are_those_of_trl(theirs: Theirs, cuts: list[int]) -> None:
    mine = ours(theirs, theirs.samples, cuts)
    assert abs(mine.loss - theirs.step.loss) <= LOSS_TOLERANCE
    overall, worst = gaps(mine.gradients, theirs.step.gradients)
    assert overall <= GRADIENT_TOLERANCE
    assert worst <= GRADIENT_TOLERANCE
    assert mine.metrics == pytest.approx(theirs.step.metrics, rel=METRIC_TOLERANCE)


def test_the_policy_as_its_own_reference_is_not_the_step_of_trl(theirs: Theirs) -> None:
    mine = ours(theirs, theirs.samples, [], reference=theirs.policy)
    assert mine.loss == pytest.approx(math.log(2), abs=1e-12)
    assert abs(mine.loss - theirs.step.loss) > WRONG
    assert gaps(mine.gradients, theirs.step.gradients)[0] > WRONG


def test_the_other_kind_of_reference_is_not_the_step_of_trl(theirs: Theirs) -> None:
    """The raw base where TRL keeps the adapter that training started from, or the other way round."""
    mine = ours(theirs, theirs.samples, [], reference=theirs.other_reference)
    assert abs(mine.loss - theirs.step.loss) > WRONG
    assert gaps(mine.gradients, theirs.step.gradients)[0] > WRONG


def test_a_lost_end_of_turn_is_not_the_step_of_trl(theirs: Theirs) -> None:
    """The tolerances see one token of one completion in some thousand."""
    ids, mask, branches = theirs.samples[0]
    cut = [Sample(ids[:-1], mask[:-1], branches), *theirs.samples[1:]]
    mine = ours(theirs, cut, [])
    assert abs(mine.loss - theirs.step.loss) > 10 * LOSS_TOLERANCE
    assert gaps(mine.gradients, theirs.step.gradients)[0] > 10 * GRADIENT_TOLERANCE
