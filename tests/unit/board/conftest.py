"""Hand-made run folders and sweeps, in the form that runs and sweeps leave them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from fine_tune.board.finding import find
from fine_tune.board.ranking import Board, rank

VOID = {"meta", "input"}
# exact match by (rank, alpha); None did not finish.
FIGURES = {(8, 16): 0.5, (8, 32): 0.75, (16, 16): 0.9, (16, 32): None, (64, 16): 0.9, (64, 32): 0.25}


class Page(HTMLParser):
    """A page's elements with their attributes, its text, and the rows of its table."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.code = {"style": "", "script": ""}
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
        if self.open and self.open[-1] in self.code:
            self.code[self.open[-1]] += data
        elif data.strip():
            self.pieces.append(data)

    @property
    def structure(self) -> list[tuple[str, tuple[str, ...]]]:
        """Elements and the names of their attributes."""
        return [(tag, tuple(attributes)) for tag, attributes in self.elements]


def put(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


def config(**values: Any) -> dict[str, Any]:
    """A config with the values that are given by dotted key, ``__`` for the dot."""
    tree: dict[str, Any] = {
        "seed": 42,
        "run_name": None,
        "method": {"name": "qlora", "rank": 8, "alpha": 16, "bits": 4},
    }
    for key, value in values.items():
        group, _, leaf = key.partition("__")
        if leaf:
            tree.setdefault(group, {})[leaf] = value
        else:
            tree[key] = value
    return tree


def write_run(folder: Path, cfg: dict[str, Any], *, command: str = "train.py seed=42", **summary: Any) -> Path:
    """A run's folder; with any figure it has finished."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg), encoding="utf-8")
    put(folder / "manifest.json", {"command": command, "data_fingerprint": "d"})
    if summary:
        put(folder / "summary.json", {"run_name": folder.name, "loss_unit": "nats/token", **summary})
    return folder


def held_out(run: Path, exact_match: float, items: int) -> None:
    put(run / "eval" / "held_out" / "metrics.json", {"num_items": items, "metrics": {"exact_match": exact_match}})


def write_job(sweep: Path, number: int, words: Sequence[str], run: str | None, **said: Any) -> None:
    base = {"number": number, "overrides": list(words), "run": run, "status": "finished", "exit_code": 0}
    put(sweep / "jobs" / f"{number:04d}.json", {**base, "error": None, "reason": None, "seconds": 2.5, **said})


def write_sweep(root: Path, **sweep: Any) -> Path:
    """Six jobs over rank and alpha, of which (16, 32) ran out of memory, and a seventh that no folder was made for."""
    place = root / "sweep-0badf00d"
    command = "python train.py -m method.rank=8,16,64 method.alpha=16,32 seed=7 sweep_dir=out"
    put(
        place / "sweep.json",
        {"command": command, "kind": "grid", "swept": ["method.rank", "method.alpha"], "num_jobs": 7, **sweep},
    )
    for number, ((size, alpha), figure) in enumerate(FIGURES.items()):
        words, name = [f"method.rank={size}", f"method.alpha={alpha}"], f"r{size}-a{alpha}"
        found = (
            {} if figure is None else {"exact_match": figure, "final_loss": size / 100, "train_seconds": 10.0 + number}
        )
        run = write_run(root / name, config(method__rank=size, method__alpha=alpha), **found)
        if figure is None:
            failure = {"exit_code": 7, "error": "MemoryExhausted", "reason": "out of memory\nat 11 GB"}
            put(run / "failure.json", failure)
            write_job(place, number, words, name, status="failed", **failure)
        else:
            held_out(run, figure, 200)
            write_job(place, number, words, name)
    broken = {"status": "failed", "exit_code": 2, "error": "ConfigError", "reason": "method.rank = 0: must be > 0"}
    write_job(place, 6, ["method.rank=0", "method.alpha=16"], None, **broken)
    return place


def board_of(*places: Path, metric: str | None = None) -> Board:
    return rank(find(places), out=places[0], metric=metric)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "runs")


@pytest.fixture(scope="session")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], str]:
    """What a browser makes of a page once its scripts have run."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    home = tmp_path_factory.mktemp("browser")

    def browse(page: Path) -> str:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home}", "--dump-dom"]
        words = [chromium, *flags, page.resolve().as_uri()]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout

    return browse
