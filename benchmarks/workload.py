"""Write a random checkpoint of a known shape, and instruction and preference rows of realistic lengths, to time training on.

    python benchmarks/workload.py FOLDER --size 7b --rows 2048

makes FOLDER/model (safetensors and tokenizer), FOLDER/rows.jsonl, FOLDER/pairs.jsonl and FOLDER/template.jinja. Every word is
one token, so a row's length is exact: prompts have a median of 60 tokens and completions of 180, both log-normal, at most 1024
together. Pairs have prompts of a median of 160 tokens and completions of 160 and 150, each at most 512.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 32_000
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8},
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4},
}
TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{{- message.content + ' ' if message.role == 'user' else message.content + eos_token -}}
{%- endfor -%}
"""


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of the words t4 ... t31999."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *(f"t{i}" for i in range(len(SPECIAL), VOCABULARY))])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(str(folder))


def write_model(folder: Path, size: str, seed: int) -> None:
    """Write random bf16 weights in LLaMA-2's layout, made on the GPU when there is one."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        **SHAPES[size],
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(str(folder), max_shard_size="4GB")


def write_rows(file: Path, num: int, seed: int) -> float:
    """Write chat rows and return their mean length in tokens."""
    rng = random.Random(seed)
    total = 0
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(num):
            prompt = _length(rng, median=60, spread=1.0, low=8, high=500)
            completion = _length(rng, median=180, spread=0.8, low=16, high=1000 - prompt)
            turns = [("user", prompt), ("assistant", completion)]
            messages = [{"role": role, "content": _words(rng, count)} for role, count in turns]
            stream.write(json.dumps({"messages": messages}) + "\n")
            total += prompt + completion
    return total / num


def write_pairs(file: Path, num: int, seed: int) -> float:
    """Write preference rows and return the mean of their tokens, the prompt counted once."""
    rng = random.Random(seed + 1)
    total = 0
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(num):
            prompt = _length(rng, median=160, spread=0.8, low=8, high=512)
            chosen = _length(rng, median=160, spread=0.7, low=16, high=512)
            rejected = _length(rng, median=150, spread=0.7, low=16, high=512)
            sizes = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            stream.write(json.dumps({side: _words(rng, count) for side, count in sizes.items()}) + "\n")
            total += prompt + chosen + rejected
    return total / num


def _length(rng: random.Random, *, median: float, spread: float, low: int, high: int) -> int:
    return min(high, max(low, int(rng.lognormvariate(math.log(median), spread))))


def _words(rng: random.Random, count: int) -> str:
    return " ".join(f"t{rng.randrange(len(SPECIAL), VOCABULARY)}" for _ in range(count))


def main() -> None:
    """Write everything and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    write_model(args.folder / "model", args.size, args.seed)
    write_tokenizer(args.folder / "model")
    mean = write_rows(args.folder / "rows.jsonl", args.rows, args.seed)
    (args.folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    pairs = write_pairs(args.folder / "pairs.jsonl", args.rows, args.seed)
    print(f"{args.folder}: {args.size} model, {args.rows} rows of {mean:.0f} tokens and pairs of {pairs:.0f} on average")


if __name__ == "__main__":
    main()
