import base64
import hashlib
import html
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fine_tune.audit.account import Account
from fine_tune.audit.audit import Audit, advice, refuse
from fine_tune.audit.checks import Check
from fine_tune.audit.page import HEAD, TAIL, painted, render, write_page
from fine_tune.audit.rows import Part, Shown, State, Token
from fine_tune.audit.terminal import show
from fine_tune.data.ledger import Ledger
from fine_tune.errors import DataError

HOSTILE = "<script>alert(1)</script>\u202e\x1b[31m[bold]&amp;'\""


def token(text: str, state: State = "masked", number: int = 7, *, special: bool = False) -> Token:
    return Token(text, number, state, special)


@pytest.fixture
def found() -> Audit:
    ledger = Ledger(max_seq_len=64)
    ledger.of("chat", "train").keep(30, 12)
    ledger.of("chat", "train").drop("too_long", HOSTILE, 90)
    ledger.set_lengths([30, 90])
    tokens = (
        token("<s>", number=1, special=True),
        token(HOSTILE),
        token("yes\nno", "learned", 9),
        token("gone", "cut"),
    )
    return Audit(
        facts=(("data", HOSTILE), ("model", "m")),
        checks=(Check("rows", "failed", HOSTILE), Check("tables", "passed", "same"), Check("room", "look", "little")),
        account=Account(2, 42, 12, 2, 1, 0, 0, (), (), 0, ((3, (9,)),), 4),
        ledger=ledger,
        rows=(
            Shown(HOSTILE, "chat", "train", "longest", (Part("", tokens),), 3, 1, 1, differences=()),
            Shown("gone", "chat", "train", "dropped: too_long", (), note="turned away"),
            Shown(
                "p", "chat", "train", "random", tuple(Part(t, tokens[1:3]) for t in ("prompt", "chosen", "rejected"))
            ),
            Shown("d", "chat", "train", "random", (Part("", tokens),), differences=("previews, answer 1: apart",)),
        ),
        frequent=((3, 0.75, HOSTILE),),
    )


def printed(found: Audit, width: int = 100) -> str:
    stream = StringIO()
    show(found, Console(file=stream, width=width))
    return stream.getvalue()


def test_nothing_of_the_data_acts_in_the_page(found: Audit) -> None:
    page = render(found, command=HOSTILE)
    assert "<script" not in page
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 7
    assert not re.search(r"(src|href|url)\s*[=(]", page)
    style = re.search(r"<style>(.*)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style.group(1).encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in page
    assert "style=" not in page


def test_the_page_says_what_was_found(found: Audit) -> None:
    page = html.unescape(render(found, command="fine-tune audit"))
    for said in (
        "1 of 3 checks failed", "75.0%", "28.6%", "50.0%", "raise data.max_seq_len", "turned away", "asked for in the same ids",
        "previews, answer 1: apart", "<h4>chosen</h4>", "<h4>rejected</h4>",
    ):  # fmt: skip
        assert said in page, said
    assert page.count("asked for in other ids") == 1
    sound = Audit(found.facts, found.checks[1:], found.account, found.ledger, (), ())
    assert "All 2 checks passed, some are for you to judge" in render(sound, command="")


def test_tokens_of_one_state_stand_together() -> None:
    said = painted(
        [token("<s>", number=1, special=True), token("a<"), token("b\n", "learned", 8), token("c", "cut", 9)]
    )
    assert said == (
        "<span class='m'><i class=x title=1>&lt;s&gt;</i><i title=7>a&lt;</i></span>"
        "<span class='l'><i title=8>b<u></u>\n</i></span><span class='c'><i title=9>c</i></span>"
    )
    assert painted([]) == ""


def test_of_a_long_row_both_ends_are_shown() -> None:
    tokens = [token(f"{n} ", number=n) for n in range(HEAD + TAIL + 3)]
    said = painted(tokens)
    shown = [int(number) for number in re.findall(r"title=(\d+)", said)]
    assert shown == [*range(HEAD), *range(HEAD + 3, HEAD + TAIL + 3)]
    assert "> 3 more tokens <" in said
    assert said.count("<span") == said.count("</span>") == 2
    assert "more tokens" not in painted(tokens[: HEAD + TAIL])


def test_the_page_is_one_whole_file(found: Audit, tmp_path: Path) -> None:
    write_page(found, tmp_path / "new" / "audit.html", command="c")
    assert (tmp_path / "new" / "audit.html").read_text(encoding="utf-8") == render(found, command="c")


def test_nothing_of_the_data_acts_on_the_terminal(found: Audit) -> None:
    said = printed(found, 140)
    assert "\x1b[31m" not in said
    assert "\u202e" not in said
    # What would be markup is text.
    assert said.count("\\u202e\\x1b[31m[bold]") >= 6


def test_the_terminal_says_what_was_found(found: Audit) -> None:
    said = printed(found, 140)
    for line in ("FAIL rows", "look room", "dropped: too_long", "turned away", "[rejected]", "3 75.0%"):
        assert line in re.sub(r" +", " ", said), line
    assert re.search(r"30 to +35 #{40} 1\n", said)


def test_colours_tell_the_states(found: Audit) -> None:
    stream = StringIO()
    show(found, Console(file=stream, width=200, force_terminal=True, color_system="standard"))
    assert "\x1b[1;32myes" in stream.getvalue()
    assert "\x1b[9;31mgone" in stream.getvalue()
    assert "\x1b[4;90m<s>" in stream.getvalue()


def test_a_failed_check_is_an_error_with_exit_code_3(found: Audit) -> None:
    with pytest.raises(DataError, match=r"audit: 1 of 3 checks failed:\n  - rows: <script>") as refused:
        refuse(found)
    assert refused.value.exit_code == 3
    refuse(Audit(found.facts, found.checks[1:], found.account, found.ledger, (), ()))


def test_advice_is_the_ledgers_own(found: Audit) -> None:
    assert [advice(row)[:22] for row in found.rows] == ["", "raise data.max_seq_len", "", ""]
