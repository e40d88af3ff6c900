"""What the merged model must equal: base and adapter, loaded the way training loads them, computed in float32."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from fine_tune import assembly
from fine_tune.device import DevicePlan, fits
from fine_tune.evaluation.generate import generating
from fine_tune.merging.source import Source
from fine_tune.models.adapter import ADAPTER, causal_lm
from fine_tune.models.export import carry_template
from fine_tune.models.hub import resolve_model
from fine_tune.passport.document import questions, stops
from fine_tune.passport.prompts import Asked
from fine_tune.passport.replay import Said, logits_of, replay
from fine_tune.subjects import Named, Stage

# Merged weights are the same sums in another order: float32 leaves a few units in the last place.
SAME = 4e-6


@dataclass
class Reference:
    """What base and adapter say.

    Attributes:
        asked: The prompts.
        left_out: Prompts that were not asked, and why.
        said: The greedy continuation of each.
        logits: At every position of prompt and continuation, ``[T, V]`` each.
        dtype: What was computed in.
        stop_ids: Tokens that end a continuation.
        pad_id: The padding token.
        num_compared: Tensors of the merged folder that were compared with base and adapter.
        problem: The first of them that differs by more than rounding.
    """

    asked: list[Asked]
    left_out: dict[str, str]
    said: list[Said]
    logits: list[Tensor]
    dtype: torch.dtype
    stop_ids: list[int]
    pad_id: int
    num_compared: int = 0
    problem: str | None = None

    def sequences(self) -> list[list[int]]:
        """Return the token ids that the logits belong to."""
        return [[*one.ids, *said.ids] for one, said in zip(self.asked, self.said, strict=True)]


def unquantised(named: Named) -> Named:
    """Return the same checkpoint on the base as its files hold it."""
    method = {**named.cfg["method"], "bits": 16, "quant_type": None, "double_quant": False}
    return replace(named, cfg={**named.cfg, "method": method})


def refer(
    named: Named,
    plan: DevicePlan,
    merged: Source | None,
    *,
    sequences: Sequence[Sequence[int]] | None = None,
    written: torch.dtype = torch.float32,
) -> Reference:
    """Load a checkpoint, ask it the stored prompts, and compare its weights with merged files.

    Args:
        named: The checkpoint, on the base that is meant.
        plan: Device; its precision is float32.
        merged: The merged files, None to compare no weights.
        sequences: Take the logits of these token ids instead of its own continuations.
        written: The dtype of the merged files.
    """
    stage = Stage(named, plan)
    subject = stage.show(named)
    try:
        dtype = _in_float32(subject.network, plan.device)
        # Questions are for what other programs see, so the template goes with the tokenizer first.
        carry_template(subject.tokenizer, subject.template)
        asked, left_out = questions(subject.network, subject.tokenizer, subject.template)
        stop_ids = stops(subject.tokenizer, subject.template)
        pad_id: int = subject.tokenizer.pad_token_id
        said = replay(subject.network, [one.ids for one in asked], stop_ids=stop_ids, pad_id=pad_id)
        found = Reference(asked, left_out, said, [], dtype, stop_ids, pad_id)
        with generating(subject.network):
            found.logits = [logits_of(subject.network, ids) for ids in sequences or found.sequences()]
        if merged is not None:
            found.num_compared = len(merged.files)
            found.problem = compare_weights(subject.network, merged, written)
        return found
    finally:
        del stage, subject
        release(plan.device)


def refer_files(named: Named, plan: DevicePlan, merged: Source, own: Reference) -> Reference:
    """Compute with the merged tensors under the base's own config, on the token ids of another reference.

    What plain transformers makes of the folder must equal this also where the tensors were rounded to half precision, which
    moves logits by an amount that nobody knows beforehand.

    Args:
        named: The checkpoint.
        plan: Device; its precision is float32.
        merged: The merged files.
        own: Its prompts are asked, and its sequences measured.
    """
    cfg = {**named.cfg, "model": {**named.cfg["model"], "dtype": "float32"}, "method": unquantised(named).cfg["method"]}
    model = cfg["model"]
    folder = resolve_model(model["path"], revision=model["revision"], trust_remote_code=model["trust_remote_code"])
    tokenizer, _ = assembly.load_text(model, folder)
    network = assembly.load_bare(cfg, folder, tokenizer, plan)
    try:
        _fill(network, merged)
        said = replay(network, [one.ids for one in own.asked], stop_ids=own.stop_ids, pad_id=own.pad_id)
        with generating(network):
            logits = [logits_of(network, ids) for ids in own.sequences()]
        return replace(own, said=said, logits=logits, dtype=torch.float32)
    finally:
        del network
        release(plan.device)


@torch.no_grad()
def _fill(network: Any, merged: Source) -> None:
    head, table = network.get_output_embeddings(), network.get_input_embeddings()
    names = {id(module): name for name, module in network.named_modules()}
    if f"{names[id(head)]}.weight" in merged.files and head.weight is table.weight:
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    state = network.state_dict(keep_vars=True)
    for name in merged.files:
        state[name].data.copy_(merged.get(name))


def release(device: torch.device) -> None:
    """Give memory back now: what comes next needs it, and modules that know each other wait for the collector."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _in_float32(network: nn.Module, device: torch.device) -> torch.dtype:
    """Widen what is stored in half precision, which is exact, so that only weights are compared and no rounding of activations."""
    for module in network.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            # What reading a 4-bit weight back gives; products do not ask for it.
            state.dtype = torch.float32
    half = [p for p in [*network.parameters(), *network.buffers()] if p.dtype in (torch.bfloat16, torch.float16)]
    if not half:
        return torch.float32
    dtype = half[0].dtype
    if not fits(sum(4 * p.numel() for p in half), device, held=sum(2 * p.numel() for p in half)):
        return dtype
    for p in half:
        p.data = p.data.float()
    return torch.float32


@torch.no_grad()
def compare_weights(network: nn.Module, merged: Source, written: torch.dtype) -> str | None:
    """Compare every merged tensor with what PEFT says base and adapter amount to; return the first difference, as a sentence."""
    model = causal_lm(network)
    for name in merged.files:
        module, _, kind = name.rpartition(".")
        expected, exact = _amounts_to(model.get_submodule(module), kind)
        found = merged.get(name)
        if found.shape != expected.shape:
            return f"{name} was merged as {tuple(found.shape)}, base and adapter have {tuple(expected.shape)}."
        expected = expected.detach().cpu()
        difference = (found.double() - expected.to(found.dtype).double()).abs()
        # One unit in the last place where a sum fell on the other side of a rounding border.
        unit = SAME if written == torch.float32 else torch.finfo(written).eps
        allowed = 0.0 if exact else unit * expected.double().abs() + SAME * float(expected.abs().max())
        if not bool((difference <= allowed).all()):
            return f"{name} is {float(difference.max()):.3g} away from what base and adapter amount to."
    return None


def _amounts_to(module: Any, kind: str) -> tuple[Tensor, bool]:
    """Return a parameter with what training did to it, and whether merging must give exactly that."""
    tokens = getattr(module, "token_adapter", None)
    if tokens is not None:
        # Of a table whose rows train, and of a head tied to one.
        inner = tokens.get_base_layer()
        weight = tokens.get_merged_weights(tokens.active_adapters) if kind == "weight" else getattr(inner, kind)
        return weight, True
    if not hasattr(module, "lora_A") or ADAPTER not in module.lora_A:
        value: Tensor = dequantize_module_weight(module) if kind == "weight" else getattr(module, kind)
        return value, True
    layer = module.get_base_layer()
    if kind != "weight":
        return getattr(layer, kind), True
    base, delta = dequantize_module_weight(layer).float(), module.get_delta_weight(ADAPTER).float()
    magnitudes: Mapping[str, Any] = getattr(module, "lora_magnitude_vector", {})
    if ADAPTER in magnitudes:
        norm = magnitudes[ADAPTER].get_weight_norm(base, delta, scaling=1)
        return (magnitudes[ADAPTER].weight / norm)[:, None] * (base + delta), False
    return base + delta, False
