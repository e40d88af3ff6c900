"""`train --help`: what it shows, what it refuses, and that nothing heavy is loaded for it or for a refusal."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fine_tune.errors import ConfigError
from fine_tune.showing import help_text

# Each of these takes longer to import than the whole answer may.
HEAVY = ("torch", "lightning", "transformers", "peft", "datasets", "numpy", "pandas", "tokenizers", "rich", "matplotlib")


@pytest.mark.parametrize("words", [["--help"], ["optim.lrr=1"], pytest.param(["-h", "model=llama2_7b"], marks=pytest.mark.drill)])
def test_the_answer_needs_nothing_heavy(words: list[str]) -> None:
    code = (
        "import io, sys, contextlib\n"
        "from fine_tune.cli.train import main\n"
        "said = io.StringIO()\n"
        "with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):\n"
        f"    code = main({words})\n"
        f"print(code, len(said.getvalue()) > 50, [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == f"{2 if words == ['optim.lrr=1'] else 0} True []"


def test_groups_and_the_composed_config_are_shown() -> None:
    shown = help_text(["model=llama2_7b", "data=oasst1", "optim.lr=3e-5", "data.max_seq_len=512"])
    assert "objective: dpo, sft\n" in shown
    assert "method: dora, full, lora, qlora, qlora8\n" in shown
    assert "  lr: 3.0e-05\n" in shown
    assert "  max_seq_len: 512\n" in shown
    assert "  name: llama2_7b\n" in shown


def test_a_value_that_is_still_missing_is_shown_open() -> None:
    assert "  path: ???\n" in help_text(["data=chat"])


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("optimm.lr=1", "optimm.lr: unknown key. Did you mean optim.lr?"),
        ("model=nope", "model = nope: no such option"),
        ("method", "method: not key=value"),
        ("optim.lrr=1", "optim.lrr: unknown key. Did you mean optim.lr?"),
    ],
)
def test_words_that_name_nothing_are_refused(word: str, problem: str) -> None:
    with pytest.raises(ConfigError, match="problem") as refused:
        help_text([word])
    assert problem in str(refused.value)
