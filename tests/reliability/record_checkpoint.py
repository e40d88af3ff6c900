"""Record the checkpoint that later releases must still be able to go on from: `python tests/reliability/record_checkpoint.py`.

Run it once per release; earlier recordings stay. It makes a model of a few thousand weights, trains it for four steps, and keeps
the folder as it was after the second, with what the fourth came to.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fine_tune
from fine_tune.run_folder import versions

FOLDER = Path(__file__).resolve().parent.parent / "data" / "checkpoints"
# Stands for the folder of the recording, wherever it lies.
HOME = "{home}"
WORDS = [f"w{i}" for i in range(12)]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "###", "Human:", "Assistant:"]


def write_model(folder: Path) -> None:
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **tokens).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(folder))


def write_rows(file: Path) -> None:
    rng = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(24):
            words = rng.choices(WORDS, k=rng.randint(2, 5))
            turns = [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": " ".join(words[::-1])}]
            stream.write(json.dumps({"messages": turns}) + "\n")


def job(home: Path) -> list[str]:
    return [
        f"model.path={home / 'model'}", "method=lora", "method.rank=2", "method.alpha=4", "method.dropout=0.1", "data=chat",
        f"data.path={home / 'rows.jsonl'}", "data.max_seq_len=32", "data.num_eval_items=0", f"data.cache_dir={home / 'cache'}",
        "data.val_share=0.2", "optim.lr=1e-2", "optim.global_batch_size=4", "trainer=cpu", "trainer.max_steps=4",
        "trainer.micro_batch_tokens=64", "callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep=2",
        "callbacks.preview=null", f"run_dir={home / 'run'}",
    ]  # fmt: skip


def record(name: str) -> Path:
    place = FOLDER / name
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        write_model(home / "model")
        write_rows(home / "rows.jsonl")
        fine_tune.train(job(home))
        place.mkdir(parents=True)
        shutil.copytree(home / "model", place / "model")
        shutil.copy(home / "rows.jsonl", place)
        (place / "run" / "checkpoints").mkdir(parents=True)
        shutil.copytree(home / "run" / "checkpoints" / "step-0000002", place / "run" / "checkpoints" / "step-0000002")
        shutil.copy(home / "run" / "metrics.jsonl", place / "run")
        config = (home / "run" / "config.yaml").read_text(encoding="utf-8")
        (place / "run" / "config.yaml").write_text(config.replace(str(home), HOME), encoding="utf-8")
        shutil.copy(home / "run" / "checkpoints" / "step-0000004" / "adapter.safetensors", place / "after_step_4.safetensors")
        (place / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n", encoding="utf-8")
    return place


if __name__ == "__main__":
    made = record(sys.argv[1] if len(sys.argv) > 1 else versions()["fine-tune"])
    size = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
    print(f"{made}: {size:,} bytes")
