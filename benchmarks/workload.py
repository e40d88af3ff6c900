"""Write a random checkpoint of a known shape, and instruction and preference rows of realistic lengths, to time training on.

    python benchmarks/workload.py FOLDER --size 7b --rows 2048

makes FOLDER/model (safetensors and tokenizer), FOLDER/rows.jsonl, FOLDER/pairs.jsonl and FOLDER/template.jinja. Every word is
one token, so a row's length is exact: prompts have a median of 60 tokens and completions of 180, both log-normal, at most 1024
together. Pairs have prompts of a median of 160 tokens and completions of 160 and 150, each at most 512.

Sizes llama3_8b, qwen25_7b, mistral_7b and phi2 have those families' exact layout. All have the same 32,000 words; a larger
vocabulary is rows of the model that no word stands for, which cost the same. --vocabulary sets their number, to tell what it
costs, and --positions the longest sequence.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 32_000
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
# The word that ends a turn, where a family's own is asked for by its name.
ENDS = {"phi2": "<|endoftext|>", "tiny_phi2": "<|endoftext|>"}
LLAMA, QWEN = (LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)
MISTRAL, PHI = (MistralConfig, MistralForCausalLM), (PhiConfig, PhiForCausalLM)
Family = tuple[type[PretrainedConfig], type[PreTrainedModel]]


def _wide(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    widths = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"vocab_size": VOCABULARY, "max_position_embeddings": 4096, **widths, **more}


GROUPED = {"num_key_value_heads": 8, "tie_word_embeddings": False}
SHAPES: dict[str, tuple[Family, dict[str, Any]]] = {
    "7b": (LLAMA, _wide(4096, 11008, 32, 32)),
    "llama3_8b": (
        LLAMA,
        _wide(4096, 14336, 32, 32, **GROUPED, vocab_size=128_256, max_position_embeddings=8192, rope_theta=500_000.0),
    ),
    "qwen25_7b": (
        QWEN,
        _wide(
            3584, 18944, 28, 28, num_key_value_heads=4, tie_word_embeddings=False, vocab_size=152_064,
            max_position_embeddings=32_768, rope_theta=1_000_000.0, rms_norm_eps=1e-6,
        ),
    ),
    "mistral_7b": (MISTRAL, _wide(4096, 14336, 32, 32, **GROUPED, max_position_embeddings=32_768, sliding_window=4096)),
    "phi2": (
        PHI,
        _wide(2560, 10240, 32, 32, vocab_size=51_200, max_position_embeddings=2048, partial_rotary_factor=0.4),
    ),
    "small": (LLAMA, _wide(256, 768, 6, 8)),
    "tiny": (LLAMA, _wide(128, 384, 2, 4)),
    "tiny_mistral": (MISTRAL, _wide(128, 384, 2, 4, num_key_value_heads=2, sliding_window=64)),
    "tiny_phi2": (PHI, _wide(128, 384, 2, 4, partial_rotary_factor=0.5)),
}  # fmt: skip
TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{{- message.content + ' ' if message.role == 'user' else message.content + eos_token -}}
{%- endfor -%}
"""


def write_tokenizer(folder: Path, *, end: str = "</s>") -> None:
    """Write a tokenizer of the words t4 ... t31999."""
    special = [end if word == "</s>" else word for word in SPECIAL]
    vocabulary = {word: i for i, word in enumerate([*special, *(f"t{i}" for i in range(len(SPECIAL), VOCABULARY))])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(str(folder))


def keep_words(folder: Path) -> None:
    """Make every word an added token: Qwen2's tokenizer class has a way of its own to split text, and none to keep words."""
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.add_tokens([AddedToken(f"t{i}", single_word=True, normalized=False) for i in range(len(SPECIAL), VOCABULARY)])
    raw.save(str(folder / "tokenizer.json"))


def write_model(folder: Path, size: str, seed: int, **changes: int | None) -> None:
    """Write random bf16 weights in a family's layout, made on the GPU when there is one.

    ``changes`` take the place of the config's own values where they are not None.
    """
    torch.manual_seed(seed)
    (kind, network), shape = SHAPES[size]
    shape = shape | {key: value for key, value in changes.items() if value is not None}
    config = kind(bos_token_id=1, eos_token_id=2, pad_token_id=3, **shape)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = network(config)
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
    parser.add_argument("--vocabulary", type=int, help="rows of the model's vocabulary; the family's own if left out")
    parser.add_argument("--positions", type=int, help="tokens of the longest sequence; the family's own if left out")
    parser.add_argument("--layers", type=int, help="layers; the family's own if left out")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    changes = {"vocab_size": args.vocabulary, "max_position_embeddings": args.positions, "num_hidden_layers": args.layers}
    write_model(args.folder / "model", args.size, args.seed, **changes)
    write_tokenizer(args.folder / "model", end=ENDS.get(args.size, "</s>"))
    if SHAPES[args.size][0] == QWEN:
        keep_words(args.folder / "model")
    mean = write_rows(args.folder / "rows.jsonl", args.rows, args.seed)
    (args.folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    pairs = write_pairs(args.folder / "pairs.jsonl", args.rows, args.seed)
    print(f"{args.folder}: {args.size} model, {args.rows} rows of {mean:.0f} tokens and pairs of {pairs:.0f} on average")


if __name__ == "__main__":
    main()
