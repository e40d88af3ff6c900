"""The verdict at the end of evaluate: identical models, planted regressions, and items that cannot be compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fine_tune.cli import evaluate as evaluate_cli

from .asked import CPU, asking, evaluate, items, perplexity, spoiled, write_lines


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verdict")


@pytest.fixture(scope="module")
def speaker(nf4: Path, root: Path) -> Path:
    """A run that answers at length: training here teaches to fall silent, so its adapter is drawn at random."""
    draws = torch.Generator().manual_seed(1)
    return spoiled(nf4, root / "speaker", lambda t: 0.3 * torch.randn(t.shape, generator=draws))


@pytest.fixture(scope="module")
def own_answers(speaker: Path, questions: Path, root: Path) -> Path:
    """The questions with what the speaker itself says: it is right every time."""
    words = ["eval=compare", f"eval.path={questions}", "eval.num_items=null", "eval.max_new_tokens=6"]
    found = evaluate(speaker, root / "asked", *words)
    said = [{"id": x["id"], "prompt": x["prompt"], "answer": x["completion"]} for x in items(found)]
    spoken = [row for row in said if row["answer"]]
    assert len(spoken) >= 12
    return write_lines(root / "own.jsonl", spoken)


def test_two_identical_models_cannot_be_told_apart(speaker: Path, root: Path, own_answers: Path) -> None:
    twin = root / "twin"
    shutil.copytree(speaker, twin)
    found = evaluate([speaker, twin], root / "twins", *asking(own_answers))
    (verdict,) = found["verdicts"]
    assert verdict["word"] == "cannot tell"
    assert (verdict["num_gained"], verdict["num_lost"], verdict["difference"], verdict["p"]) == (0, 0, 0.0, 1.0)
    assert verdict["sentence"].startswith(f"cannot tell with {len(items(found, 'twin'))} items")
    assert found["results"]["speaker"] == found["results"]["twin"]


def noised(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel()))


@pytest.mark.parametrize("change", [torch.zeros_like, noised], ids=["zeroed", "noised"])
def test_a_planted_regression_is_worse_and_its_flips_are_listed(
    change: Callable[[torch.Tensor], torch.Tensor], speaker: Path, root: Path, own_answers: Path
) -> None:
    name = change.__name__
    bad = spoiled(speaker, root / name, change)
    found = evaluate([speaker, bad], root / f"planted-{name}", *asking(own_answers))
    (verdict,) = found["verdicts"]
    assert found["results"]["speaker"]["exact_match"] == 1.0
    lines = items(found, name)
    wrong = [line["id"] for line in lines if not line["correct"]]
    assert verdict["word"] == "worse"
    assert list(verdict["lost"]) == wrong
    assert len(wrong) >= 6
    assert list(verdict["gained"]) == []
    told = f"worse: {name} answers {len(wrong)} fewer of {len(lines)} items right than speaker"
    assert verdict["sentence"].startswith(told)


def test_nats_of_other_tokens_are_refused_before_the_second_model_is_scored(
    stand_in: tuple[Path, Path], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second tokenizer writes w12 as three tokens."""
    other = root / "other"
    shutil.copytree(stand_in[0], other)
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    parts = [tokenizer["pre_tokenizer"], {"type": "Digits", "individual_digits": True}]
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    vocabulary = tokenizer["model"]["vocab"]
    for number, text in enumerate(["w", *"0123456789"]):
        vocabulary[text] = vocabulary.pop(f"w{number}")
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    words = [f"ckpt=[{stand_in[0]},{other}]", f"run_dir={root / 'tokens'}", *CPU, *perplexity(stand_in)]
    assert evaluate_cli.main(words) == 3
    told = capsys.readouterr().err
    assert "learned tokens in model and" in told
    assert "nats per token of unlike tokens cannot be compared. Evaluate them one by one." in told
    folder = root / "tokens" / "eval" / "perplexity"
    assert (folder / "model" / "metrics.json").is_file()
    assert not (folder / "other").exists()
    assert set(evaluate(other, root / "tokens_alone", *perplexity(stand_in))["results"]) == {"other"}
