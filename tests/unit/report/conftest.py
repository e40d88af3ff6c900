"""Run folders made of chosen words, and pages read back as a browser would."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

VOID = {"meta"}


class Page(HTMLParser):
    """A page's elements in order with their attributes, and its text outside of <style>."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.style = ""
        self.feed(html)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.pieces.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    @property
    def text(self) -> str:
        """All text, pieces on lines of their own."""
        return "\n".join(piece for piece in self.pieces if piece.strip())

    @property
    def structure(self) -> list[tuple[str, tuple[str, ...]]]:
        """Elements and the names of their attributes."""
        return [(tag, tuple(attributes)) for tag, attributes in self.elements]

    def texts_of(self, tag: str) -> int:
        """How many elements of a kind there are."""
        return sum(found == tag for found, _ in self.elements)


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


def write_jsonl(file: Path, rows: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(folder: Path, word: str) -> Path:
    """A finished DPO run in which everything that can be text is ``word``."""
    folder.mkdir(parents=True)
    config = {
        "init_from": word,
        "model": {"name": word, word: word},
        "data": {"name": word, "options": {word: [word, {word: word}]}},
        "objective": {"name": word},
        word: word,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    write_json(folder / "manifest.json", {"versions": {word: word}, "command": f"__main__.py {word}", "seed": word, word: word})
    numbers = {"exact_match": 0.5, "base_exact_match": 0.0, "steps": 3, "final_loss": 1.0, "peak_memory_gb": 1.5}
    texts = dict.fromkeys(("objective", "method", "model", "device", "precision", "loss_unit", "run_name", "mfu"), word)
    write_json(folder / "summary.json", {**numbers, **texts, word: word})
    lines = [{"step": i, "train/loss": 3.0 - i, f"train/{word}": i, word: i} for i in range(3)]
    write_jsonl(folder / "metrics.jsonl", lines)
    said = {"prompt": word, "completion": word, "base_completion": word}
    write_jsonl(folder / "previews.jsonl", [{"step": step, **said} for step in (0, 3)])
    part = {
        "read": 3,
        "kept": 2,
        "dropped": {word: 1},
        "cut": {word: 1},
        "examples": {word: [word]},
        "tokens": {"kept": 9},
    }
    lengths = {"length_percentiles": {word: 9}, "length_histogram": {"edges": [1, 5, 10], "counts": [2, 1]}}
    ledger = {**part, **lengths, "lost_share": word, "max_seq_len": 8}
    write_json(folder / "data_ledger.json", {**ledger, "parts": [{"source": word, "split": word, **part}]})
    write_json(folder / "checklist.json", {"seconds": word, "items": [{"name": word, "passed": True, "says": word}, word]})
    for name, metrics in (("held_out", {word: word, "by": {word: {word: word}}}), ("held_out_base", {word: 0.5})):
        place = folder / "eval" / name
        write_json(place / "metrics.json", {"checkpoint": word, "num_items": word, "metrics": metrics, word: word})
        write_jsonl(
            place / "items.jsonl", [{"id": word, "prompt": word, "completion": word, "target": word, "correct": True}]
        )
    flips = {"right to wrong": [{"id": word, "prompt": word, word: word}], word: [word]}
    verdict = {
        "sentence": word,
        "word": word,
        "names": [word],
        "groups": [{"name": word, word: word}],
        "lost": [word],
        word: word,
    }
    write_json(folder / "eval" / "held_out" / "verdict_other.json", {"by": {word: {word: word}}, "flips": flips})
    write_json(folder / "eval" / "held_out" / "verdict.json", verdict)
    _write_comparison(folder / "eval" / "exact_match", word)
    return folder


def _write_comparison(place: Path, word: str) -> None:
    """An evaluation of three checkpoints with flips, groups, and figures of its own."""
    for label, right in (("base", False), ("sft", True), ("dpo", True)):
        metrics = {"accuracy": 0.5, word: word, "by_subject": {word: {"accuracy": 0.5, word: word}}}
        write_json(place / label / "metrics.json", {"checkpoint": word, "num_items": 2, "metrics": metrics, word: word})
        item = {"prompt": word, "completion": word, "target": word, "correct": right, word: word}
        write_jsonl(place / label / "items.jsonl", [{"id": word, **item}])
    sides = {"names": ["base", "sft"], "gained": [word], "lost": [], "binary": True, "word": "better"}
    groups = [{"name": word, "num_items": 1, "mean_a": 0.0, "mean_b": 1.0, "word": word}]
    write_json(place / "verdict.json", [{"sentence": word, **sides, "groups": groups}, {"sentence": word, "binary": False}])


@pytest.fixture
def plain_run(tmp_path: Path) -> Path:
    """A small run without a word that could hurt."""
    return write_run(tmp_path / "plain", "harmless")
