"""Runs and checkpoints in one table, verdicts that need no further command, and pages of studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fine_tune.report.comparison import comparison
from fine_tune.report.evaluated import asked, card
from fine_tune.report.held_out import held_out_verdicts
from fine_tune.report.histogram import HIGH, histogram
from fine_tune.report.page import Study, write_report
from fine_tune.report.previews import previews
from fine_tune.report.reading import RunFiles, read_run
from fine_tune.report.tables import Table

from .conftest import Page, write_json, write_jsonl


def made(folder: Path, name: str, **summary: Any) -> RunFiles:
    """A run with nothing but a summary."""
    write_json(
        folder / name / "summary.json", {"objective": "sft", "loss_unit": "nats", "device": "CPU, 2 threads", **summary}
    )
    return read_run(folder / name)


def evaluate(run: Path, name: str, label: str, metrics: dict[str, Any], right: str = "") -> None:
    """Results of one checkpoint, with an item per letter: r is right, w is wrong."""
    place = run / "eval" / name / label if label else run / "eval" / name
    write_json(
        place / "metrics.json",
        {"checkpoint": label or "final", "num_items": len(right), "seconds": 2, "metrics": metrics},
    )
    said = {"prompt": "p", "completion": f"of {label}", "target": "t"}
    write_jsonl(place / "items.jsonl", [{"id": f"q{i}", **said, "correct": r == "r"} for i, r in enumerate(right)])


def lines(table: Table | None) -> dict[str, list[str]]:
    assert table is not None
    return {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}


def test_costs_come_first_with_their_multiples_and_only_they_have_one(tmp_path: Path) -> None:
    lora = made(tmp_path, "lora", peak_memory_gb=43.6, train_seconds=10.0, final_loss=2.0)
    qlora = made(tmp_path, "qlora", peak_memory_gb=10.9, train_seconds=15.0, final_loss=1.0)
    table = comparison([lora, qlora], [])
    found = lines(table)
    assert list(found) == ["peak memory", "training time", "validation loss"]
    assert found["peak memory"] == ["43.60 GB", "10.90 GB", "0.25 x"]
    assert found["training time"] == ["10.0 s", "15.0 s", "1.5 x"]
    assert found["validation loss"] == ["2.0000 nats", "1.0000 nats", ""]
    assert table is not None
    assert table.columns == ("", "lora", "qlora", "qlora / lora")


def test_memory_that_was_not_measured_is_said_to_be_so(tmp_path: Path) -> None:
    runs = [made(tmp_path, name, wall_seconds=1.0) for name in ("a", "b", "c")]
    found = lines(comparison(runs, []))
    assert found["peak memory"] == ["not measured (CPU)"] * 3
    assert found["wall time"] == ["1.0 s"] * 3
    page = Page(write_report(tmp_path / "a").read_text(encoding="utf-8"))
    assert "not measured on this device" in page.pieces


def test_the_base_has_a_column_where_it_was_asked_the_same(tmp_path: Path) -> None:
    for label, accuracy in (("dpo", 0.75), ("base", 0.0), ("sft", 0.5)):
        evaluate(tmp_path / "dpo", "mmlu", label, {"accuracy": accuracy, "by_subject": {"law": {"accuracy": 0.5}}})
    runs = [made(tmp_path, "sft", steps=3), made(tmp_path, "dpo", steps=4)]
    found = asked(runs, [run.label for run in runs])
    assert list(found[0].found) == ["base", "sft", "dpo"]
    assert lines(comparison(runs, found))["MMLU"] == ["0.0000", "0.5000", "0.7500", ""]
    assert lines(comparison(runs, found))["optimizer steps"] == ["", "3", "4", ""]
    shown = card(found[0])
    assert shown["figures"].columns == ("", "base", "sft", "dpo")
    assert lines(shown["figures"]) == {"items": ["0"] * 3, "accuracy": ["0", "0.5", "0.75"], "seconds": ["2.0"] * 3}
    assert [(label, table.title) for label, table in shown["nested"]] == [
        (x, "by subject") for x in ("base", "sft", "dpo")
    ]


def test_one_run_alone_is_compared_with_nothing(tmp_path: Path) -> None:
    run = made(tmp_path, "sft")
    assert comparison([run], asked([run])) is None


def test_a_finished_run_has_a_verdict_of_its_own_held_out_questions(tmp_path: Path) -> None:
    evaluate(tmp_path / "dpo", "held_out_base", "", {"exact_match": 0.0}, "wwwwwwww")
    evaluate(tmp_path / "dpo", "held_out_initial", "", {"exact_match": 0.9}, "rrrrrrrw")
    evaluate(tmp_path / "dpo", "held_out", "", {"exact_match": 0.9}, "wrrrrrrr")
    made(tmp_path, "dpo")
    better, open_ = held_out_verdicts(read_run(tmp_path / "dpo"))
    assert better.sentence.startswith("better: dpo answers 7 more of 8 items right than base (7 gained, 0 lost")
    assert (better.tone, better.flips) == ("good", "7 flipped items")
    assert open_.sentence.startswith(
        "cannot tell with 8 items: dpo answers as many of 8 items right as dpo at the start"
    )
    assert open_.shown.tables[0].columns == ("flip", "id", "prompt", "wanted", "dpo at the start said", "dpo said")
    assert [[cell.text for cell in row[:2]] for row in open_.shown.tables[0].rows] == [["lost", "q0"], ["gained", "q7"]]
    page = Page(write_report(tmp_path / "dpo").read_text(encoding="utf-8"))
    assert better.sentence in page.pieces
    # What was asked on purpose says it better.
    write_json(tmp_path / "dpo" / "eval" / "em" / "verdict.json", [{"sentence": "worse: by 3", "word": "worse"}])
    page = Page(write_report(tmp_path / "dpo").read_text(encoding="utf-8"))
    assert better.sentence not in page.pieces
    assert "worse: by 3" in page.pieces


def test_held_out_answers_of_other_items_or_without_a_judgement_give_no_verdict(tmp_path: Path) -> None:
    evaluate(tmp_path / "a", "held_out_base", "", {}, "ww")
    evaluate(tmp_path / "a", "held_out", "", {}, "rrr")
    assert list(held_out_verdicts(read_run(tmp_path / "a"))) == []
    for odd in ({"id": ["q"], "prompt": "p", "correct": True}, {"id": "q", "prompt": "p", "correct": 0.5}):
        for name in ("held_out_base", "held_out"):
            write_jsonl(tmp_path / "a" / "eval" / name / "items.jsonl", [odd])
        assert list(held_out_verdicts(read_run(tmp_path / "a"))) == []


def test_previews_of_several_runs_stand_side_by_side_over_time(tmp_path: Path) -> None:
    runs = [made(tmp_path, "sft"), made(tmp_path, "dpo", objective="dpo")]
    for run in runs:
        run.previews = [
            {"step": s, "prompt": p, "completion": f"{run.name} {s}", "base_completion": "b"}
            for s in (0, 9)
            for p in (f"only {run.name}", "both")
        ]
    shown = previews(runs)
    assert [preview.prompt for preview in shown] == ["both", "only sft", "only dpo"]
    assert [(said.label, said.steps) for said in shown[0].runs] == [
        ("SFT (sft)", (("0", "sft 0"), ("9", "sft 9"))),
        ("DPO (dpo)", (("0", "dpo 0"), ("9", "dpo 9"))),
    ]


def test_lengths_are_drawn_to_scale() -> None:
    drawn = histogram({"edges": [0, 10, 20, 30], "counts": [4, 0, 2]}, 19)
    assert drawn is not None
    assert (drawn.shortest, drawn.longest, drawn.most) == ("0", "29", "4")
    assert [float(found.height) for found in drawn.bins] == [96.0, 0.0, 48.0]
    assert [float(found.y) + float(found.height) for found in drawn.bins] == [HIGH] * 3
    assert [float(found.x) for found in drawn.bins] == [0.0, 133.3, 266.7]
    assert [found.over for found in drawn.bins] == [False, False, True]
    assert drawn.bins[2].says == "20 to 29 tokens: 2 rows"


@pytest.mark.parametrize(
    ("edges", "counts"),
    [
        ([0, 1], [1, 2]),
        ([1, 0], [1]),
        ([0, 1e308], [1]),
        ([0, 1], [-1]),
        ([], []),
        ("ab", [1]),
        ([0, None], [1]),
        (None, None),
    ],
)
def test_counts_that_do_not_fit_their_edges_are_not_drawn(edges: Any, counts: Any) -> None:
    assert histogram({"edges": edges, "counts": counts}, None) is None


def test_a_study_is_about_its_own_evaluations_in_its_own_order(tmp_path: Path) -> None:
    for name in ("perplexity", "mmlu", "old"):
        for label, value in (("lora", 0.25), ("qlora", 0.5)):
            evaluate(tmp_path / "qlora", name, label, {"accuracy": value, "perplexity": value}, "rw")
        write_json(
            tmp_path / "qlora" / "eval" / name / "verdict.json", [{"sentence": f"better: {name}", "word": "better"}]
        )
    for name in ("lora", "qlora"):
        made(tmp_path, name, peak_memory_gb=2.0)
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"seed": 1}), encoding="utf-8")
    places = tuple(tmp_path / "qlora" / "eval" / name for name in ("perplexity", "mmlu"))
    study = Study("Adapters compared", "the lead", ("lora", "qlora"), {}, places, "fine-tune study adapters")
    out = write_report(tmp_path / "qlora", tmp_path / "s.html", others=[tmp_path / "lora"], study=study)
    page = Page(out.read_text(encoding="utf-8"))
    said = [piece for piece in page.pieces if piece.startswith("better: ")]
    assert said == ["better: perplexity", "better: mmlu"]
    assert {"Adapters compared", "the lead", "fine-tune study adapters", "0.2500", "0.5000", "1 x"} <= set(page.pieces)
    assert "old" not in page.pieces
    assert "In short" not in page.pieces


def test_verdicts_are_told_in_the_order_people_ask_and_scores_say_which_way_is_up(tmp_path: Path) -> None:
    for name, kind in (
        ("arc", {}),
        ("exact_match", {"binary": True}),
        ("perplexity", {"binary": False, "higher_is_better": False}),
    ):
        found = [{"sentence": f"better: {name}", "word": "better", "num_items": 7, **kind}]
        write_json(tmp_path / "sft" / "eval" / name / "verdict.json", found)
    pieces = Page(write_report(tmp_path / "sft").read_text(encoding="utf-8")).pieces
    assert [p for p in pieces if p.startswith("better: ")] == [
        "better: exact_match",
        "better: perplexity",
        "better: arc",
    ]
    assert "perplexity, lower is better" in pieces
    assert "num items" in pieces
    assert "higher is better" not in pieces  # told already


def test_a_study_tells_runs_of_one_name_apart(tmp_path: Path) -> None:
    runs = {}
    for place, steps in (("a", 11), ("b", 22)):
        made(tmp_path / place, "run", steps=steps)
        runs[f"{place}-run"] = (tmp_path / place / "run").resolve()
    study = Study("t", "", tuple(runs), runs, (), "c")
    out = write_report(tmp_path / "b" / "run", tmp_path / "s.html", others=[tmp_path / "a" / "run"], study=study)
    pieces = [piece for piece in Page(out.read_text(encoding="utf-8")).pieces if piece.strip()]
    assert pieces[pieces.index("a-run") :][:3] == ["a-run", "b-run", "b-run / a-run"]
    assert pieces[pieces.index("optimizer steps") :][:3] == ["optimizer steps", "11", "22"]
