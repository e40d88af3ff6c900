"""Replay a passport against a model folder: its own template and tokenizer, then its own weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from fine_tune.device import DTYPES, DevicePlan, fits
from fine_tune.errors import CheckpointError, EnvironmentProblem
from fine_tune.models.base import BaseSpec, load_base
from fine_tune.models.hub import resolve_model
from fine_tune.passport.document import Passport, hash_text
from fine_tune.passport.prompts import Asked, encoded, rendered
from fine_tune.passport.replay import Said, replay
from fine_tune.subjects import Stage, find
from fine_tune.text.tokenizer import tokenizer_fingerprint
from fine_tune.verifying.finding import Finding, answer_finding, differing_place, probability_finding, prompt_finding

# Nats: float32 against float32, and anything in which half precision has a part.
TIGHT, LOOSE = 0.01, 0.25


def verify_folder(
    passport: Passport, folder: Path, *, plan: DevicePlan, defaults: dict[str, Any], tolerance: float | None
) -> list[Finding]:
    """Compare what a folder makes of the passport's prompts; weights are loaded only if some prompt is the same.

    Args:
        passport: What is expected.
        folder: A model folder, or an adapter's.
        plan: Device; its precision is float32.
        defaults: ``model`` and ``method`` for an adapter that no run describes.
        tolerance: Nats by which log-probabilities may differ, None for the usual.
    """
    tokenizer = _tokenizer(folder)
    found = [_prompt(passport, one, tokenizer) for one in passport.asked]
    same = [i for i, finding in enumerate(found) if finding is None]
    if same:
        network, dtype, stop_ids = _load(folder, passport, plan, defaults)
        allowed = tolerance
        if allowed is None:
            allowed = TIGHT if dtype == torch.float32 and passport.precision == "float32" else LOOSE
        prompts = [passport.asked[i].ids for i in same]
        precision = plan.compute_dtype
        said = replay(network, prompts, stop_ids=stop_ids, pad_id=passport.special["pad"] or 0, precision=precision)
        for i, answer in zip(same, said, strict=True):
            found[i] = judge(passport, i, answer, tokenizer=tokenizer, tolerance=allowed)
    return [finding for finding in found if finding is not None]


def _tokenizer(folder: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise EnvironmentProblem(f"model={folder}: no tokenizer that transformers can load.") from error
    if tokenizer.chat_template is None:
        raise CheckpointError(
            f"model={folder}: its tokenizer has no chat template. Pass a folder that was exported with one."
        )
    return tokenizer


def _prompt(passport: Passport, one: Asked, tokenizer: Any) -> Finding | None:
    try:
        text = rendered(tokenizer, one.messages)
    except Exception as error:  # a template may raise anything
        return Finding(
            one.name, "prompt ids", f"its chat template refuses this conversation: {str(error).splitlines()[0]}"
        )
    ids = encoded(tokenizer, text)
    place = differing_place(one.ids, ids)
    show = [tokenizer.decode(side[place : place + 1]) for side in (one.ids, ids)]
    return prompt_finding(one.name, one.ids, ids, why=_why(passport, one, tokenizer, text), show=show)


def _why(passport: Passport, one: Asked, tokenizer: Any, text: str) -> str:
    if text != one.text:
        place = differing_place(one.text, text)
        other = (
            "another template"
            if hash_text(tokenizer.chat_template) != passport.template["text_sha256"]
            else "the template"
        )
        return f"{other} renders it otherwise from character {place + 1} on, {text[place : place + 20]!r}"
    whose = "another" if tokenizer_fingerprint(tokenizer) != passport.tokenizer else "the"
    return f"the text is the same, {whose} tokenizer encodes it otherwise"


def _load(
    folder: Path, passport: Passport, plan: DevicePlan, defaults: dict[str, Any]
) -> tuple[nn.Module, torch.dtype, list[int]]:
    """Load a model in its own dtype, or an adapter on its base; its own settings say when it stops."""
    stop_ids: list[int] = passport.special["stop"]
    if (folder / "adapter_config.json").is_file():
        named = find([str(folder)], defaults)[0]
        return Stage(named, plan).show(named).network, DTYPES[named.cfg["model"]["dtype"]], stop_ids
    resolve_model(str(folder))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # What the folder holds is compared, not the rounding of activations: float32 where it fits.
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    own_dtype = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
    dtype = torch.float32 if fits(size * 4 / own_dtype.itemsize, plan.device) else own_dtype
    network = load_base(BaseSpec(folder, 16, dtype, dtype, plan.device))
    own = getattr(network.generation_config, "eos_token_id", None)
    return network, dtype, own if isinstance(own, list) else stop_ids if own is None else [own]


def judge(passport: Passport, index: int, answer: Said, *, tokenizer: Any, tolerance: float) -> Finding:
    """Compare a continuation's ids and first probabilities with the passport's."""
    name, expected = passport.asked[index].name, passport.said[index]
    ours, theirs = ([*said.ids, said.stop_id] for said in (expected, answer))
    place: int | None = differing_place(ours, theirs)
    if place == len(ours) == len(theirs):
        place = None
    if place != 0:
        sides = ({str(i): logp for i, logp in said.top} for said in (expected, answer))
        moved = probability_finding(name, *sides, tolerance=tolerance)
        if moved is not None:
            return moved
    show = []
    for side in (ours, theirs):
        token = side[place] if place is not None and place < len(side) else None
        show.append("nothing more" if token is None else f"{token} {tokenizer.decode([token])!r}")
    return answer_finding(
        name, place, margins=expected.margins, tolerance=tolerance, length=len(expected.ids), sides=show
    )
