"""Faults of what a run reads: rows, tokenizer, base, initial adapter, cache; damaged, exchanged or not finite."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.faults.damage import flip_bit
from benchmarks.faults.fault import Fault, Hurt, Story, begun, refused, survives
from benchmarks.faults.jobs import OWN
from benchmarks.faults.scene import Scene


def on(name: str, change: Callable[[Path], None]) -> Hurt:
    """Keep a copy of an input of the scene and change it."""

    def hurt(scene: Scene) -> None:
        file = scene.folder / name
        shutil.copy(file, scene.folder / f"kept-{file.name}")
        change(file)

    return hurt


def restored(name: str) -> Hurt:
    """Put the kept copy of an input back."""

    def undo(scene: Scene) -> None:
        file = scene.folder / name
        shutil.copy(scene.folder / f"kept-{file.name}", file)

    return undo


def begun_with(name: str, change: Callable[[Path], None]) -> Story:
    """Start with a changed input, restore it, and start again."""
    return begun(on(name, change), restored(name))


def gone_on_with(name: str, change: Callable[[Path], None]) -> Story:
    """Go on with a changed input, restore it, and go on again."""
    return refused(on(name, change), restored(name))


def cut(file: Path) -> None:
    """End a file within its last row."""
    os.truncate(file, file.stat().st_size - 30)


def latin(file: Path) -> None:
    """Write three rows in another encoding."""
    file.write_bytes(file.read_bytes().replace(b"people", "pr\u00eatre".encode("latin-1"), 3))


def other_answer(file: Path) -> None:
    """Change 40 answers."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row in rows[:40]:
        row["messages"][1]["content"] = "bread is old."
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _other_token(file: Path) -> None:
    """Exchange two tokens of the vocabulary: every text becomes other numbers."""
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(content), encoding="utf-8")


def _other_weights(file: Path) -> None:
    tensors = load_file(str(file))
    noise = torch.Generator().manual_seed(1)
    changed = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=noise).to(tensor.dtype)
        for name, tensor in tensors.items()
    }
    save_file(changed, str(file), metadata={"format": "pt"})


def _half(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _with_adapter(change: Callable[[Path], None]) -> Story:
    """Start from a changed adapter of the clean run, which is refused; then without."""

    def hurt(scene: Scene) -> None:
        folder = scene.folder / "initial"
        shutil.copytree(scene.clean / "adapter", folder)
        change(folder)

    def play(scene: Scene) -> None:
        scene.job.words(scene)
        scene.damage(lambda: hurt(scene))
        scene.end(scene.start(*([f"init_from={scene.folder / 'initial'}"] if scene.armed else [])))
        scene.end(scene.start_over())

    return Story("start, then start over", play)


def _of_another_base(folder: Path) -> None:
    file = folder / "fine_tune.json"
    identity = json.loads(file.read_text(encoding="utf-8")) | {"base_fingerprint": "0" * 64}
    file.write_text(json.dumps(identity), encoding="utf-8")


def _not_a_number(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(str(file))
    next(iter(tensors.values())).view(-1)[7] = float("nan")
    save_file(tensors, str(file), metadata={"format": "pt"})


def _diverging() -> Story:
    """Start with a learning rate that no loss survives; then over with the right one."""

    def play(scene: Scene) -> None:
        words = ["optim.lr=1e30", "optim.warmup_share=0.0", "optim.max_grad_norm=null"]
        scene.end(scene.start(*(words if scene.armed else [])))
        if scene.armed:
            scene.notes += [
                f"{file.parent.name} is not finite"
                for file in scene.run.glob("checkpoints/*/adapter.safetensors")
                if _broken(file)
            ]
        scene.end(scene.start_over())

    return Story("start, then start over", play)


def _broken(file: Path) -> bool:
    return any(not torch.isfinite(tensor).all() for tensor in load_file(str(file)).values())


def _flip_all(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix != ".json":
            flip_bit(file)


def _cache_damaged() -> Story:
    """Damage every file of the prepared data, and start."""

    def play(scene: Scene) -> None:
        shared = scene.folder.parent / "cache"
        own = scene.folder / "cache"
        shutil.copytree(shared, own)
        scene.damage(lambda: _flip_all(own))
        scene.end(scene.start(f"data.cache_dir={own}"))

    return Story("start", play)


ROWS, MODEL, TOKENIZER = "rows.jsonl", "model/model.safetensors", "model/tokenizer.json"
FAULTS = [
    Fault(
        "rows cut",
        "the data file ends within a row",
        begun_with(ROWS, cut),
        survives(3, 0, may_lose=0, says=("rows.jsonl:96",)),
        "rows_dropped",
        OWN,
    ),
    Fault(
        "rows in latin-1",
        "three rows are no UTF-8",
        begun_with(ROWS, latin),
        survives(3, 0, may_lose=0, says=("rows.jsonl:",)),
        "rows_dropped",
        OWN,
    ),
    Fault(
        "rows changed",
        "40 answers changed between two starts",
        gone_on_with(ROWS, other_answer),
        survives(4, 0, may_lose=0, says=("data_fingerprint",)),
        "changes_accepted",
        OWN,
    ),
    Fault(
        "rows cut meanwhile",
        "the data file was cut between two starts",
        gone_on_with(ROWS, cut),
        survives((3, 4), 0, may_lose=0),
        "changes_accepted",
        OWN,
    ),
    Fault(
        "tokenizer changed",
        "two tokens exchanged between two starts",
        gone_on_with(TOKENIZER, _other_token),
        survives(4, 0, may_lose=0, says=("tokenizer_fingerprint",)),
        "changes_accepted",
        OWN,
    ),
    Fault(
        "base changed",
        "other base weights between two starts",
        gone_on_with(MODEL, _other_weights),
        survives(4, 0, may_lose=0, says=("base_fingerprint",)),
        "changes_accepted",
        OWN,
    ),
    Fault(
        "base cut",
        "half of the base's weights are gone at the start",
        begun_with(MODEL, _half),
        survives((4, 5), 0, may_lose=0),
        "",
        OWN,
    ),
    Fault(
        "adapter of another base",
        "init_from= an adapter of another base",
        _with_adapter(_of_another_base),
        survives(4, 0, may_lose=0, says=("another base",)),
        "any_base",
    ),
    Fault(
        "adapter not a number",
        "a NaN in the adapter of init_from=",
        _with_adapter(_not_a_number),
        survives((4, 6), 0, may_lose=0),
        "unguarded",
    ),
    Fault(
        "diverging",
        "a learning rate of 1e30: the loss is not finite",
        _diverging(),
        survives(6, 0, may_lose=0),
        "unguarded",
    ),
    Fault(
        "cache damaged", "one bit in every prepared table", _cache_damaged(), survives(0, may_lose=0), "cache_believed"
    ),
]
