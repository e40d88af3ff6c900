"""The words of evaluate: every option composes, every mistake is told at once, torch is not imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fine_tune.config import find_conf_dir
from fine_tune.errors import ConfigError
from fine_tune.evaluation_config import check_evaluation
from fine_tune.evaluation_schema import EVALUATIONS
from fine_tune.overrides import group_options

CONF = find_conf_dir()


def companions(name: str) -> list[str]:
    lines = (CONF / "eval" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return [word for line in lines if line.startswith("# with: ") for word in line.removeprefix("# with: ").split()]


def problems(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        check_evaluation(words)
    return refused.value.problems


@pytest.mark.parametrize("name", ["runs/my run", "runs/a(1)", "it's", "a=b", "caf\u00e9"])
def test_the_quoting_that_is_told_works(name: str) -> None:
    """In double quotes a shell hands everything over that a suggestion holds."""
    try:
        found = check_evaluation(["ckpt=base", "eval=compare", f"eval.prompts=[one,{name}]"])
    except ConfigError as refused:
        [told] = refused.problems
        quoted = told.split("what is in it: ")[1].removesuffix(".")
        assert (quoted[0], quoted[-1]) == ('"', '"')
        found = check_evaluation(["ckpt=base", "eval=compare", quoted[1:-1]])
    assert found["eval"]["prompts"] == ["one", name]


def test_the_schema_and_the_folder_name_the_same_evaluations() -> None:
    assert group_options(CONF, "evaluate")["eval"] == sorted(EVALUATIONS)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_evaluation_composes_and_passes(name: str) -> None:
    cfg = check_evaluation(["ckpt=base", f"eval={name}", *companions(name)])
    assert cfg["eval"]["name"] == name
    assert set(cfg["eval"]) == set(EVALUATIONS[name].model_fields)


def test_checkpoints_are_one_or_a_list() -> None:
    assert check_evaluation(["ckpt=runs/sft"])["ckpt"] == "runs/sft"
    assert check_evaluation(["ckpt=[base,runs/sft,runs/dpo]"])["ckpt"] == ["base", "runs/sft", "runs/dpo"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], ["ckpt: no value. Pass ckpt=<run, checkpoint, adapter, model or base>, or a list such as ckpt=[base,runs/sft]."]),
        (["ckpt=[]"], ["ckpt = []: must be a run, checkpoint, adapter, model or base, or a list of them such as [base,runs/sft]."]),
        (["ckpt=[a,a]"], ["ckpt = ['a', 'a']: names the same checkpoint twice."]),
        (
            ["ckpt=[base,runs/my", "run]", "eval=mmul"],
            [
                "ckpt = [base,runs/my run]: a list that cannot be read. Quote it and what is in it: "
                "\"ckpt=[base,'runs/my run']\".",
                "eval = mmul: no such option.",
            ],
        ),
        (["ckpt=[base,", "runs/sft]"], ["ckpt = [base, runs/sft]: a list that cannot be read. Quote it and what is in it: "
                                        '"ckpt=[base,runs/sft]".']),
        (["ckpt=[base,runs/a(1)]"], ["ckpt = [base,runs/a(1)]: a list that cannot be read. Quote it and what is in it: "
                                     "\"ckpt=[base,'runs/a(1)']\"."]),
        (["ckpt=[base,it's]"], ["ckpt = [base,it's]: a list that cannot be read. Quote it and what is in it: "
                                "\"ckpt=[base,'it\\'s']\"."]),
        (["ckpt=[base,runs/sft", "evl=2]"], ["ckpt = [base,runs/sft: a list that", "evl = 2]: special characters."]),
        (["ckpt=base,runs/sft"], ["ckpt = base,runs/sft: several values. Write a list as [base,runs/sft]"]),
        (["ckpt=base", "eval=mmul"], ["eval = mmul: no such option. Did you mean eval=mmlu?"]),
        (["ckpt=base", "eval=gsm8k"], ["eval.path: no value. Pass eval.path=<file or folder of the questions>."]),
        (["ckpt=base", "eval.shots=5"], ["eval.shots: eval=exact_match has no such key. Remove it, or pass eval=mmlu."]),
        (["ckpt=base", "eval=mmlu", "eval.shots=6"], ["eval.shots = 6: must be <= 5."]),
        (["ckpt=base", "eval.temperature=-1", "evl=2"], ["evl: unknown key.", "eval.temperature = -1: must be >= 0."]),
    ],
)  # fmt: skip
def test_mistakes_are_told_together(words: list[str], told: list[str]) -> None:
    found = problems(*words)
    assert len(found) == len(told), found
    for sentence, start in zip(sorted(found), sorted(told), strict=True):
        assert sentence.startswith(start), sentence


def test_a_mistake_is_told_before_torch_is_imported() -> None:
    code = (
        "import sys\nfrom fine_tune.cli.evaluate import main\n"
        "code = main(['ckpt=base', 'eval.shotz=1'])\nprint(code, [m for m in ('torch', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "2 []"
    assert "eval.shotz: unknown key. Did you mean eval.shots?" in done.stderr
