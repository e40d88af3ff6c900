"""Score MMLU prompts here and with lm-evaluation-harness, on the same model in float32, and compare every log-probability.

    python benchmarks/mmlu_vs_lm_eval.py MODEL MMLU --out results.json

MMLU is the folder of QLoRA's JSON files, with MMLU's own folders in csv/. Zero-shot and five-shot, from both sources; --num-items
takes a part. lm-eval 0.4.13 has to be importable; it runs a local task of its own making, offline, without bootstrap. Its batch
sizes are tried on --probe-items questions; the fastest and those near it are run on all, and the fastest counts. A CSV prompt that
is byte for byte the JSON's is not asked of it twice. Times are wall and CPU seconds of this process (threads added up); they
include encoding and leave out loading the model; on a machine that others use as well CPU time says more, and
OMP_WAIT_POLICY=passive keeps waiting threads out of it.
Exits 1 unless log-probabilities agree within 1e-4 nats, choices in 99.9 % of the items, and CPU time is at most a third.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from fine_tune.evaluation.mmlu import MMLU
from fine_tune.evaluation.mmlu_data import LETTERS
from fine_tune.evaluation.protocol import Subject
from fine_tune.models.base import BaseSpec, load_base
from fine_tune.text.template import load_template

LIMIT_NATS, LIMIT_CHOICES, LIMIT_TIME = 1e-4, 0.999, 1 / 3
# A batch size this near the best of the probe, in either time, is run on everything.
CLOSE = 1.1
TASK = """task: prompts
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{input}}}}"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: output
metric_list:
  - metric: acc
"""
Line = dict[str, Any]


@dataclass
class Clock:
    """Wall and CPU seconds of a block."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure a block."""
        wall, cpu = time.perf_counter(), sum(os.times()[:2])
        yield
        self.wall, self.cpu = time.perf_counter() - wall, sum(os.times()[:2]) - cpu

    def as_dict(self) -> dict[str, float]:
        """Two decimals are enough."""
        return {"wall_seconds": round(self.wall, 2), "cpu_seconds": round(self.cpu, 2)}


def ours(model: Path, evaluation: MMLU) -> tuple[list[Line], Clock]:
    """Score with the project."""
    device = torch.device("cpu")
    network = load_base(BaseSpec(model, 16, torch.float32, torch.float32, device))
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    template = load_template("guanaco", bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    subject = Subject(network, tokenizer, template, device)
    clock = Clock()
    lines: dict[int, Line] = {}
    with clock.running():
        items = evaluation.prepare(tokenizer, template)
        chunks = evaluation.chunks(items)
        for chunk, found in zip(chunks, evaluation.score_each(subject, items, chunks), strict=True):
            lines |= zip(chunk, found, strict=True)
    print(evaluation.note(items, tokenizer))
    return [lines[i] for i in range(len(items))], clock


def theirs(model: Path, lines: Sequence[Line], context: int, batch_size: int) -> tuple[list[list[float]], Clock]:
    """Score the prompts of our lines with lm-eval; returns log-probabilities per item and letter."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    network = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps({"input": x["prompt"], "output": x["target"]}) + "\n" for x in lines))
        (Path(folder) / "prompts.yaml").write_text(TASK.format(file=file))
        lm = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=batch_size, max_length=context)
        manager = TaskManager(include_path=folder, include_defaults=False)
        with clock.running():
            found = simple_evaluate(
                model=lm, tasks=["prompts"], task_manager=manager, bootstrap_iters=0, log_samples=True
            )
    samples = sorted(found["samples"]["prompts"], key=lambda sample: sample["doc_id"])
    for sample, line in zip(samples, lines, strict=True):
        asked = [request["arg_0"] + request["arg_1"] for request in _requests(sample)]
        assert asked == [f"{line['prompt']} {letter}" for letter in LETTERS], "lm-eval asked something else"
    return [[float(response[0][0]) for response in sample["resps"]] for sample in samples], clock


def _requests(sample: dict[str, Any]) -> list[dict[str, str]]:
    arguments = sample["arguments"]
    if isinstance(arguments, dict):
        return [arguments[key] for key in sorted(arguments)]
    return [{"arg_0": pair[0], "arg_1": pair[1]} for pair in arguments]


def compare(lines: Sequence[Line], found: Sequence[list[float]]) -> dict[str, float]:
    """Return the largest difference of a log-probability and the share of equal choices."""
    gap = max(
        abs(a - b)
        for line, logps in zip(lines, found, strict=True)
        for a, b in zip(line["logps"].values(), logps, strict=True)
    )
    equal = sum(
        line["choice"] == LETTERS[max(range(len(LETTERS)), key=logps.__getitem__)]
        for line, logps in zip(lines, found, strict=True)
    )
    return {"num_items": len(lines), "largest_gap_nats": gap, "equal_choices": equal / len(lines)}


@dataclass
class Comparison:
    """Both sides under the same settings."""

    model: Path
    folder: Path
    context: int
    num_items: int | None

    def evaluation(self, shots: int, source: str, num_items: int | None = None) -> MMLU:
        """Name what is asked."""
        path = self.folder if source == "json" else self.folder / "csv"
        options: dict[str, Any] = {"context_length": self.context, "num_items": num_items or self.num_items}
        return MMLU(path=str(path), format=source, shots=shots, **options)

    def fast_batch_sizes(self, shots: int, sizes: Sequence[int], probe_items: int) -> tuple[list[int], dict[str, Any]]:
        """Find lm-eval's fastest batch sizes on a part of the questions: the best one and those close to it."""
        lines, clock = ours(self.model, self.evaluation(shots, "json", probe_items))
        times = {size: theirs(self.model, lines, self.context, size)[1].as_dict() for size in sizes}
        fast = [
            size
            for size in sizes
            if any(times[size][name] <= CLOSE * min(t[name] for t in times.values()) for name in times[size])
        ]
        return fast, {"num_items": len(lines), "here": clock.as_dict(), **{str(size): times[size] for size in sizes}}

    def both_sources(self, shots: int, sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Compare on the JSON's prompts, then on the CSV's; here, there, here again. Ours slowest against its fastest."""
        lines, first = ours(self.model, self.evaluation(shots, "json"))
        asked = {size: theirs(self.model, lines, self.context, size) for size in sizes}
        found = asked[sizes[0]][0]
        _, second = ours(self.model, self.evaluation(shots, "json"))
        mine = [first.as_dict(), second.as_dict()]
        other = {str(size): clock.as_dict() for size, (_, clock) in asked.items()}
        ratio = {name: max(t[name] for t in mine) / min(t[name] for t in other.values()) for name in mine[0]}
        yield {"source": "json", **compare(lines, found), "here": mine, "lm_eval": other, "share_of_lm_eval": ratio}
        known = {line["prompt"]: logps for line, logps in zip(lines, found, strict=True)}
        lines, again = ours(self.model, self.evaluation(shots, "csv"))
        new = [line for line in lines if line["prompt"] not in known]
        if new:
            known |= zip(
                (line["prompt"] for line in new), theirs(self.model, new, self.context, sizes[0])[0], strict=True
            )
        yield {
            "source": "csv",
            **compare(lines, [known[line["prompt"]] for line in lines]),
            "asked_of_lm_eval_anew": len(new),
            "here": [again.as_dict()],
        }


def main() -> None:
    """Run both sides and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("mmlu", type=Path)
    parser.add_argument("--out", type=Path, default=Path("mmlu_vs_lm_eval.json"))
    parser.add_argument("--shots", default="0,5")
    parser.add_argument("--context", type=int, default=5120)
    parser.add_argument("--num-items", type=int, help="of each source; all by default")
    parser.add_argument("--probe-items", type=int, default=57)
    parser.add_argument("--batch-sizes", default="1,4,8,16,32,64", help="of lm-eval")
    arguments = parser.parse_args()
    comparison = Comparison(arguments.model, arguments.mmlu, arguments.context, arguments.num_items)
    sizes = [int(size) for size in arguments.batch_sizes.split(",")]
    results: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "context": arguments.context,
    }
    passed = True
    for shots in map(int, arguments.shots.split(",")):
        fast, probe = comparison.fast_batch_sizes(shots, sizes, arguments.probe_items)
        result: dict[str, Any] = {"lm_eval_by_batch_size": probe, "sources": []}
        results[f"{shots}_shot"] = result
        for one in comparison.both_sources(shots, fast):
            result["sources"].append({**one, "load_average": os.getloadavg()})
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
            print(json.dumps(one), flush=True)
            passed &= one["largest_gap_nats"] <= LIMIT_NATS and one["equal_choices"] >= LIMIT_CHOICES
            passed &= one.get("share_of_lm_eval", {}).get("cpu_seconds", 0.0) <= LIMIT_TIME
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
