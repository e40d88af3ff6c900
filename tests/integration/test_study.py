"""`fine-tune study`: from finished runs to one page, in one command."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest

import fine_tune
from fine_tune.cli import study
from fine_tune.evaluation_config import check_evaluation

from .asked import CPU
from .conftest import small_pairs_job


def words_of(stand_in: tuple[Path, Path], questions: Path, run_dir: Path) -> list[str]:
    """Words that let a study take seconds, and leave the shared runs alone."""
    asked = [f"exact_match.path={questions}", "exact_match.max_new_tokens=6", "exact_match.num_items=6"]
    rows = [f"perplexity.path={stand_in[1]}", "perplexity.format=chat", "perplexity.num_items=12"]
    return [*CPU, f"run_dir={run_dir}", *asked, *rows]


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def test_qlora_beside_lora(
    nf4: Path,
    lora: Path,
    stand_in: tuple[Path, Path],
    questions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["adapters", f"ckpt=[{lora},{nf4}]", *words_of(stand_in, questions, tmp_path)]
    assert study.main(words) == 0
    page = (tmp_path / "adapters.html").read_text(encoding="utf-8")
    assert capsys.readouterr().out.rstrip().endswith(f"the report: {tmp_path.resolve() / 'adapters.html'}")
    for label in ("lora", "nf4"):
        found = read(tmp_path / "eval" / "perplexity" / label / "metrics.json")["metrics"]["nats_per_token"]
        loss = read((lora if label == "lora" else nf4) / "summary.json")["train_loss"]
        assert f"{found:.4f}</span>" in page
        assert f"{loss:.4f} nats/token" in page
    for verdict in read(tmp_path / "eval" / "perplexity" / "verdict.json"):
        assert verdict["names"] == ["lora", "nf4"]
        assert verdict["sentence"] in page
    for said in (
        "not measured (CPU)",
        "nf4 / lora",
        "training time",
        "MMLU was not asked: add mmlu.path=&lt;folder&gt;.",
    ):
        assert said in page, said
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("metrics.json")}
    assert len(before) == 4
    assert study.main(words) == 0
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("metrics.json")}, (
        "nothing is asked twice"
    )


def test_base_sft_and_dpo_side_by_side(
    sft_run: Path, pair_stand_in: tuple[Path, Path], stand_in: tuple[Path, Path], questions: Path, tmp_path: Path
) -> None:
    dpo = tmp_path / "dpo"
    fine_tune.train(
        small_pairs_job(pair_stand_in, dpo, f"init_from={sft_run}", "trainer.max_steps=2", "callbacks.preview=null")
    )
    words = [
        f"ckpt=[base,{sft_run},{dpo}]",
        *words_of(stand_in, questions, tmp_path / "results"),
        "eval=[exact_match,perplexity]",
    ]
    file = study.study("side_by_side", [*words, f"out={tmp_path / 'page.html'}"])
    page = file.read_text(encoding="utf-8")
    assert file == tmp_path / "page.html"
    columns = [page.index(f'<th scope="col" class="figure">{label}</th>') for label in ("base", "run", "dpo")]
    assert columns == sorted(columns)
    # Every prompt, with what each of the three said to it.
    for label in ("base", "run", "dpo"):
        lines = (tmp_path / "results/eval/exact_match" / label / "items.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 6
        for item in map(json.loads, lines):
            assert item["prompt"] in page
            assert f'<p class="said">{item["completion"]}</p>' in html.unescape(page)
    for name in ("exact_match", "perplexity"):
        assert len(found := read(tmp_path / "results" / "eval" / name / "verdict.json")) == 3
        assert all(verdict["sentence"] in page for verdict in found)


def test_each_evaluation_gets_its_own_words_and_all_get_the_shared_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fine_tune.report import page

    asked: list[dict[str, Any]] = []
    runs = [tmp_path / name for name in ("lo ra", "b,c")]
    for run in runs:
        run.mkdir()
        (run / "config.yaml").touch()

    def evaluate(words: list[str]) -> dict[str, Any]:
        asked.append(check_evaluation(words))
        return {
            "results": {"one": {}, "two": {}, "three": {}},
            "folder": str(runs[1] / "eval" / asked[-1]["eval"]["name"]),
        }

    def write_report(run: Path, out: Path, *, others: list[Path], study: page.Study) -> Path:
        assert (run, others) == (runs[1].resolve(), [run.resolve() for run in runs])
        assert study.runs == {"one": runs[0].resolve(), "three": runs[1].resolve()}
        assert [place.name for place in study.places] == ["perplexity", "mmlu", "compare"]
        assert study.command.startswith("fine-tune study adapters 'ckpt=[")
        return out

    monkeypatch.setattr(fine_tune, "evaluate", evaluate)
    monkeypatch.setattr(page, "write_report", write_report)
    ckpt = f"ckpt=['{runs[0]}','{runs[1]}/checkpoints/step-1','{runs[1]}/adapter']"
    words = [ckpt, "seed=7", "mmlu.path=m", "mmlu.shots=0", "compare.prompts=[Hi.,Ho.]"]
    assert study.study("adapters", words) == runs[1].resolve() / "adapters.html"
    assert [(cfg["eval"]["name"], cfg["seed"]) for cfg in asked] == [("perplexity", 7), ("mmlu", 7), ("compare", 7)]
    assert (asked[1]["eval"]["path"], asked[1]["eval"]["shots"]) == ("m", 0)
    assert asked[2]["eval"]["prompts"] == ["Hi.", "Ho."]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["both", "ckpt=[a,b]"], "both: no such study. Choose one of side_by_side, adapters."),
        (["adapters", "ckpt=[a,b]", "mmlu.shotz=3"], "mmlu.shotz: unknown key. Did you mean mmlu.shots?"),
        (["adapters", "ckpt=[a,b]", "perplexity.by=sum"], "perplexity.by: eval=perplexity has no such key."),
        (["adapters", "ckpt=[a,b]", "sed=3"], "sed: unknown key. Did you mean seed?"),
        (["adapters", "ckpt=[a,b]", "mmlu.path=x", "eval=perplexity"], "mmlu: eval= does not name this evaluation."),
        (["side_by_side", "ckpt=runs/sft"], "ckpt: a study compares. Pass two checkpoints or more"),
        (["side_by_side", "ckpt=[a,b]", "eval=[exact_mtch]"], "eval = exact_mtch: no such option."),
        (["side_by_side", "ckpt=[a,b]", "out=."], "out = .: is a folder."),
        (["side_by_side"], "ckpt: no value."),
    ],
)
def test_a_mistake_is_told_before_anything_is_asked(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fine_tune, "evaluate", lambda words: pytest.fail("asked"))
    assert study.main(words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n  - ") == 1


def test_help_names_both_studies(capsys: pytest.CaptureFixture[str]) -> None:
    assert (study.main(["--help"]), study.main([])) == (0, 2)
    said = capsys.readouterr()
    assert "side_by_side" in said.out
    assert "adapters" in said.out
    assert said.err == said.out
