"""Time answers as exact_match asks for them against plain model.generate, one prompt after the other, on the same 4-bit model.

    python benchmarks/workload.py w7b --size 7b --rows 256
    python benchmarks/generation_speed.py w7b --out generation_speed

Prompts are those of w7b/rows.jsonl. A random model never ends its answer by itself, so every answer has --new-tokens tokens. The
plain way answers --plain-prompts of them, with transformers' defaults (a KV cache, greedy), the adapter as PEFT computes it, with
and without autocast; the faster counts. Each side answers a few prompts before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from adapted import Seconds, as_transformers_does, fused, load
from transformers import AutoTokenizer, GenerationConfig

from fine_tune.evaluation.answers import Answerer
from fine_tune.text.conversation import Message
from fine_tune.text.template import ChatTemplate


class Speeds:
    """Both ways on one model."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
        self.new_tokens = args.new_tokens
        self.network = load(args.folder / "model", device=self.device, dtype=self.dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(str(args.folder / "model"))
        source = (args.folder / "template.jinja").read_text(encoding="utf-8")
        self.template = ChatTemplate(source, "workload", "</s>", "<s>", "</s>")
        self.prompts = self._prompts(args.folder / "rows.jsonl", args.prompts)

    def _answerer(self, batch_size: int) -> Answerer:
        return Answerer(self.network, self.tokenizer, self.template, 1024, self.dtype, batch_size)

    def _prompts(self, file: Path, count: int) -> list[Sequence[int]]:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:count]]
        encoder = self._answerer(1).encoder
        return [encoder.encode_prompt([Message("user", row["messages"][0]["content"])]) for row in rows]

    def ours(self, batch_size: int, *, base: bool) -> dict[str, Any]:
        """Answer all prompts as an evaluation does."""
        answerer, clock = self._answerer(batch_size), Seconds(self.device)
        answerer.continue_prompts(self.prompts[:2], max_new_tokens=4, base=base)
        with clock.running():
            found = answerer.continue_prompts(self.prompts, max_new_tokens=self.new_tokens, base=base)
        tokens = sum(one.num_tokens for one in found)
        return {"tokens": tokens, "seconds": clock.seconds, "tokens_per_second": tokens / clock.seconds}

    def all_plain(self, count: int, *, base: bool) -> list[dict[str, Any]]:
        """Answer in the plain way with every setting that makes sense."""
        halves = (False,) if base or self.dtype == torch.float32 else (False, True)
        return [{"autocast": half, **self.plain(count, base=base, autocast=half)} for half in halves]

    @torch.no_grad()
    def plain(self, count: int, *, base: bool, autocast: bool) -> dict[str, Any]:
        """Answer some prompts one by one with ``generate``."""
        settings = GenerationConfig(do_sample=False, max_new_tokens=self.new_tokens, eos_token_id=2, pad_token_id=3)
        clock, tokens = Seconds(self.device), 0
        half = torch.autocast(self.device.type, self.dtype) if autocast else nullcontext()
        with half, as_transformers_does(self.network, adapter=not base) as model:
            rows = [torch.tensor([list(prompt)], device=self.device) for prompt in self.prompts[:count]]
            model.generate(input_ids=rows[0], generation_config=GenerationConfig(do_sample=False, max_new_tokens=4, pad_token_id=3))
            with clock.running():
                for ids in rows:
                    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
                    tokens += found.shape[1] - ids.shape[1]
        return {"tokens": tokens, "seconds": clock.seconds, "tokens_per_second": tokens / clock.seconds}


def main() -> None:
    """Time both ways with and without the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what workload.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--plain-prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-sizes", default="64,128")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    speeds, results = Speeds(args), []
    plain = {base: speeds.all_plain(args.plain_prompts, base=base) for base in (False, True)}
    fused(speeds.network)
    for base, ways in plain.items():
        best = max(one["tokens_per_second"] for one in ways)
        for size in map(int, args.batch_sizes.split(",")):
            mine = speeds.ours(size, base=base)
            times = mine["tokens_per_second"] / best
            results.append({"adapter": not base, "batch_size": size, **mine, "plain": ways, "times": times})
            print(json.dumps(results[-1]), flush=True)
            (args.out / "results.json").write_text(json.dumps({"results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
