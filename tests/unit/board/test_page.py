"""The page: what it shows, that it sorts and filters in a browser, and that nothing in it comes alive."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from fine_tune.board.board import make_board
from fine_tune.board.terminal import render, say
from fine_tune.cli.board import main
from fine_tune.report.visible import visible

from .conftest import Page, config, held_out, put, write_job, write_run, write_sweep

PAYLOADS = {
    "script": "<script>document.title='hit'</script>",
    "image": "<img src=x onerror=\"document.title='hit'\">",
    "attribute": '" onmouseover="alert(1)" x="',
    "single quote": "' autofocus onfocus='alert(1)",
    "ends": "</script></style></textarea></title></svg><svg onload=alert(1)>",
    "statement": "{{ 7 * 7 }}{% include 'x' %}{# x #}",
    "format": "{0.__class__} {} %s ${oc.env:HOME}",
    "rich": "[red]x[/red] [link=http://example.com]y[/link]",
    "colours": "\x1b[31mred\x1b[0m\x1b]8;;http://example.com\x07x\x9b2J",
    "bidi": "user\u202e\u2066cod.exe\u2069 \u200f\u200b\ufeff\U000e0041",
    "formula": "=HYPERLINK(1)",
    "surrogate": "\ud800x\u2028",
}
ACTS = {"a", "img", "iframe", "object", "embed", "link", "form", "base", "foreignobject", "use", "image", "animate"}
LAYOUT = {"\n", "\t"}


def hostile_sweep(root: Path, word: str) -> Path:
    """A sweep in which everything that can be text is ``word``."""
    place = root / "sweep-00000000"
    sweep = {
        "command": f"train.py -m x={word}",
        "swept": ["method.rank", "data.path", word],
        "metric": word,
        "direction": word,
        word: word,
    }
    put(place / "sweep.json", sweep)
    for number in range(3):
        name = f"run{number}"
        cfg = config(method__rank=8 * (number + 1), method__name=f"{word}{number}", seed=number)
        summary: dict[str, Any] = dict.fromkeys(
            ("run_name", "loss_unit", "device", "model", "mfu", "steps", word), word
        )
        run = write_run(
            root / name,
            cfg | {"data": {"path": f"{word}{number}"}, word: number},
            command=f"x {word}",
            **summary,
            exact_match=0.5,
        )
        held_out(run, 0.5, 10)
        write_job(place, number, [f"method.rank={8 * (number + 1)}", f"data.path={word}{number}"], name)
    failed = {"status": "failed", "exit_code": 3, "error": word, "reason": word}
    write_job(place, 3, [f"data.path={word}", word, "method.rank=1"], word, **failed)
    write_job(place, 4, [], None, status="pruned", reason=word)
    return place


def cells(html: str) -> list[list[str]]:
    """The rows of the table."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", html[html.index("<tbody>") : html.index("</tbody>")], re.DOTALL)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", row, re.DOTALL)] for row in rows]


def acted(page: Path, steps: str, browse: Callable[[Path], str]) -> list[list[str]]:
    """What a browser shows after each ``say(column)`` of a script that is put into a copy of a page.

    The copy's policy allows that script besides the page's own.
    """
    script = (
        'const heads = [...document.querySelectorAll(".ranks th button")];'
        "const place = (name) => heads.findIndex((head) => head.textContent === name);"
        "const click = (name) => heads[place(name)].click();"
        'const field = document.querySelector("#filter");'
        'const type = (text) => { field.value = text; field.dispatchEvent(new Event("input")); };'
        'const shown = () => [...document.querySelector(".ranks").tBodies[0].rows].filter((row) => row.offsetParent);'
        "const log = [];"
        "const say = (name) => log.push(shown().map((row) => row.cells[place(name)].textContent.trim()));"
        f"{steps} document.body.dataset.log = btoa(JSON.stringify(log));"
    )
    html = page.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert html.count("script-src ") == html.count("</body>") == 1
    html = html.replace("script-src ", f"script-src 'sha256-{digest}' ").replace(
        "</body>", f"<script>{script}</script></body>"
    )
    copy = page.with_name("acted.html")
    copy.write_text(html, encoding="utf-8")
    found = re.search('data-log="([^"]*)"', browse(copy))
    assert found, "the script did not come to its end"
    log: list[list[str]] = json.loads(base64.b64decode(found[1]))
    return log


def test_the_table_of_the_page(sweep: Path) -> None:
    rows = cells(make_board(sweep, out=sweep).page.read_text(encoding="utf-8"))
    assert rows[2] == ["3", "r8-a32", "8", "32", "0.750", "0.686 to 0.805", "0.0800", "-", "-", "11.0 s", "finished"]
    assert rows[5][1] == "r16-a32MemoryExhausted: out of memory at 11 GB"
    assert (rows[5][-1], rows[6][0], rows[6][2]) == ("failed, exit 7", "-", "0")


def test_the_page_runs_its_own_script_and_no_other(sweep: Path, browse: Callable[[Path], str]) -> None:
    page = make_board(sweep, out=sweep).page
    html = page.read_text(encoding="utf-8")
    page.write_text(html.replace("</body>", "<script>document.title = 'hit'</script></body>"), encoding="utf-8")
    dom = browse(page)
    assert ">7 of 7 shown<" in dom
    assert "<title>sweep-0badf00d - fine_tune board</title>" in dom


def test_a_click_sorts_by_number_and_a_second_one_turns_it(sweep: Path, browse: Callable[[Path], str]) -> None:
    put(sweep.parent / "r8-a16" / "summary.json", {"exact_match": 0.5, "train_seconds": 150})
    steps = (
        'say("run"); click("train time"); say("train time");'
        'click("method.rank"); say("method.rank"); click("exact_match"); say("exact_match"); click("exact_match");'
        'say("exact_match"); click("#"); say("run"); log.push(heads.map((h) => h.parentElement.getAttribute("aria-sort")));'
    )
    page = make_board(sweep, out=sweep).page
    first, times, ranks, small, large, again, sorts = acted(page, steps, browse)
    assert [name[:7] for name in first] == ["r16-a16", "r64-a16", "r8-a32", "r8-a16", "r64-a32", "r16-a32", "job 7Co"]
    assert times == ["11.0 s", "12.0 s", "14.0 s", "15.0 s", "2.5 min", "-", "-"]
    assert ranks == ["0", "8", "8", "16", "16", "64", "64"]
    # What is missing stays below, whichever way is up.
    assert small == ["0.250", "0.500", "0.750", "0.900", "0.900", "-", "-"]
    assert large == ["0.900", "0.900", "0.750", "0.500", "0.250", "-", "-"]
    # Equal ones keep the order that they had.
    assert sorted(again[:2]) == ["r16-a16", "r64-a16"]
    assert again[2:5] == first[2:5]
    assert (sorts[0], set(sorts[1:]), len(sorts)) == ("ascending", {None}, 11)


def test_words_filter_and_come_back(sweep: Path, browse: Callable[[Path], str]) -> None:
    steps = (
        'type("FAILED memory"); say("run"); say("status"); type("zzz"); say("run"); type(""); click("run"); say("run");'
    )
    page = make_board(sweep, out=sweep).page
    run, status, none, back = acted(page, steps, browse)
    assert (run, status, none) == (["r16-a32MemoryExhausted: out of memory at 11 GB"], ["failed, exit 7"], [])
    assert [name[:7] for name in back] == ["job 7Co", "r8-a16", "r8-a32", "r16-a16", "r16-a32", "r64-a16", "r64-a32"]


def test_without_a_script_the_page_is_whole(sweep: Path) -> None:
    page = Page(make_board(sweep, out=sweep).page.read_text(encoding="utf-8"))
    assert [a for tag, a in page.elements if tag == "div" and a.get("class") == "tools"] == [
        {"class": "tools", "hidden": None}
    ]
    assert page.pieces.count("python train.py seed=7 method.rank=16 method.alpha=16") == 1


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Page:
    place = hostile_sweep(tmp_path_factory.mktemp("harmless") / "runs", "harmless")
    return Page(make_board(place, out=place).page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PAYLOADS)
def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path, harmless: Page, name: str) -> None:
    place = hostile_sweep(tmp_path / "runs", PAYLOADS[name])
    board = make_board(place, out=place)
    html = board.page.read_text(encoding="utf-8")
    page = Page(html)
    assert {c for c in html if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} <= LAYOUT
    assert not {tag for tag, _ in page.elements} & ACTS
    assert page.structure == harmless.structure
    assert page.code == harmless.code
    # The error's class and reason, on one line.
    word = visible(" ".join(PAYLOADS[name].split()))
    assert f"{word}: {word}" in page.pieces
    text = (place / "board.csv").read_text(encoding="utf-8")
    assert all(c.isprintable() or c == "\n" for c in text)
    assert not re.search(r'(^|,)"?[=@]', text, re.MULTILINE)
    stream = io.StringIO()
    say(board, Console(file=stream, width=400, force_terminal=True, color_system="truecolor"))
    said = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert word in said
    assert all(c.isprintable() or c == "\n" for c in said)


def test_every_part_of_a_hostile_page_was_there(harmless: Page) -> None:
    assert {"The best run", "All runs", "Settings and results", "Every run as a line"} <= set(harmless.pieces)
    assert {"polyline", "rect"} <= {tag for tag, _ in harmless.elements}


def test_a_browser_makes_nothing_of_hostile_text(tmp_path: Path, browse: Callable[[Path], str]) -> None:
    place = hostile_sweep(
        tmp_path / "runs", "".join(PAYLOADS[name] for name in ("image", "ends", "script", "attribute"))
    )
    dom = browse(make_board(place, out=place).page)
    assert "<title>sweep-00000000 - fine_tune board</title>" in dom
    assert "<img" not in dom
    assert "5 of 5 shown" in dom


def test_the_policy_names_this_style_and_this_script(sweep: Path) -> None:
    page = Page(make_board(sweep, out=sweep).page.read_text(encoding="utf-8"))
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    style, script = (
        base64.b64encode(hashlib.sha256(page.code[name].encode()).digest()).decode() for name in ("style", "script")
    )
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; base-uri 'none'; form-action 'none'"
    )
    assert not re.search(r"url\(|@import|https?:|innerHTML|eval\(", page.code["style"] + page.code["script"])


def test_the_terminal_drops_columns_before_it_folds_them(sweep: Path) -> None:
    board = make_board(sweep, out=sweep)
    wide = [str(column.header) for column in render(board, 200).columns]
    assert wide == [
        "#", "run", "rank", "alpha", "exact_match", "95 % interval", "val loss", "trained parameters", "tokens/s",
        "train time", "status",
    ]  # fmt: skip
    assert [str(column.header) for column in render(board, 76).columns] == [
        "#", "run", "rank", "alpha", "exact_match", "train time", "status",
    ]  # fmt: skip
    assert (
        str(render(board, 72).caption).splitlines()[0]
        == "r16-a32: failed, exit 7: MemoryExhausted: out of memory at 11 GB"
    )


def test_a_narrow_terminal_does_not_break_the_command(sweep: Path) -> None:
    stream = io.StringIO()
    board = make_board(sweep, out=sweep)
    say(board, Console(file=stream, width=30))
    lines = stream.getvalue().splitlines()
    assert "python train.py seed=7 method.rank=16 method.alpha=16" in lines
    assert lines[-1] == f"the page: {sweep / 'board.html'}"


def test_the_verb_writes_three_files_and_says_where(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep), "metric=final_loss", f"out={sweep.parent / 'there'}"]) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert "7 runs by final_loss, lower is better" in said
    assert f"the page: {sweep.parent / 'there' / 'board.html'}" in said
    assert sorted(file.name for file in (sweep.parent / "there").iterdir()) == ["board.csv", "board.html", "board.json"]
    assert main([str(sweep.parent / "r8-a16"), str(sweep.parent / "r8-a32")]) == 0
    assert (sweep.parent / "board.html").is_file()
    # The board's own files are no runs, and what was not finished being written is none.
    write_run(sweep.parent / ".tmp-1-run", config(), exact_match=1.0)
    capsys.readouterr()
    assert main([str(sweep.parent)]) == 0
    assert "runs: 6 runs by exact_match" in capsys.readouterr().out
    # No folder holds these two, so nothing is written anywhere until one is named.
    other = write_run(sweep.parent.parent / "other" / "run", config(), exact_match=1.0)
    assert main([str(sweep.parent / "r8-a16"), str(other)]) == 2
    assert "out: no value. These lie in different folders" in capsys.readouterr().err


def test_wrong_words_are_told_together_and_without_torch(sweep: Path) -> None:
    words = [str(sweep), "metrik=x", "--all", "metric=", "nowhere"]
    code = (
        f"import sys\nfrom fine_tune.cli.board import main\ncode = main({words!r})\n"
        "print(code, [m for m in ('torch', 'lightning', 'transformers', 'hydra') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "2 []"
    assert done.stderr.startswith("4 problem(s)")
    assert "nowhere: no such folder" in done.stderr


def test_a_board_needs_no_torch(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path)
    code = (
        f"import sys\nfrom fine_tune.cli.board import main\nmain([{str(sweep)!r}])\n"
        "print([m for m in ('torch', 'hydra', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"


def test_names_of_folders_are_text(tmp_path: Path) -> None:
    for name in ("<b>x", "\u202egpj", "[red]"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(config(seed=len(name))), encoding="utf-8")
        put(folder / "summary.json", {"exact_match": 0.5})
    page = Page(make_board(tmp_path, out=tmp_path).page.read_text(encoding="utf-8"))
    assert {"<b>x", "\\u202egpj", "[red]"} <= set(page.pieces)
