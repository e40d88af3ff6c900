"""Lines and keys, at a terminal and without one."""

from __future__ import annotations

import io
import os
import pty
import select
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from fine_tune.chat.session import CHOICES
from fine_tune.chat.terminal import Terminal


class AtTerminal:
    """A terminal whose other end the test holds."""

    def __init__(self) -> None:
        self.keyboard, other = pty.openpty()
        self.stdin: TextIO = os.fdopen(other, "r", encoding="utf-8", closefd=False)
        self.stdout: TextIO = os.fdopen(other, "w", encoding="utf-8")
        self.terminal = Terminal(self.stdin, self.stdout)

    def type_when(self, prompt: str, *chunks: bytes) -> threading.Thread:
        """Wait until the prompt stands there, then type each chunk at once, as a key or a paste arrives."""

        def typing() -> None:
            seen = ""
            while not seen.endswith(prompt):
                assert select.select([self.keyboard], [], [], 10)[0]
                seen += os.read(self.keyboard, 1024).decode()
            for chunk in chunks:
                os.write(self.keyboard, chunk)
                time.sleep(0.05)

        thread = threading.Thread(target=typing)
        thread.start()
        return thread

    def flags(self) -> int:
        return int(termios.tcgetattr(self.keyboard)[3])


@pytest.fixture
def at_terminal() -> Iterator[AtTerminal]:
    found = AtTerminal()
    yield found
    found.stdout.close()
    os.close(found.keyboard)


@pytest.mark.parametrize(
    ("typed", "key"),
    [
        ([b"2"], "2"),
        ([b"x", b"="], "="),
        ([b"\x1b[1~", b"\x1b[A", b"\x1bOP", b"s"], "s"),
        ([b"\x1b[1;2Cs"], "s"),
        ([b"12"], None),
        ([b"pasted 1 text\n"], None),
        ([], None),
    ],
)
def test_a_key_counts_without_enter_and_parts_of_other_keys_do_not(
    typed: list[bytes], key: str | None, at_terminal: AtTerminal
) -> None:
    assert at_terminal.terminal.interactive
    # Ctrl-D ends what did not decide.
    thread = at_terminal.type_when("better> ", *typed, b"\x04")
    assert at_terminal.terminal.key("better> ", CHOICES) == key
    thread.join()


def test_a_key_pressed_before_the_question_is_no_answer_to_it(at_terminal: AtTerminal) -> None:
    os.write(at_terminal.keyboard, b"1")
    thread = at_terminal.type_when("better> ", b"2")
    assert at_terminal.terminal.key("better> ", CHOICES) == "2"
    thread.join()


def test_the_terminal_gets_its_settings_back(at_terminal: AtTerminal) -> None:
    before = at_terminal.flags()
    assert before & termios.ECHO
    during = []

    def stopped() -> None:
        with at_terminal.terminal.silent():
            during.append(at_terminal.flags())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    # Nothing but the echo is off: Ctrl-C still is a signal.
    assert during == [before & ~termios.ECHO]
    assert at_terminal.flags() == before
    thread = at_terminal.type_when("better> ", b"1")
    at_terminal.terminal.key("better> ", CHOICES)
    thread.join()
    assert at_terminal.flags() == before


def test_without_a_terminal_lines_are_read_one_by_one() -> None:
    shown = io.StringIO()
    terminal = Terminal(io.StringIO("one\r\nx\n 2 \nlast"), shown)
    assert not terminal.interactive
    assert not terminal.wide
    with terminal.silent():
        assert terminal.line("> ") == "one"
    assert terminal.key("better> ", CHOICES) == "2"
    assert [terminal.line("> "), terminal.line("> ")] == ["last", None]
    assert shown.getvalue() == "> one\nbetter> x\n(one of 1 2 = s)\nbetter>  2 \n> last\n"


def test_bytes_that_are_no_text_and_text_that_the_terminal_lacks_do_not_end_the_chat(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"caf\xe9?\n")
    with (tmp_path / "in").open(encoding="utf-8") as stdin, (tmp_path / "out").open("w", encoding="ascii") as stdout:
        terminal = Terminal(stdin, stdout)
        assert terminal.line("") == "caf\ufffd?"
        terminal.write("\u4e2d")
    assert (tmp_path / "out").read_bytes() == b"caf\\ufffd?\n\\u4e2d"
