"""Mistakes are refused together, each with its key and what was probably meant."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fine_tune.config import check_config, check_sweep
from fine_tune.errors import ConfigError

SOURCE = "{m: {format: chat, path: x}}"

# override(s), what the one sentence must contain
MISTAKES = [
    ("optim.learning_rate=1e-4", ["optim.learning_rate: unknown key", "optim.lr"]),
    ("lr=1e-4", ["lr: unknown key", "optim.lr"]),
    ("trainer.max_step=5", ["trainer.max_step: unknown key", "trainer.max_steps"]),
    ("+trainer.max_epoch=5", ["trainer.max_epoch: unknown key", "trainer.max_epochs"]),
    ("++optim.global_batchsize=5", ["optim.global_batchsize: unknown key", "optim.global_batch_size"]),
    ("+foo=1", ["foo: unknown key"]),
    ("modle=tiny", ["modle: unknown key", "model"]),
    ("objective.betta=1", ["objective.betta: unknown key"]),
    ("callbacks.previw.every_n_steps=5", ["callbacks.previw", "mean callbacks.preview.every_n_steps"]),
    ("+callbacks.previw.every_n_steps=5", ["callbacks.previw", "mean callbacks.preview"]),
    ("callbacks.preview.every_n_step=5", ["unknown key", "mean callbacks.preview.every_n_steps"]),
    ("callbacks.early_stopping.patience=5", ["callbacks.early_stopping.patience", "not part"]),
    ("logger.wandb.project=x", ["logger.wandb.project", "not part of this run", "wandb"]),
    ("data.options.num_trian=5", ["data.options.num_trian", "data.options.num_train"]),
    ("data.options.num_train=many", ["data.options.num_train"]),
    ("optim.schedule_options.num_cycle=2", ["optim.schedule_options.num_cycle", "num_cycles"]),
    ("method.rank=abc", ["method.rank = abc", "whole number"]),
    ("method.rank=8.5", ["method.rank = 8.5", "whole number"]),
    ("method.rank=true", ["method.rank = true", "whole number"]),
    ("method.rank=0", ["method.rank = 0", ">= 1"]),
    ("method.dropout=1.0", ["method.dropout = 1.0", "< 1"]),
    ("optim.lr=-1e-4", ["optim.lr = -0.0001", "> 0"]),
    ("optim.lr=nan", ["optim.lr = nan", "finite"]),
    ("optim.lr=null", ["optim.lr = null", "number"]),
    ("optim.lr={a:1}", ["optim.lr", "number"]),
    ("optim.betas=[0.9]", ["optim.betas", "2 items"]),
    ("optim.betas=[0.9,1.5]", ["optim.betas", "1.5", "< 1"]),
    ("seed=-1", ["seed = -1", ">= 0"]),
    ("trainer.deterministic=maybe", ["trainer.deterministic = maybe", "true or false"]),
    ("run_name=7", ["run_name = 7", "text"]),
    ("run_name=a/b", ["run_name = a/b", "A-Z"]),
    ("run_name=..", ["run_name = ..", "only dots"]),
    ("method.bits=3", ["method.bits = 3", "4, 8, 16"]),
    ("model.dtype=float61", ["model.dtype = float61", "Did you mean float16"]),
    ("trainer.precision=bf16", ["trainer.precision = bf16", "Did you mean bf16-mixed"]),
    ("method.target_modules=[]", ["method.target_modules", "list of layer names"]),
    ("model=llama2", ["model = llama2", "Did you mean model=llama2_7b", "tiny"]),
    ("data=oast1", ["data = oast1", "Did you mean data=oasst1"]),
    ("method=qlorra", ["method = qlorra", "Did you mean method=qlora"]),
    ("objective=rlhf", ["objective = rlhf", "sft"]),
    ("experiment=phi2", ["experiment = phi2", "phi2_oasst1"]),
    ("optim=null", ["optim = null", "adamw"]),
    ("data=[oasst1,guanaco]", ["data", "one option"]),
    ("model=llama2_7b,qwen", ["model = llama2_7b,qwen", "-m"]),
    ("~callbacks.preview", ["~callbacks.preview", "callbacks.preview=null"]),
    ("model@other=tiny", ["model@other: unknown key"]),
    ("optim.lr", ["optim.lr: not key=value"]),
    ("data.path=a b=c,", ["data.path = a b=c,: special characters", "data.path=\"'a b=c,'\""]),
    ("data=text data.path=x=y.jsonl", ["data.path = x=y.jsonl: special characters"]),
    ("data=text data.path=/me:pw@[", ["data.path = /me:pw@["]),
    ("data=chat", ["data.path: no value", "data.hub"]),
    ("trainer=ddp", ["trainer.devices: no value", "GPUs"]),
    ("experiment=mistral_instruct", ["data.path: no value", "### Instruction"]),
    ("data.path=${data.pth}", ["data.path = ${data.pth}", "refers to no key"]),
    ("data=text data.path=${oc.env:HOME}", ["data.path", "oc.env", "refused"]),
    ("data=text data.path=${oc.decode:x}", ["data.path", "oc.decode", "refused"]),
    ("data.batch=pairs data.answer_rule=null data.num_eval_items=0", ["data = world_sft: gives pairs"]),
    ("trainer.micro_batch_tokens=100", ["trainer.micro_batch_tokens = 100", "data.max_seq_len (128)"]),
    ("trainer.max_steps=null", ["trainer.max_steps and trainer.max_epochs", "exactly one"]),
    ("trainer.max_steps=5 trainer.max_epochs=1", ["trainer.max_steps and trainer.max_epochs", "exactly one"]),
    ("method=full method.bits=4 method.quant_type=nf4", ["method.bits = 4", "cannot train"]),
    ("method=full method.rank=8", ["method.rank", "no adapter"]),
    ("method=full method.use_dora=true", ["method.use_dora", "no adapter"]),
    ("method=lora method.double_quant=true", ["method.double_quant", "method.bits=4"]),
    ("method.quant_type=null", ["method.quant_type = null", "nf4"]),
    ("method.alpha=null", ["method.alpha = null", "adapter"]),
    ("trainer=cpu trainer.precision=16-mixed", ["trainer.precision = 16-mixed", "CPU"]),
    ("trainer.devices=2", ["trainer.devices = 2", "ddp"]),
    ("model=qwen model.revision=main model.trust_remote_code=true", ["model.trust_remote_code", "pinned"]),
    ("model.path=owner/name", ["model.path = owner/name", "model.revision"]),
    ("model.chat_template=wrld", ["model.chat_template = wrld", "world"]),
    ("model.chat_template=nowhere.jinja", ["model.chat_template = nowhere.jinja", "no such template"]),
    ("model.pad_token=\"<|end|>\" model.end_of_turn=\"<|end|>\"", ["model.pad_token", "differ"]),
    ("data.path=rows.jsonl", ["data.path", "world"]),
    ("data=oasst1 data.path=null data.hub=null", ["data.path and data.hub", "exactly one"]),
    ("data=chat data.hub=owner/name", ["data.hub = owner/name", "data.revision"]),
    ("data=mix", ["data.sources", "at least one"]),
    (f"data.sources={SOURCE}", ["data.sources", "only for data=mix"]),
    ("data=mix data.sources={m: {format: chta, path: x}}", ["data.sources.m.format = chta", "mean chat"]),
    ("data=mix data.sources={m: {format: chat, pth: x}}", ["data.sources.m.pth", "data.sources.m.path"]),
    (f"data=mix data.sources={SOURCE.replace('chat', 'world')}", ["data.sources.m.format=world", "own rows"]),
    ("data=mix data.sources={m: {format: chat, hub: a/b}}", ["data.sources.m.revision: no value"]),
    ("data=mix data.sources={m: {format: chat, path: x, weight: 0}}", ["data.sources.m.weight = 0", "> 0"]),
    ("data=mix data.sources={m: {format: chat, path: x, options: {a: 1}}}", ["data.sources.m.options.a"]),
    ("data.val_path=x", ["data.val_path = x", "own validation"]),
    (f"data=mix data.sources={SOURCE.replace('path: x', 'path: null')}", ["data.sources.m: exactly one"]),
    ("data.answer_rule=null", ["data.num_eval_items", "data.answer_rule"]),
    ("data=text data.path=x data.overflow=keep_last_turns", ["data.overflow = keep_last_turns", "turns"]),
    ("callbacks=early_stopping", ["callbacks.early_stopping", "trainer.val_every_n_steps"]),
    ("callbacks.checkpoint.use_best=true", ["callbacks.checkpoint.use_best", "trainer.val_every_n_steps"]),
    (
        "callbacks=early_stopping trainer.val_every_n_steps=5 data.val_share=0",
        ["callbacks.early_stopping", "data.val_share"],
    ),
    ("objective.beta=0.2", ["objective.beta: objective=sft has no such key", "pass objective=dpo"]),
    ("+objective.reference=base", ["objective.reference: objective=sft has no such key"]),
    ("objective.name=dpo", ["objective.name = dpo", "Pass objective=dpo"]),
    ("objective.name=dop", ["objective.name = dop: must be one of sft, dpo", "mean dpo"]),
    ("callbacks.preferences.max_margn=5", ["unknown key", "mean callbacks.preferences.max_margin"]),
    ("callbacks.preferences.max_chosen_drop=0", ["callbacks.preferences.max_chosen_drop = 0", "> 0"]),
    ("data.lint=drop", ["data.lint = drop: only for pairs", "conversations"]),
    ("data=text data.path=x data.answer_rule=whole", ["data.answer_rule = whole: documents have no answers"]),
    (
        "data.batch=documents data.answer_rule=null data.num_eval_items=0",
        ["data.batch = documents: format world gives conversations"],
    ),
    (
        "data=mix data.sources={m: {format: preferences, path: x}}",
        ["data.sources.m.format = preferences: gives pairs, but data.batch is conversations", "objective=dpo"],
    ),
    ("optim.schedule=constant", ["optim.warmup_share", "constant_with_warmup"]),
    ("optim.schedule=cosine_with_min_lr", ["optim.schedule_options.min_lr: no value", "cosine_with_min_lr"]),
    ("optim._target_=os.system", ["optim._target_ = os.system", "not on the list"]),
    ("+callbacks.mine={_target_:subprocess.run}", ["callbacks.mine._target_ = subprocess.run"]),
    ("sweep_dir=x", ["sweep_dir", "-m"]),
    ("resume=nowhere", ["resume = nowhere", "config.yaml"]),
    ("hydra.run.dir=x", ["hydra.run.dir", "run_dir"]),
    ("hydra.launcher._target_=os.system", ["hydra.launcher._target_"]),
]  # fmt: skip


def words(text: str) -> list[str]:
    """Split at spaces that begin another override; values may hold spaces."""
    parts: list[str] = []
    for part in text.split(" "):
        starts = part[:1].isalpha() and "=" in part and not text.startswith("data.path=a ")
        if starts or not parts:
            parts.append(part)
        else:
            parts[-1] += f" {part}"
    return parts


@pytest.mark.parametrize(("overrides", "contained"), MISTAKES, ids=[text[:60] for text, _ in MISTAKES])
def test_each_mistake_gives_one_sentence(overrides: str, contained: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        check_config(words(overrides))
    [sentence] = refused.value.problems
    assert all(part in sentence for part in contained), sentence


def test_there_are_enough_different_mistakes() -> None:
    assert len({text for text, _ in MISTAKES}) == len(MISTAKES) >= 20


def test_all_mistakes_are_reported_together_and_none_hides_another() -> None:
    groups = ("optim.", "trainer.", "+trainer.", "run_name")
    alone = [text for text, _ in MISTAKES if " " not in text and text.startswith(groups)]
    distinct = list({word.lstrip("+").partition("=")[0]: word for word in alone}.values())
    distinct = [word for word in distinct if not word.startswith(("optim.schedule", "trainer.max_steps"))]
    with pytest.raises(ConfigError) as refused:
        check_config(distinct)
    assert len(distinct) >= 10
    assert len(refused.value.problems) == len(distinct)


def test_a_value_that_others_refer_to_is_reported_once() -> None:
    with pytest.raises(ConfigError) as refused:
        check_config(["data.max_new_tokens=many"])
    assert len(refused.value.problems) == 1


@pytest.mark.parametrize("order", [(2, 1, 0), pytest.param((0, 1, 2), marks=pytest.mark.drill)])
def test_three_mistakes_give_three_lines_in_time_and_touch_nothing(
    tmp_path: Path, repository: Path, order: tuple[int, ...]
) -> None:
    mistakes = ["optim.lrr=1e-4", "+trainer.max_epoch=3", "model=lama2_7b"]
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, str(repository / "train.py"), *(mistakes[i] for i in order)],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    seconds = time.monotonic() - started
    assert ended.returncode == 2
    lines = [line for line in ended.stderr.splitlines() if line.startswith("  - ")]
    assert len(lines) == 3
    for expected in (
        "optim.lrr: unknown key. Did you mean optim.lr?",
        "trainer.max_epochs",
        "model=llama2_7b",
    ):
        assert sum(expected in line for line in lines) == 1
    assert ended.stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert seconds < 5


@pytest.mark.parametrize("entry", [["train.py"], ["-m", "fine_tune", "train"]])
def test_both_entry_points_refuse_with_exit_code_2(
    tmp_path: Path, repository: Path, entry: list[str]
) -> None:
    command = [str(repository / "train.py")] if entry == ["train.py"] else entry
    ended = subprocess.run(
        [sys.executable, *command, "method.rank=abc"],
        capture_output=True, text=True, cwd=repository, check=False,
    )  # fmt: skip
    assert (ended.returncode, "method.rank = abc" in ended.stderr) == (2, True)


def test_checking_imports_nothing_heavy(repository: Path) -> None:
    script = (
        "import sys, fine_tune\n"
        "from fine_tune.cli.train import main\n"
        "assert main(['optim.lrr=1']) == 2\n"
        "assert main(['-m', 'optim.lr=1,abc']) == 2\n"
        "from fine_tune.config import check_config\n"
        "check_config(['model=llama2_7b', 'data=oasst1'])\n"
        "heavy = {'torch', 'lightning', 'transformers', 'peft', 'datasets', 'bitsandbytes', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=repository, check=True
    )
    assert ended.stdout.strip() == "[]"


def test_importing_the_package_imports_nothing_at_all(repository: Path) -> None:
    script = (
        "import sys, fine_tune; print(sorted({'torch', 'hydra', 'omegaconf', 'pydantic'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=repository, check=True
    )
    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("overrides", "contained"),
    [
        (["method.rank=8,abc"], "method.rank = abc: must be a whole number"),
        (["method.rank=8,16", "run_name=x"], "run_name = x: the jobs of a sweep need different names"),
        (["method.rank=8,16", "run_dir=x"], "run_dir: one folder cannot hold"),
        (["resume=x", "seed=1,2"], "resume: continues one run"),
        (["trainer=ddp", "trainer.devices=2", "seed=1,2"], "trainer.devices: a sweep runs on one device"),
        (["optim.lr=interval(1e-5,1e-4)"], "optim.lr = interval(1e-5,1e-4): several values"),
        (["model=tiny,lama"], "model = lama: no such option"),
    ],
)  # fmt: skip
def test_every_combination_of_a_sweep_is_checked_first(overrides: list[str], contained: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_sweep(overrides)
    assert sum(contained in sentence for sentence in refused.value.problems) == 1


def test_a_sweep_is_every_combination_and_has_a_folder() -> None:
    jobs = check_sweep(["method.rank=8,16", "optim=adamw,paged_adamw_8bit", "seed=range(1,3)"])
    seen = {(job.cfg["method"]["rank"], job.cfg["optim"]["name"], job.cfg["seed"]) for job in jobs}
    assert len(seen) == len(jobs) == 8
    assert {job.cfg["sweep_dir"] for job in jobs} == {"runs"}
    assert {job.cfg["sweep_dir"] for job in check_sweep(["seed=1,2", "sweep_dir=many"])} == {"many"}
