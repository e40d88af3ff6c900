"""Packed training of each family against plain forward passes of one sequence at a time: scores and gradients in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fine_tune.models import attention
from fine_tune.models.adapter import causal_lm, trainable
from fine_tune.models.execution import decoder_layers, prepare_layers
from fine_tune.models.forward import supervised_logps
from fine_tune.packing.batches import MicroBatch, pack
from fine_tune.packing.segments import Segments
from fine_tune.speed import SPEEDS
from tests.reference.conftest import adapt, random_rows
from tests.reference.families import KINDS, LINEARS, family, norms_in_one_dtype

TOLERANCE, BROKEN = 1e-9, 1e-5
ROWS = random_rows()
Found = tuple[Tensor, dict[str, Tensor]]
CASES = [(kind, tied) for kind in KINDS for tied in (False, True)]
# Tied tables are outside the layers that a speed changes: by default they are seen at one speed.
AT_EACH_SPEED = [
    pytest.param(
        (kind, tied), speed, id=f"{kind}-{'tied' if tied else 'untied'}-{speed}",
        marks=pytest.mark.drill if tied and speed != "balanced" else (),
    )
    for kind, tied in CASES for speed in SPEEDS
]  # fmt: skip


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{'tied' if case[1] else 'untied'}")
def network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    norms_in_one_dtype(monkeypatch)
    kind, tied = request.param
    model = family(kind, tied=tied)
    tables = [causal_lm(model).get_input_embeddings().weight, causal_lm(model).get_output_embeddings().weight]
    assert (tables[0].data_ptr() == tables[1].data_ptr()) is tied
    return adapt(model)  # type: ignore[arg-type]


def step(network: nn.Module, scores: Callable[[], Tensor]) -> Found:
    """Score, and take the gradients of a sum in which every token has a weight of its own."""
    network.zero_grad()
    found = scores()
    (found * torch.linspace(0.5, 2.0, len(found), dtype=found.dtype)).sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in trainable(network).items() if p.grad is not None}


def packed(network: nn.Module, change: Callable[[MicroBatch], object] | None = None) -> Found:
    micro = pack(ROWS)
    if change is not None:
        change(micro)
    return step(network, lambda: supervised_logps(network, micro, chunk_tokens=16))


def one_by_one(network: nn.Module) -> Found:
    """The model's own forward pass, masks and all, as transformers and PEFT run it."""

    def scores() -> Tensor:
        found = []
        for tokens, mask in ROWS:
            ids = torch.from_numpy(tokens)[None]
            logps = network(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            found.append(logps.gather(1, ids[0, 1:, None]).squeeze(1)[torch.from_numpy(mask)[1:]])
        return torch.cat(found)

    inner: Any = causal_lm(network)
    inner.set_attn_implementation("sdpa")
    try:
        return step(network, scores)
    finally:
        inner.set_attn_implementation(attention.PACKED)


def distance(left: Found, right: Found) -> float:
    """The largest difference of any score, and of any gradient relative to the largest there is."""
    assert left[1].keys() == right[1].keys()
    scale = max(gradient.abs().max().item() for gradient in left[1].values())
    gradients = max((left[1][name] - right[1][name]).abs().max().item() for name in left[1]) / scale
    return max((left[0] - right[0]).abs().max().item(), gradients)


@pytest.mark.parametrize(("network", "speed"), AT_EACH_SPEED, indirect=["network"])
def test_packed_equals_one_by_one(network: nn.Module, speed: str, request: pytest.FixtureRequest) -> None:
    """Everything of a speed but its compiler, whose graphs take minutes (the drill below)."""
    alone = one_by_one(network)
    ours = copy.deepcopy(network)
    runs = prepare_layers(ours, replace(SPEEDS[speed], compile=False))
    kind = request.node.callspec.params["network"][0]
    assert runs.fused == (0 if speed == "plain" else 3 * LINEARS[kind])
    assert len(alone[1]) == 2 * 3 * LINEARS[kind]
    assert min(gradient.abs().max().item() for gradient in alone[1].values()) > 0
    assert distance(alone, packed(ours)) < TOLERANCE
    assert distance(alone, packed(ours, whole)) > BROKEN, "the control: sequences that see each other"


def whole(micro: MicroBatch) -> None:
    micro.segments = Segments.of([micro.num_tokens])


@pytest.mark.drill
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("speed", ["fast", "balanced", "lean"])
def test_compiled_equals_one_by_one(network: nn.Module, speed: str) -> None:
    torch._dynamo.reset()
    alone = one_by_one(network)
    runs = prepare_layers(network, SPEEDS[speed])
    assert distance(alone, packed(network)) < TOLERANCE
    assert distance(alone, packed(network, whole)) > BROKEN
    assert runs.compiles, "it was not given up"
    torch._dynamo.reset()


# Per family what makes it that family, taken out of the packed path alone.
def without_window(network: nn.Module) -> None:
    # Mistral's layers ask the config, Qwen2's remember.
    causal_lm(network).config.sliding_window = None
    for layer in decoder_layers(network):
        layer.self_attn.sliding_window = None  # type: ignore[union-attr, assignment]


def without_input_biases(network: nn.Module) -> None:
    for layer in decoder_layers(network):
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).base_layer.bias.zero_()


def without_head_bias(network: nn.Module) -> None:
    causal_lm(network).lm_head.bias.zero_()  # type: ignore[operator, union-attr]


def with_whole_heads_rotated(network: nn.Module) -> None:
    decoder: Any = causal_lm(network).model
    parts = {**decoder.config.rope_parameters, "partial_rotary_factor": 1.0}
    decoder.config.rope_parameters = parts
    decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config)
    for layer in decoder.layers:
        layer.self_attn.rotary_ndims = layer.self_attn.head_dim


def with_the_next_head(network: nn.Module) -> None:
    """Queries read the keys of another group."""
    for layer in decoder_layers(network):
        weight = layer.self_attn.k_proj.base_layer.weight  # type: ignore[union-attr]
        weight.data = weight.data.roll(8, 0)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("kind", "without"),
    [
        ("mistral", without_window),
        ("qwen25_window", without_window),
        ("qwen25", without_input_biases),
        ("phi2", without_head_bias),
        ("phi2", with_whole_heads_rotated),
        ("llama3", with_the_next_head),
    ],
)
@torch.no_grad()
def test_what_makes_a_family_would_be_missed(
    kind: str, without: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    norms_in_one_dtype(monkeypatch)
    network = adapt(family(kind, tied=False))  # type: ignore[arg-type]
    with torch.enable_grad():
        alone = one_by_one(network)
        assert distance(alone, packed(network)) < TOLERANCE
    without(network)
    with torch.enable_grad():
        assert distance(alone, packed(network)) > BROKEN


def test_a_window_shorter_than_a_sequence_is_what_is_tested() -> None:
    lengths = [len(ids) for ids, _ in ROWS]
    assert sum(length > 5 for length in lengths) >= 4
    assert min(lengths) < 5


@pytest.mark.parametrize("kind", ["llama3", "mistral"])
def test_heads_repeated_for_older_cards_are_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU without flash attention takes: grouped keys and values once per query head."""
    norms_in_one_dtype(monkeypatch)
    network = adapt(family(kind, tied=False))  # type: ignore[arg-type]
    alone = packed(network)
    asked: list[int] = []

    def repeats(q: Tensor) -> bool:
        asked.append(q.shape[1])
        return True

    monkeypatch.setattr(attention, "_repeats_heads", repeats)
    assert distance(alone, packed(network)) < TOLERANCE
    assert asked == [6, 6, 6]
