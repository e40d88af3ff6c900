"""Time MMLU here and with lm-evaluation-harness on one loaded model, the base in 4 bits, on a GPU.

    python benchmarks/workload.py w7b --size 7b --rows 1
    python benchmarks/mmlu_speed.py w7b/model MMLU --tokenizer TOKENIZER --out mmlu_speed

MMLU is the folder of QLoRA's JSON files; TOKENIZER one with at most as many words as the model. Five-shot, --num-items questions:
spread evenly over all subjects, and whole subjects after each other. With and without a LoRA adapter. lm-eval 0.4.13 has to be
importable; its batch sizes are tried on --probe-items questions, with the adapter with and without autocast, and the fastest is run
on all. Times are seconds of scoring: encoding included, loading the model not. Both sides run once before on a few questions.
In bfloat16 lm-eval's scores are steps of 1/16 nat, with ties; --dtype float32 tells whether choices are the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from adapted import Seconds, as_transformers_does, fused, load
from mmlu_vs_lm_eval import TASK, compare
from transformers import AutoTokenizer

from fine_tune.evaluation.mmlu import MMLU
from fine_tune.evaluation.mmlu_data import Prompt
from fine_tune.evaluation.protocol import Subject
from fine_tune.text.template import load_template

CONTEXT = 4096
Line = dict[str, Any]


class WholeSubjects(MMLU):
    """The first questions in the data's order, which has subject after subject."""

    def _read(self) -> list[Prompt]:
        return super()._read()[: self.num_items]


def ours(subject: Subject, evaluation: MMLU) -> tuple[list[Line], float]:
    """Score with the project; returns the lines in the questions' order."""
    clock = Seconds(subject.device)
    lines: dict[int, Line] = {}
    with clock.running():
        items = evaluation.prepare(subject.tokenizer, subject.template)
        chunks = evaluation.chunks(items)
        for chunk, found in zip(chunks, evaluation.score_each(subject, items, chunks), strict=True):
            lines |= zip(chunk, found, strict=True)
    return [lines[i] for i in range(len(items))], clock.seconds


def theirs(
    model: Any, tokenizer: Any, lines: Sequence[Line], *, batch_size: int, autocast: torch.dtype | None
) -> tuple[list[list[float]], float]:
    """Score the prompts of our lines with lm-eval."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    device = next(model.parameters()).device
    clock = Seconds(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps({"input": x["prompt"], "output": x["target"]}) + "\n" for x in lines))
        (Path(folder) / "prompts.yaml").write_text(TASK.format(file=file))
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=CONTEXT)
        manager = TaskManager(include_path=folder, include_defaults=False)
        half = nullcontext() if autocast is None else torch.autocast(device.type, autocast)
        with clock.running(), half, torch.no_grad():
            found = simple_evaluate(model=lm, tasks=["prompts"], task_manager=manager, bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"]["prompts"], key=lambda sample: sample["doc_id"])
    return [[float(response[0][0]) for response in sample["resps"]] for sample in samples], clock.seconds


class Comparison:
    """Both sides on one model."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.dtype = torch.device(args.device), getattr(torch, args.dtype)
        self.folder, self.num_items, self.probe_items = str(args.mmlu), args.num_items, args.probe_items
        self.sizes = [int(size) for size in args.batch_sizes.split(",")]
        self.network = load(args.model, device=self.device, dtype=self.dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(str(args.tokenizer))
        template = load_template("guanaco", bos_token=self.tokenizer.bos_token, eos_token=self.tokenizer.eos_token)
        self.subjects = {
            adapter: Subject(self.network, self.tokenizer, template, self.device, self.dtype, base=not adapter)
            for adapter in (False, True)
        }

    def ours(self, which: str, adapter: bool, num_items: int) -> tuple[list[Line], float]:
        """Score with the project."""
        kind = WholeSubjects if which == "whole" else MMLU
        return ours(self.subjects[adapter], kind(path=self.folder, num_items=num_items, context_length=CONTEXT))

    def theirs(self, lines: list[Line], adapter: bool, **options: Any) -> tuple[list[list[float]], float]:
        """Score with lm-eval."""
        with as_transformers_does(self.network, adapter=adapter) as model:
            return theirs(model, self.tokenizer, lines, **options)

    def their_best(self, adapter: bool) -> tuple[dict[str, Any], dict[str, float]]:
        """Find lm-eval's fastest settings on a part of the questions."""
        lines, _ = self.ours("spread", adapter, self.probe_items)
        self.theirs(lines[:8], adapter, batch_size=8, autocast=None)
        half = (None, self.dtype) if adapter and self.dtype != torch.float32 else (None,)
        ways = [{"batch_size": size, "autocast": dtype} for size in self.sizes for dtype in half]
        times: dict[str, float] = {}
        for way in ways:
            try:
                times[str(way)] = self.theirs(lines, adapter, **way)[1]
            except torch.OutOfMemoryError:
                times[str(way)] = float("inf")
        return min(ways, key=lambda way: times[str(way)]), times

    def all_of_theirs(self, questions: Sequence[str], adapters: Sequence[bool]) -> dict[tuple[bool, str], dict[str, Any]]:
        """Run lm-eval on everything; ours comes afterwards, since it changes how layers compute."""
        found = {}
        for adapter in adapters:
            best, times = self.their_best(adapter)
            print(json.dumps({"adapter": adapter, "lm_eval_probe_seconds": times}), flush=True)
            for which in questions:
                lines, _ = self.ours(which, adapter, self.num_items)
                logps, seconds = self.theirs(lines, adapter, **best)
                settings = {"settings": str(best), "probe_seconds": times}
                found[adapter, which] = {"logps": logps, "seconds": seconds, **settings}
        return found

    def compared(self, which: str, adapter: bool, other: dict[str, Any]) -> dict[str, Any]:
        """Run ours twice beside what lm-eval found."""
        (lines, first), (_, second) = (self.ours(which, adapter, self.num_items) for _ in range(2))
        rest = {f"lm_eval_{key}": other[key] for key in ("seconds", "settings", "probe_seconds")}
        return {
            "questions": which, "adapter": adapter, "dtype": str(self.dtype), **compare(lines, other["logps"]),
            "seconds": [first, second], **rest, "share": max(first, second) / other["seconds"],
            "differ": _differ(lines, other["logps"]),
        }  # fmt: skip


def _choice(logps: Sequence[float]) -> int:
    return max(range(len(logps)), key=logps.__getitem__)


def _differ(lines: Sequence[Line], found: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Name the questions with another choice, and how far lm-eval's first two choices are from each other there."""
    differ = []
    for line, logps in zip(lines, found, strict=True):
        if line["choice"] != "ABCD"[_choice(logps)]:
            first, second = sorted(logps, reverse=True)[:2]
            differ.append({"id": line["id"], "margin_nats": first - second})
    return differ


def main() -> None:
    """Compare everything and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("mmlu", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-items", type=int, default=300)
    parser.add_argument("--probe-items", type=int, default=100)
    parser.add_argument("--batch-sizes", default="8,16,32,64")
    parser.add_argument("--questions", default="spread,whole", help="spread evenly, or whole subjects")
    parser.add_argument("--variants", default="base,adapter")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="what is computed in")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(args)
    adapters = [variant == "adapter" for variant in args.variants.split(",")]
    others = comparison.all_of_theirs(args.questions.split(","), adapters)
    fused(comparison.network)
    results = []
    for (adapter, which), other in others.items():
        results.append(comparison.compared(which, adapter, other))
        print(json.dumps(results[-1]), flush=True)
        (args.out / "results.json").write_text(json.dumps({"results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
