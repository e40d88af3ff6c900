"""evaluate killed anywhere ends as if it had not been."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import fine_tune

from .asked import CPU, asking, whole_folder
from .dying import LAST, PLACES

SCRIPT = Path(__file__).with_name("dying.py")
Kills = list[tuple[str, int]]


def assert_resumes(root: Path, words: list[str], *, places: Kills, moments: list[float]) -> list[str]:
    """Every folder in which evaluations were killed ends as the clean one, byte for byte; returns what became of each.

    Every file is compared, of metrics.json all but ``seconds``: that is a clock, and nothing else may differ.
    """
    root.mkdir()
    # A script finds what lies beside it; the package under test is the one imported here.
    package = str(Path(fine_tune.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": package}
    command = [sys.executable, str(SCRIPT), json.dumps({"places": places, "moments": moments}), str(root), *CPU, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith(("killed ", "ended "))]
    assert told[: len(places)] == [f"killed {place} {after}" for place, after in places]
    clean = whole_folder(root / "clean")
    assert {Path(name).name for name in clean} == {
        "items.jsonl", "metrics.json", "progress.jsonl", "key.json", "verdict.json", ".lock",
    }  # fmt: skip
    ended = [folder for folder in root.iterdir() if folder.is_dir() and folder.name != "clean"]
    assert len(ended) == len([line for line in told if line.startswith("ended")]) + 2 + bool(places)
    for folder in ended:
        found = whole_folder(folder)
        assert found.keys() == clean.keys(), folder.name
        assert [name for name in clean if found[name] != clean[name]] == [], folder.name
    return told


@pytest.mark.parametrize("num_moments", [1, pytest.param(3, marks=pytest.mark.drill)])
def test_killed_at_every_kind_of_place_and_at_random_moments(
    nf4: Path, questions: Path, tmp_path: Path, num_moments: int
) -> None:
    rng = random.Random(1)
    places = [(place, rng.randint(0, 1)) for place in PLACES] + [(place, 0) for place in LAST]
    moments = [rng.uniform(0, 0.9) for _ in range(num_moments)]
    told = assert_resumes(tmp_path / "r", [f"ckpt=[base,{nf4}]", *asking(questions)], places=places, moments=moments)
    assert len([line for line in told if line.startswith("killed at")]) >= (num_moments + 1) // 2


def write_subjects(folder: Path) -> Path:
    """Five subjects of MMLU, three questions each, so that the next subjects are under way when a chunk is written.

    Questions are so long that each subject is a chunk; the model sees their ends.
    """
    rng = random.Random(2)
    (folder / "val").mkdir(parents=True)
    for subject in "abcde":
        rows = [",".join(" ".join(f"w{rng.randrange(60)}" for _ in range(600)) for _ in range(5)) + ",A" for _ in range(3)]
        (folder / "val" / f"{subject}_val.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.mark.drill
def test_killed_while_the_next_chunks_are_under_way(nf4: Path, tmp_path: Path) -> None:
    words = ["eval=mmlu", "eval.format=csv", "eval.shots=0", f"eval.path={write_subjects(tmp_path / 'mmlu')}"]
    places = [("inside", 2), ("before", 1), ("behind", 0)]
    assert_resumes(tmp_path / "r", [f"ckpt=[base,{nf4}]", *words], places=places, moments=[0.55])
    for file in (tmp_path / "r" / "clean").rglob("items.jsonl"):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert [line["id"] for line in lines] == [f"{subject}/{n}" for subject in "abcde" for n in range(3)]
        assert len({line["logps"]["A"] for line in lines}) == 15


@pytest.mark.drill
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["drawn answers", "perplexity"])
def test_killed_at_ten_random_moments(
    name: str, nf4: Path, questions: Path, stand_in: tuple[Path, Path], tmp_path: Path
) -> None:
    rng = random.Random(name)
    words = asking(questions, "eval.batch_size=1", "eval.temperature=0.7")
    if name == "perplexity":
        words = ["eval=perplexity", f"eval.path={stand_in[1]}", "eval.format=chat", "eval.micro_batch_tokens=64"]
    places = [(rng.choice(PLACES), rng.randint(0, 3)) for _ in range(6)] + [(place, 0) for place in LAST]
    moments = [rng.uniform(0, 1) for _ in range(20)]
    told = assert_resumes(tmp_path / "r", [f"ckpt=[base,{nf4}]", *words], places=places, moments=moments)
    assert len([line for line in told if line.startswith("killed at")]) >= 10, told
