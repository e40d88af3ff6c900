"""Folders as they are found: whole, half, damaged, or none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fine_tune.errors import ConfigError
from fine_tune.report.page import write_report
from fine_tune.report.reading import FILES, read_run

from .conftest import Page, write_json, write_jsonl, write_run


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FILES)
def test_each_missing_file_is_left_out_with_a_word(plain_run: Path, name: str) -> None:
    (plain_run / name).unlink()
    text = page_of(plain_run).text
    assert f"Not in this folder: {name} ({FILES[name]})." in text


@pytest.mark.parametrize("content", [b"", b"[1, 2]\n", b"\xff\xfe\x00{", b'{"a": ' * 3000, b"- a\n- b: {", b"1" * 5000])
def test_damaged_files_never_stop_the_report(plain_run: Path, content: bytes) -> None:
    for name in FILES:
        (plain_run / name).write_bytes(content)
    text = page_of(plain_run).text
    assert {name for name in FILES if f"plain/{name}: " in text} == (set(FILES) if content else set())


def test_damaged_lines_are_skipped_and_counted(plain_run: Path) -> None:
    good = [json.dumps({"step": i, "train/loss": 5.0 - i}) for i in range(3)]
    rows = [good[0], '{"step": 1, "tr', "", "[1]", good[1], "null", good[2], '{"step": 9']
    (plain_run / "metrics.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert [line["step"] for line in read_run(plain_run).metrics] == [0, 1, 2]
    assert "plain/metrics.jsonl: 4 damaged line(s) skipped" in page_of(plain_run).text


def test_values_of_wrong_kinds_are_shown_as_they_are(plain_run: Path) -> None:
    values = {"exact_match": "ninety", "steps": [1], "final_loss": {"a": 1}, "tokens_per_second": True, "mfu": "x"}
    write_json(plain_run / "summary.json", values)
    write_json(plain_run / "manifest.json", {"versions": [1], "command": 7})
    write_json(
        plain_run / "data_ledger.json", {"parts": "none", "tokens": 3, "length_percentiles": [1], "max_seq_len": "x"}
    )
    write_json(plain_run / "eval" / "held_out" / "metrics.json", {"metrics": [1, 2], "num_items": {}})
    write_json(plain_run / "eval" / "held_out" / "verdict.json", [{"sentence": 3, "groups": 4, "gained": {"a": 1}}, 5])
    text = page_of(plain_run).text
    assert "ninety" in text
    assert "\n7\n" in text
    assert "plain/eval/held_out/verdict.json: damaged, left out" in text


def test_figures_that_are_not_finite_are_named(plain_run: Path) -> None:
    text = '{"final_loss": NaN, "exact_match": Infinity, "steps": null, "train_seconds": 1%s}' % ("0" * 400)
    (plain_run / "summary.json").write_text(text, encoding="utf-8")
    write_jsonl(
        plain_run / "metrics.jsonl",
        [{"step": i, "train/loss": [1.0, None, 2.0][i], "grad_norm": None} for i in range(3)],
    )
    page = page_of(plain_run)
    assert page.pieces.count("not finite") == 2
    assert "a number of 1329 bits" in page.text
    assert "1 not drawn" in page.text
    assert "optimizer steps" not in page.text
    assert "Gradient norm" not in page.text


def test_aliases_that_stand_for_more_text_than_memory_are_harmless(plain_run: Path) -> None:
    lists = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" if i else "l0: &l0 [x]" for i in range(40))
    (plain_run / "config.yaml").write_text(f"{lists}\nself: &s [*s]\n", encoding="utf-8")
    assert write_report(plain_run).stat().st_size < 2_000_000


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, plain_run: Path) -> None:
    with pytest.raises(ConfigError, match=r"run = .*nowhere: no such folder\. Pass the folder of a run"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no file of a run in it"):
        write_report(plain_run.parent)
    with pytest.raises(ConfigError, match=r"no such folder"):
        write_report(plain_run, others=[tmp_path / "nowhere"])


def test_results_of_several_checkpoints_stand_beside_each_other(tmp_path: Path) -> None:
    for label in ("tuned", "base"):
        write_json(tmp_path / "results" / label / "metrics.json", {"checkpoint": label, "metrics": {"f1": 0.5}})
        write_jsonl(
            tmp_path / "results" / label / "items.jsonl", [{"id": "a", "prompt": "Why?", "completion": f"by {label}"}]
        )
    text = page_of(tmp_path / "results").text
    assert text.index("by base") < text.index("by tuned")
    assert "1 of 1 prompts that all of them answered." in text


def test_reading_changes_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "word")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    first = write_report(run, tmp_path / "a.html").read_bytes()
    assert write_report(run, tmp_path / "b.html").read_bytes() == first
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
