"""Two answers side by side: what is drawn while they grow, and what stays."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from fine_tune.chat import display as module
from fine_tune.chat.display import SideBySide
from fine_tune.chat.speaker import Answer


def screen(width: int = 100, height: int = 12) -> tuple[SimpleNamespace, io.StringIO]:
    shown = io.StringIO()
    console = Console(
        file=shown, force_terminal=True, width=width, height=height, color_system=None, legacy_windows=False
    )
    return SimpleNamespace(console=console), shown


def drawn(shown: io.StringIO) -> list[list[str]]:
    """The lines of every picture that was drawn, one after the other."""
    # A new picture begins where the last one is erased.
    pictures = re.split(r"\r?(?:\x1b\[1A|\x1b\[2K)+", shown.getvalue())
    return [
        [line.rstrip() for line in re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", one).split("\n")] for one in pictures if one
    ]


@pytest.fixture(autouse=True)
def always_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REDRAW_SECONDS", 0.0)


def test_the_second_column_grows_beside_the_first() -> None:
    terminal, shown = screen(width=120)
    columns = SideBySide(terminal, ["1 base", "2 sft"])  # type: ignore[arg-type]
    columns.write(0, "left [bold]one[/bold]")
    columns.end(0, Answer("left [bold]one[/bold]", "limit"))
    columns.write(1, "right")
    columns.write(1, " two")
    columns.end(1, Answer("right two", "whole"))
    columns.close()
    pictures = drawn(shown)
    assert all(picture[0].split() == ["1", "base", "2", "sft"] for picture in pictures)
    rows = [" | ".join(re.split(r" {2,}", picture[1])) for picture in pictures if len(picture) > 1 and picture[1]]
    note = "left [bold]one[/bold] (cut off at max_new_tokens)"
    steps = ["left [bold]one[/bold]", note, f"{note} | right", f"{note} | right two"]
    assert list(dict.fromkeys(rows)) == steps


def test_while_the_answer_is_higher_than_the_screen_its_end_is_shown_and_at_last_everything() -> None:
    terminal, shown = screen(height=8)
    columns = SideBySide(terminal, ["1 base", "2 sft"])  # type: ignore[arg-type]
    lines = [f"line {number}" for number in range(20)]
    for line in lines:
        columns.write(0, f"{line}\n")
    before = drawn(shown)[-1]
    assert before[0].startswith("1 base")
    assert "line 19" in before
    assert "line 10" not in before
    assert len(before) <= 8
    columns.end(0, Answer("\n".join(lines), "whole"))
    columns.close()
    assert [line for line in drawn(shown)[-1] if line.startswith("line")] == lines


def test_hostile_text_does_not_act_in_a_column() -> None:
    terminal, shown = screen()
    columns = SideBySide(terminal, ["1 base", "2 sft"])  # type: ignore[arg-type]
    columns.write(1, "\x1b]0;mine\x07\u202e")
    columns.end(1, Answer("\x1b]0;mine\x07\u202e", "whole"))
    columns.close()
    assert "\\x1b]0;mine\\x07\\u202e" in shown.getvalue()
    assert not re.search("\x1b\\]|\x07|\u202e", shown.getvalue())
