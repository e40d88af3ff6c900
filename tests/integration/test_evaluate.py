"""evaluate as a user meets it: what it accepts, what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import fine_tune
from fine_tune.cli import evaluate as evaluate_cli

from .asked import CPU, QUESTIONS, asking, evaluate, items, nats, perplexity
from .conftest import write_model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluated")


def test_a_run_gets_the_contracts_files(nf4: Path, questions: Path) -> None:
    found = fine_tune.evaluate([f"ckpt={nf4}", *CPU, *asking(questions)])
    folder = nf4 / "eval" / "exact_match"
    assert found["folder"] == str(folder)
    assert found["verdicts"] == []
    report = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert list(report) == ["name", "checkpoint", "num_items", "metrics", "seconds"]
    assert (report["name"], report["checkpoint"], report["num_items"]) == ("exact_match", "nf4", QUESTIONS)
    assert report["metrics"] == found["results"]["nf4"]
    assert 0 < report["seconds"] < 60
    lines = items(found)
    assert [line["id"] for line in lines] == [f"q{i}" for i in range(QUESTIONS)], (
        "in the file's order, not the batches'"
    )
    assert {"id", "prompt", "completion", "target", "correct"} <= set(lines[0])
    assert not (folder / "partial.jsonl").exists()
    assert not (folder / "verdict.json").exists()


def test_a_list_gets_a_folder_per_label_and_a_verdict(nf4: Path, lora: Path, root: Path, questions: Path) -> None:
    found = evaluate(["base", nf4, lora], root / "listed", *asking(questions))
    folder = root / "listed" / "eval" / "exact_match"
    assert sorted(x.name for x in folder.iterdir()) == [".lock", "base", "lora", "nf4", "verdict.json"]
    written = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(found["verdicts"]))
    assert [x["names"] for x in written] == [["base", "nf4"], ["nf4", "lora"], ["base", "lora"]]
    assert list(found["results"]) == ["base", "nf4", "lora"], (
        "in the order asked for, though the base comes last on stage"
    )
    assert {x["num_items"] for x in written} == {QUESTIONS}


def test_a_runs_checkpoints_and_adapter_folders_give_what_the_run_gives(
    nf4: Path, root: Path, stand_in: tuple[Path, Path]
) -> None:
    foreign = root / "foreign"
    shutil.copytree(nf4 / "adapter", foreign)
    (foreign / "fine_tune.json").unlink()
    steps = [nf4 / "checkpoints" / f"step-000000{n}" for n in (3, 4)]
    found = evaluate([nf4, nf4 / "adapter", *steps, foreign, "base"], root / "kinds", *perplexity(stand_in))
    lines = {label: [line["score"] for line in items(found, label)] for label in found["results"]}
    assert list(lines) == ["nf4", "nf4-adapter", "nf4-step-0000003", "nf4-step-0000004", "foreign", "base"]
    assert lines["nf4"] == lines["nf4-adapter"] == lines["nf4-step-0000004"] == lines["foreign"]
    assert nats(found, "base") - nats(found, "nf4") > 0.05, "the adapter does something"
    assert lines["nf4-step-0000003"] != lines["nf4"]


def test_runs_of_one_name_are_labelled_by_the_folders_above_them(
    nf4: Path, lora: Path, root: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = root / "one" / "run", root / "other" / "run"
    shutil.copytree(nf4, one)
    shutil.copytree(lora, other)
    found = evaluate([one, other], root / "same_name", *asking(questions))
    assert list(found["results"]) == ["one-run", "other-run"]
    assert [x["names"] for x in found["verdicts"]] == [["one-run", "other-run"]]
    assert items(found, "one-run") == items(evaluate(one, root / "same_name_one", *asking(questions)))
    capsys.readouterr()
    assert evaluate_cli.main([f"ckpt=[{one},{one.parent}/./run]", *CPU, *asking(questions)]) == 2
    assert f"ckpt: two of them are {one}. Leave one out." in capsys.readouterr().err


def test_the_base_answers_as_the_models_own_folder(
    lora: Path, root: Path, questions: Path, stand_in: tuple[Path, Path]
) -> None:
    found = evaluate(["base", lora, stand_in[0]], root / "whole_said", *asking(questions))
    base, tuned, whole = ([line["completion"] for line in items(found, label)] for label in ("base", "lora", "model"))
    assert base == whole
    assert base != tuned


def test_the_base_scores_as_the_models_own_folder(lora: Path, root: Path, stand_in: tuple[Path, Path]) -> None:
    found = evaluate(["base", lora, stand_in[0]], root / "whole", *perplexity(stand_in))
    base, whole = ([line["nll"] for line in items(found, label)] for label in ("base", "model"))
    assert base == pytest.approx(whole, abs=1e-6)
    assert abs(nats(found, "lora") - nats(found, "base")) > 0.05


def test_runs_of_other_rank_and_of_another_base_in_one_call(
    nf4: Path, trained: Callable[..., Path], root: Path, stand_in: tuple[Path, Path]
) -> None:
    wide = trained("wide", "method.rank=8")
    other = write_model(root / "other_model", seed=1)
    elsewhere = trained("elsewhere", f"model.path={other}")
    together = evaluate([nf4, wide, elsewhere, "base"], root / "mixed", *perplexity(stand_in))
    for run in (nf4, wide, elsewhere):
        alone = evaluate(run, root / f"alone-{run.name}", *perplexity(stand_in))
        assert items(alone) == items(together, run.name)
    first = evaluate(["base", nf4], root / "first", *perplexity(stand_in))
    assert nats(first, "base") == nats(together, "base"), "the base of the first run named"


def test_a_run_of_all_weights_is_compared_with_its_own_base(
    full: Path, root: Path, stand_in: tuple[Path, Path]
) -> None:
    found = evaluate(["base", full], root / "full_base", *perplexity(stand_in))
    plain = evaluate(stand_in[0], root / "full_plain", *perplexity(stand_in))
    assert nats(found, "base") == pytest.approx(nats(plain, "model"), abs=1e-6)
    assert nats(found, "base") - nats(found, "full") > 0.05


def test_a_checkpoint_of_all_weights_leaves_the_base_alone(
    full: Path, lora: Path, root: Path, stand_in: tuple[Path, Path]
) -> None:
    step = full / "checkpoints" / "step-0000004"
    found = evaluate([step, lora, "base"], root / "full_step", *perplexity(stand_in))
    clean = evaluate(["base", lora], root / "full_clean", *perplexity(stand_in))
    assert nats(found, "base") == nats(clean, "base")
    assert nats(found, "lora") == nats(clean, "lora")
    assert abs(nats(found, "full-step-0000004") - nats(clean, "base")) > 0.05


def test_a_folder_is_named_from_anywhere(
    nf4: Path, root: Path, stand_in: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(nf4, root / "named_whole", *perplexity(stand_in))
    (nf4 / "eval").mkdir(exist_ok=True)
    for number, (place, word) in enumerate([
        (nf4, "."), (nf4 / "adapter", "."), (nf4 / "checkpoints", "step-0000004"), (nf4 / "eval", ".."),
    ]):  # fmt: skip
        monkeypatch.chdir(place)
        found = evaluate(word, root / f"named{number}", *perplexity(stand_in))
        assert items(found) == items(whole), (place.name, word)
        assert next(iter(found["results"])).startswith("nf4"), (place.name, word)


@pytest.mark.parametrize("word", ["{root}/nowhere", "{root}", "runs/nowhere", "nowhere"])
def test_words_that_name_nothing(
    word: str, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "runs").mkdir(exist_ok=True)
    monkeypatch.chdir(root)
    word = word.format(root=root)
    code = evaluate_cli.main([f"ckpt={word}", f"run_dir={root / 'nothing'}", *CPU, "eval=compare", "eval.prompts=[w1]"])
    printed = capsys.readouterr().err
    assert code == 4, printed
    assert word in printed
    assert "Pass one of these, or base." in printed


def test_a_run_without_any_checkpoint(nf4: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    young = root / "young"
    young.mkdir()
    shutil.copy(nf4 / "config.yaml", young)
    assert evaluate_cli.main([f"ckpt={young}", *CPU]) == 4
    assert "no adapter and no checkpoint yet. Resume it first." in capsys.readouterr().err


def test_an_adapter_of_another_base_is_refused(nf4: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = root / "moved"
    shutil.copytree(nf4, moved)
    config = (moved / "config.yaml").read_text(encoding="utf-8")
    other = write_model(root / "third_model", seed=2)
    stated = next(line for line in config.splitlines() if line.strip().startswith("path:") and "model" in line)
    (moved / "config.yaml").write_text(config.replace(stated.split(": ", 1)[1], str(other)), encoding="utf-8")
    assert evaluate_cli.main([f"ckpt={moved}", *CPU, "eval=compare", "eval.prompts=[w1]"]) == 4
    assert "another base model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["exact_match", "compare", "perplexity"])
def test_the_number_of_items_bounds_a_file_too(
    name: str, nf4: Path, root: Path, questions: Path, stand_in: tuple[Path, Path]
) -> None:
    words = perplexity(stand_in) if name == "perplexity" else [f"eval={name}", f"eval.path={questions}"]
    found = evaluate(nf4, root / "bounded", *words, "eval.num_items=3")
    assert len(items(found)) == 3
