"""Small runs through the same doors as the real ones."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fine_tune
from fine_tune import checkpoints
from fine_tune.interrupts import Interrupted
from fine_tune.modules.step import StepModule
from fine_tune.packing.batches import StepBatch
from fine_tune.passport import prompts, replay

from .asked import QUESTIONS, write_lines
from .built_in import built_in_job

WORDS = [f"w{i}" for i in range(60)]
# Small jobs leave the checklist out: tests count passes, and test_checklist.py has it.
UNCHECKED = "trainer.checklist=false"


def write_model(folder: Path, *, seed: int = 0) -> Path:
    """A two-layer LLaMA with a word-level tokenizer, as a model folder."""
    vocabulary = {
        word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", "###", "Human:", "Assistant:", *WORDS])
    }
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


def write_rows(file: Path, num: int = 45) -> Path:
    """Rows of unequal length with a rule to learn: the answer repeats the question's words backwards."""
    generator = torch.Generator().manual_seed(3)
    lines = []
    for _ in range(num):
        words = [
            WORDS[i]
            for i in torch.randint(
                0, len(WORDS), (int(torch.randint(2, 14, (1,), generator=generator)),), generator=generator
            )
        ]
        turns = [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": " ".join(words[::-1])}]
        lines.append(json.dumps({"messages": turns}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def write_pairs(file: Path, num: int = 45) -> Path:
    """Pairs of unequal length with a rule to learn: the question's words backwards, against too many words."""
    generator = torch.Generator().manual_seed(4)

    def words(low: int, high: int) -> list[str]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return [WORDS[int(i)] for i in torch.randint(0, len(WORDS), (length,), generator=generator)]

    lines = []
    for _ in range(num):
        question = words(2, 9)
        sides = {"chosen": " ".join(question[::-1]), "rejected": " ".join(words(9, 14))}
        lines.append(json.dumps({"prompt": " ".join(question), **sides}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module", autouse=True)
def short_passports(request: pytest.FixtureRequest) -> Iterator[None]:
    """Record few and short answers in a passport, a fourth of a small run's time, where passports are not what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_merge.py":
            patch.setattr(replay, "NUM_TOKENS", 6)
            patch.setattr(prompts, "NUM_PROMPTS", 2)
        yield


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Leave to the system when what runs of this process wrote reaches the disk; only a power cut would show it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder and a file of chat rows."""
    root = tmp_path_factory.mktemp("stand_in")
    return write_model(root / "model"), write_rows(root / "rows.jsonl")


def small_job(stand_in: tuple[Path, Path], run_dir: Path, *more: str) -> list[str]:
    """Overrides of a run that takes seconds: NF4, dropout, several micro-batches a step, two epochs."""
    model, rows = stand_in
    return [
        f"model.path={model}", "data=chat", f"data.path={rows}", "data.max_seq_len=40", "data.num_eval_items=0",
        f"data.cache_dir={run_dir.parent / 'cache'}", "data.val_share=0.1", "optim.lr=1e-2", "optim.global_batch_size=8",
        "trainer=cpu", "trainer.max_steps=9", "trainer.micro_batch_tokens=96", "method.dropout=0.1",
        "callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep=2", "callbacks.preview.every_n_steps=4",
        "callbacks.preview.max_new_tokens=4", "callbacks.preview.num_prompts=1", UNCHECKED, f"run_dir={run_dir}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def pair_stand_in(stand_in: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model folder of ``stand_in`` and a file of preference pairs."""
    return stand_in[0], write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="session")
def sft_run(stand_in: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished SFT run, whose adapter has moved away from zero: what preference runs start from."""
    run_dir = tmp_path_factory.mktemp("sft") / "run"
    fine_tune.train(small_job(stand_in, run_dir, "method.dropout=0.0", "trainer.max_steps=4"))
    return run_dir


def small_pairs_job(pair_stand_in: tuple[Path, Path], run_dir: Path, *more: str) -> list[str]:
    """Overrides of a preference run that takes seconds: as small_job, on pairs and without dropout."""
    words = [word for word in small_job(pair_stand_in, run_dir) if word != "data=chat"]
    return [
        "objective=dpo", "data=preferences", *words, "objective.beta=0.1", "method.dropout=0.0", "trainer.micro_batch_tokens=144",
        "trainer.val_every_n_steps=3", "callbacks.checkpoint.every_n_steps=3", *more,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def trained(stand_in: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train a run to evaluate, once per name; its adapter has moved away from zero."""
    root = tmp_path_factory.mktemp("trained")

    def train(name: str, *more: str) -> Path:
        if not (root / name / "summary.json").is_file():
            steps = ["trainer.max_steps=4", "optim.lr=3e-2", "callbacks.preview=null"]
            words = [word for word in small_job(stand_in, root / name, *steps) if "dropout" not in word]
            fine_tune.train([*words, *more])
        return root / name

    return train


@pytest.fixture(scope="session")
def nf4(trained: Callable[..., Path]) -> Path:
    """A run on the 4-bit base."""
    return trained("nf4")


@pytest.fixture(scope="session")
def lora(trained: Callable[..., Path]) -> Path:
    """A run on the base as it is stored."""
    return trained("lora", "method=lora", "method.rank=4")


@pytest.fixture(scope="session")
def full(trained: Callable[..., Path]) -> Path:
    """A run that trained every weight."""
    return trained("full", "method=full")


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with one answer that nobody gives."""
    rng = random.Random(5)
    prompts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in range(QUESTIONS)]
    rows = [{"id": f"q{i}", "prompt": prompt, "answer": "w0 w0 w0"} for i, prompt in enumerate(prompts)]
    return write_lines(tmp_path_factory.mktemp("questions") / "questions.jsonl", rows)


@pytest.fixture(scope="session")
def built_in_run(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`python train.py` without arguments, done once for all tests of all workers; what it printed is beside it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, printed = root / "built_in" / "run", root / "built_in" / "stdout.txt"
    with FileLock(root / "built_in.lock"):
        if not printed.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            done = built_in_job(repository, folder)
            assert done.returncode == 0, done.stderr
            printed.write_text(done.stdout, encoding="utf-8")
    return folder


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The run's metrics without what a clock decides."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = {"tokens_per_second", "samples_per_second", "step_seconds", "mfu"}
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def assert_same(left: Any, right: Any, where: str = "state") -> None:
    """Equal containers, and tensors equal bit for bit."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


def assert_same_end(one: Path, other: Path, *, step: int) -> None:
    """Adapter, optimizer, schedule, random states and every step's metrics are the same."""
    ends = [checkpoints.verify(run / "checkpoints" / f"step-{step:07d}") for run in (one, other)]
    assert_same(*(end.adapter() for end in ends), "adapter")
    states = [end.trainer_state() for end in ends]
    for state in states:
        # Seconds differ between any two runs; what they were spent on must not.
        state["callbacks"]["Throughput"].pop("seconds")
    assert_same(*states)
    assert read_metrics(one) == read_metrics(other)
    assert (one / "previews.jsonl").read_bytes() == (other / "previews.jsonl").read_bytes()


def stop_in_this_process(step: int, monkeypatch: pytest.MonkeyPatch, job: list[str]) -> None:
    """Train until SIGTERM arrives in the middle of the given step."""
    train_step = StepModule.training_step

    def stopping(self: StepModule, batch: StepBatch, batch_idx: int) -> None:
        if batch.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        train_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(StepModule, "training_step", stopping)
        with pytest.raises(Interrupted, match=f"stopped after step {step} and saved") as stopped:
            fine_tune.train(job)
    assert stopped.value.exit_code == 143


def spawn(
    overrides: list[str], *, stop_step: int | None = None, signum: int = signal.SIGTERM
) -> subprocess.CompletedProcess[str]:
    """Run train in a fresh process, which sends itself a signal in the middle of the given step."""
    code = "import sys; from fine_tune.cli.train import main; sys.exit(main(sys.argv[1:]))"
    if stop_step is not None:
        code = (
            "import os, signal, sys\n"
            "from fine_tune.modules.step import StepModule\n"
            "step = StepModule.training_step\n"
            "def stopping(self, batch, batch_idx):\n"
            f"    if batch.step == {stop_step - 1}: os.kill(os.getpid(), {int(signum)})\n"
            "    return step(self, batch, batch_idx)\n"
            "StepModule.training_step = stopping\n" + code
        )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
