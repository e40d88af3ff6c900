"""The judged programs: what is run, made short, and where its results lie."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.faults.moments import last_step
from benchmarks.faults.nursery import ROOT

if TYPE_CHECKING:
    from benchmarks.faults.scene import Scene

STEPS, INTERVAL = 12, 2
BASE = ROOT / "fine_tune" / "world" / "base"
WORDS = "the lake is near old town and river north of a red house where people speak about bread"
EVALUATED = "eval/exact_match"
SHORT = (
    "trainer=cpu",
    f"trainer.max_steps={STEPS}",
    "trainer.val_every_n_steps=6",
    f"callbacks.checkpoint.every_n_steps={INTERVAL}",
    "callbacks.checkpoint.keep_best=false",
    "callbacks.preview=null",
    "data.num_eval_items=0",
    "data.max_examples=64",
    "data.max_val_examples=32",
    "optim.global_batch_size=4",
    # Dense, as loading and stepping take half the time of four bits on a CPU.
    "method=lora",
    "method.dropout=0.1",
)
SMALL_WORLD = ("data.options.num_train=200", "data.options.num_heldout=40")


@dataclass(frozen=True)
class Job:
    """A program to be judged.

    Attributes:
        name: Its name in the scorecard's folder.
        script: The script of the repository that is started.
        words: Its words in a scene.
        progress: The file of the run's folder whose lines tell how far it is.
        done: How far a run's folder is, in steps (or chunks of answers).
        resumes: A start after the first is told to resume; otherwise the same words are given again.
        interval: Steps (or chunks) between two saves.
    """

    name: str
    script: str
    words: Callable[[Scene], list[str]]
    progress: str
    done: Callable[[Path], int]
    resumes: bool = True
    interval: int = INTERVAL


def _short(scene: Scene) -> list[str]:
    return [f"run_dir={scene.run}", f"data.cache_dir={scene.folder.parent / 'cache'}", *SHORT]


def _sft(scene: Scene) -> list[str]:
    return ["train.py", *_short(scene), *SMALL_WORLD]


def _own(scene: Scene) -> list[str]:
    model, rows = own_inputs(scene.folder)
    return ["train.py", *_short(scene), f"model.path={model}", "data=chat", f"data.path={rows}", "data.max_seq_len=128"]


def _dpo(scene: Scene) -> list[str]:
    start = scene.folder / "sft"
    if not start.exists():
        shutil.copytree(scene.folder.parent / "clean-sft" / "run" / "adapter", start)
    # Dropout would make policy and reference differ.
    words = [word for word in _short(scene) if not word.startswith("method.dropout")]
    return ["train.py", *words, *SMALL_WORLD, "objective=dpo", f"init_from={start}", "trainer.micro_batch_tokens=2048"]


def _evaluate(scene: Scene) -> list[str]:
    trained = scene.folder.parent / "clean-sft" / "run"
    asked = ["eval.num_items=24", "eval.batch_size=2", "eval.max_new_tokens=24"]
    return ["evaluate.py", f"ckpt={trained}", f"run_dir={scene.run}", "accelerator=cpu", "eval=exact_match", *asked]


def _plain(scene: Scene) -> list[str]:
    _, rows = own_inputs(scene.folder)
    temporary = scene.folder / "tmp"
    temporary.mkdir(exist_ok=True)
    # Where Lightning writes a checkpoint before it moves it to its place.
    scene.environment.setdefault("TMPDIR", str(temporary))
    return ["benchmarks/faults/plain.py", f"run_dir={scene.run}", f"rows={rows}"]


def answered(run: Path) -> int:
    """Return the chunks of answers that are on disk."""
    if (run / EVALUATED / "metrics.json").is_file():
        return 12
    file = run / EVALUATED / "partial.jsonl"
    return len(file.read_bytes().splitlines()) if file.is_file() else 0


def own_inputs(folder: Path) -> tuple[Path, Path]:
    """Give a scene a model folder and a data file of its own, which it may damage."""
    model, rows = folder / "model", folder / "rows.jsonl"
    if not model.exists():
        shutil.copytree(BASE, model)
    if not rows.exists():
        rows.write_text("".join(json.dumps(row) + "\n" for row in own_rows()), encoding="utf-8")
    return model, rows


def own_rows(num_rows: int = 96) -> list[dict[str, object]]:
    """Make conversations out of a few words, always the same ones."""
    rng = random.Random(0)
    words = WORDS.split()
    asked = [
        (" ".join(rng.choices(words, k=6)) + "?", " ".join(rng.choices(words, k=5)) + ".") for _ in range(num_rows)
    ]
    return [
        {"id": f"row-{i}", "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]}
        for i, (ask, say) in enumerate(asked)
    ]


SFT = Job("sft", "train.py", _sft, "metrics.jsonl", last_step)
OWN = Job("own", "train.py", _own, "metrics.jsonl", last_step)
DPO = Job("dpo", "train.py", _dpo, "metrics.jsonl", last_step)
EVALUATE = Job("evaluate", "evaluate.py", _evaluate, f"{EVALUATED}/partial.jsonl", answered, resumes=False, interval=1)
PLAIN = Job("plain", "benchmarks/faults/plain.py", _plain, "metrics.jsonl", last_step, resumes=False)
