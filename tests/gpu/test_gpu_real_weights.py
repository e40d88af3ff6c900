"""On real pretrained weights: each speed's scores and gradients are as near to float32 as plain PyTorch's and PEFT's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from fine_tune.losses.dpo import PairLogps, dpo_loss
from fine_tune.losses.sft import sft_loss
from fine_tune.models.adapter import AdapterSpec, attach, trainable
from fine_tune.models.base import BaseSpec, load_base
from fine_tune.models.dense_base import make_dense
from fine_tune.models.execution import decoder_layers, prepare_layers
from fine_tune.models.forward import completion_logps, supervised_logps
from fine_tune.modules.dpo import in_pairs
from fine_tune.packing.batches import MicroBatch, Sample, pack
from fine_tune.speed import SPEEDS

pytestmark = [pytest.mark.gpu, pytest.mark.real, pytest.mark.usefixtures("gpu")]
# Adapters over which a distance is taken.
DRAWS = 16
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big dog. "
    "The dog was very happy and wanted to play with her. Lily smiled and threw the ball. The dog ran fast and brought it back. "
    "They played all day until the sun went down. Then her mom called her home. Lily said goodbye to the dog and went to sleep. "
)
# Characters of prompt, chosen and rejected text.
CUTS = ((40, 120, 80), (160, 30, 200), (10, 260, 60), (90, 90, 90))


@pytest.fixture(scope="module")
def folder(real_data: Path) -> Path:
    return real_data / "weights" / "stories260K"


def network_of(folder: Path, bits: int, *, wide: bool = False) -> nn.Module:
    """The adapted model; ``wide``: the same values in float32."""
    spec = BaseSpec(folder, bits, torch.bfloat16, torch.bfloat16, torch.device("cuda"))
    base = load_base(spec)
    if wide and bits == 4:
        make_dense(base, torch.bfloat16)
    network = attach(base, AdapterSpec("adapter", rank=8, alpha=16))
    return network.float() if wide else network


def draw(network: nn.Module, seed: int) -> None:
    """Give the adapter values of its own, B among them."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for name, p in trainable(network).items():
        scale = 0.02 if "lora_B" in name else p.shape[1] ** -0.5
        p.data.copy_(torch.randn(p.shape, generator=generator, device="cuda") * scale)


def pairs(folder: Path) -> MicroBatch:
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    found = []
    for i, (prompt, chosen, rejected) in enumerate(CUTS):
        texts = STORY[:prompt], STORY[prompt : prompt + chosen], STORY[50 * i : 50 * i + rejected]
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        sizes = [len(part) for part in ids]
        joined = np.concatenate(ids)
        mask = (torch.arange(len(joined)) >= sizes[0]).numpy()
        found.append(Sample(joined, mask, (sizes[0], sizes[0] + sizes[1])))
    return pack(found).to("cuda")


def scored(network: nn.Module, micro: MicroBatch, kind: str, *, wide: bool = False) -> list[Tensor]:
    """Log-probabilities and the gradient of the objective."""
    network.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=not wide):
        logps = supervised_logps(network, micro)
    if kind == "sft":
        loss = sft_loss(logps, num_step_tokens=len(logps))
    else:
        policy = in_pairs(completion_logps(logps, micro))
        loss = dpo_loss(policy, PairLogps(policy.chosen.detach(), policy.rejected.detach()), beta=0.1).loss.mean()
    loss.backward()
    return [logps.detach(), torch.cat([p.grad.flatten() for p in trainable(network).values() if p.grad is not None])]


def errors(network: nn.Module, truths: list[list[Tensor]], micro: MicroBatch, kind: str) -> list[float]:
    """Root mean square distance to float32 over all drawn adapters: of log-probabilities, and of gradients."""
    sums = [0.0, 0.0]
    for seed, truth in enumerate(truths):
        draw(network, seed)
        found = scored(network, micro, kind)
        sums = [s + (x - exact).square().sum().item() for s, x, exact in zip(sums, found, truth, strict=True)]
    return [(s / len(truths)) ** 0.5 for s in sums]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("bits", [4, 16])
def test_no_speed_is_further_from_float32_than_plain(folder: Path, bits: int, kind: str) -> None:
    """One rounding of a sum is nearer than another by chance, so the distance is taken over many adapters."""
    micro, truths = pairs(folder), []
    wide = network_of(folder, bits, wide=True)
    for seed in range(DRAWS):
        draw(wide, seed)
        truths.append(scored(wide, micro, kind, wide=True))
    allowed = errors(network_of(folder, bits), truths, micro, kind)
    for part, error in enumerate(allowed):
        size = sum(truth[part].square().sum().item() for truth in truths) / DRAWS
        assert size**0.5 > 5 * error, "the control: there is something to be near to"
    found = {}
    for speed in ("fast", "balanced", "lean"):
        torch._dynamo.reset()
        network = network_of(folder, bits)
        runs = prepare_layers(network, SPEEDS[speed])
        found[speed] = errors(network, truths, micro, kind)
        assert runs.compiles, "it was not given up"
        assert runs.fused == 7 * len(decoder_layers(network))
    print(f"bits {bits}, {kind}: plain {allowed}, {found}")
    for speed, values in found.items():
        assert all(error <= 1.1 * limit for error, limit in zip(values, allowed, strict=True)), speed
