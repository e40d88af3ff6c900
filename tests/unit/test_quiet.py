"""A run goes on where nobody reads its output any more."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import os, rich
from fine_tune.quiet import quiet_libraries
quiet_libraries()
for number in range(2000):
    rich.get_console().print("a line " * 20)
os.write(2, b"still here")
"""


def test_a_reader_that_leaves_does_not_end_the_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), told) == (0, b"still here")
