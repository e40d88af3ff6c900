"""What is there is not computed again; what decides an answer, when it changes, is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from fine_tune import assembly, evaluating, subjects
from fine_tune.cli import evaluate as evaluate_cli
from fine_tune.device import plan_device
from fine_tune.evaluation_config import check_evaluation
from fine_tune.evaluation_parts import build_evaluation

from .asked import BATCH, CPU, QUESTIONS, asking, evaluate, items, nats, perplexity, spoiled


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("again")


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many items each call of an evaluation's scoring had."""
    calls: list[int] = []
    score = evaluating.build_evaluation

    def building(*args: Any, **more: Any) -> Any:
        made = score(*args, **more)
        real = made.score
        made.score = lambda subject, rows, chunk: calls.append(len(chunk)) or real(subject, rows, chunk)
        return made

    monkeypatch.setattr(evaluating, "build_evaluation", building)
    return calls


def test_what_is_there_is_not_computed_again(
    nf4: Path, root: Path, questions: Path, scored: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluate(nf4, root / "again", *asking(questions))
    assert sum(scored) == QUESTIONS
    scored.clear()
    capsys.readouterr()
    files = {x: (x.read_bytes(), x.stat().st_mtime_ns) for x in Path(first["folder"]).iterdir()}
    assert evaluate(nf4, root / "again", *asking(questions)) == first
    assert scored == []
    assert f"{QUESTIONS} items are there already" in " ".join(capsys.readouterr().out.split())
    assert files == {x: (x.read_bytes(), x.stat().st_mtime_ns) for x in Path(first["folder"]).iterdir()}


def test_half_of_it_is_not_computed_again(nf4: Path, root: Path, questions: Path, scored: list[int]) -> None:
    folder = Path(evaluate(nf4, root / "half", *asking(questions))["folder"])
    lines = {line["id"]: line for line in items({"folder": folder})}
    cfg = check_evaluation([f"ckpt={nf4}", *CPU, *asking(questions)])
    named = subjects.find([str(nf4)], cfg)
    text, template = assembly.load_text(named[0].cfg["model"], Path(named[0].cfg["model"]["path"]))
    asked = build_evaluation(cfg["eval"], named, seed=0)
    rows = asked.prepare(text, template)
    chunk = asked.chunks(rows)[2]
    (folder / "metrics.json").unlink()
    found = {"chunk": 2, "lines": [lines[rows[i].id] for i in chunk]}
    (folder / "partial.jsonl").write_text(json.dumps(found) + "\n", encoding="utf-8")
    scored.clear()
    evaluate(nf4, root / "half", *asking(questions))
    assert scored == [BATCH] * (QUESTIONS // BATCH - 1)


def test_switching_checkpoints_loads_no_tokenizer_again(nf4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []
    load = assembly.load_text
    monkeypatch.setattr(assembly, "load_text", lambda model, folder: loads.append(model) or load(model, folder))
    trained, base = subjects.find([str(nf4), "base"], check_evaluation(["ckpt=base"]))
    stage = subjects.Stage(trained, plan_device(accelerator="cpu", devices=1, num_nodes=1, precision="32-true"))
    templates = [stage.show(one).template for one in (trained, base, trained, base)]
    assert len(loads) == 1
    assert len({template.sha256 for template in templates}) == 1
    # Another setting is another template, loaded once as well.
    cfg = {**base.cfg, "model": {**base.cfg["model"], "chat_template": "guanaco"}}
    other = replace(base, label="other", cfg=cfg)
    assert [stage.show(one).template.name for one in (other, base, other)] == ["guanaco", templates[0].name, "guanaco"]
    assert len(loads) == 2


@pytest.mark.parametrize("damage", ["items", "metrics"])
def test_a_damaged_result_is_computed_again(
    damage: str, nf4: Path, root: Path, questions: Path, scored: list[int]
) -> None:
    first = evaluate(nf4, root / f"damaged-{damage}", *asking(questions))
    whole = items(first)
    folder = Path(first["folder"])
    if damage == "items":
        (folder / "items.jsonl").unlink()
    else:
        (folder / "metrics.json").write_text("", encoding="utf-8")
    scored.clear()
    assert evaluate(nf4, root / f"damaged-{damage}", *asking(questions)) == first
    assert sum(scored) == QUESTIONS
    assert items(first) == whole


@pytest.mark.parametrize(
    "more", ["eval.max_new_tokens=5", "eval.normalisation=plain", "eval.limit_words=2", "eval.batch_size=3", "seed=1"]
)
def test_a_changed_setting_computes_again(more: str, nf4: Path, root: Path, questions: Path, scored: list[int]) -> None:
    place = root / f"set-{more.split('=')[0]}"
    evaluate(nf4, place, *asking(questions))
    scored.clear()
    evaluate(nf4, place, *asking(questions), more)
    assert sum(scored) == QUESTIONS


def test_changed_questions_compute_again(nf4: Path, root: Path, questions: Path, scored: list[int]) -> None:
    mine = root / "changing.jsonl"
    shutil.copy(questions, mine)
    evaluate(nf4, root / "changed", *asking(mine))
    scored.clear()
    mine.write_text(mine.read_text(encoding="utf-8").replace('"w0 w0 w0"', '"w0 w0"', 1), encoding="utf-8")
    found = evaluate(nf4, root / "changed", *asking(mine))
    assert sum(scored) == QUESTIONS
    assert items(found)[0]["target"] in ("w0 w0", ["w0 w0"])


@pytest.mark.parametrize("kind", ["weights", "alpha"])
def test_a_changed_adapter_computes_again(
    kind: str, nf4: Path, root: Path, stand_in: tuple[Path, Path], scored: list[int]
) -> None:
    run, place = root / f"retrained-{kind}", root / f"retrained-{kind}-place"
    shutil.copytree(nf4, run)
    first = evaluate(run, place, *perplexity(stand_in))
    scored.clear()
    if kind == "weights":
        run = spoiled(nf4, root / "moved-on", lambda t: t * 1.5).rename(root / "moved-on-2")
        shutil.rmtree(root / f"retrained-{kind}")
        run = run.rename(root / f"retrained-{kind}")
    else:
        file = run / "adapter" / "adapter_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**settings, "lora_alpha": settings["lora_alpha"] * 3}), encoding="utf-8")
    second = evaluate(run, place, *perplexity(stand_in))
    assert sum(scored) > 0
    assert nats(first, run.name) != nats(second, run.name)


def test_only_one_process_works_in_a_folder(
    nf4: Path, root: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = root / "locked" / "eval" / "exact_match"
    place.mkdir(parents=True)
    words = [f"ckpt={nf4}", f"run_dir={root / 'locked'}", *CPU, *asking(questions)]
    with FileLock(place / ".lock"):
        assert evaluate_cli.main(words) == 9
        told = f"{place} is in use by another evaluation. Wait for it, or write elsewhere with run_dir=<folder>."
        assert told in capsys.readouterr().err
        assert [x.name for x in place.iterdir()] == [".lock"]
    assert evaluate_cli.main(words) == 0
    assert evaluate_cli.main(words) == 0, "the lock is let go"


def test_a_verdict_does_not_outlive_what_it_was_about(
    nf4: Path, lora: Path, root: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = Path(evaluate([nf4, lora], root / "stale", *asking(questions))["folder"]) / "verdict.json"
    evaluate(nf4, root / "stale", *asking(questions))
    assert verdict.is_file(), "one checkpoint says nothing about the list"

    def stop(*words: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluating, "_score", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate([nf4, lora], root / "stale", *asking(questions, "eval.limit_words=2"))
    assert not verdict.exists()
