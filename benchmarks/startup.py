"""Time how long train.py takes to answer `--help` and a wrong config, as a user waits for it.

    python benchmarks/startup.py --runs 9

Prints the median and the worst of the runs, in seconds from start to end of the process, after one that is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
# Words and the exit code that answers them.
ASKED = {"--help": 0, "trainr.max_steps=3": 2}


def seconds(word: str, code: int) -> float:
    """Run train.py with one word and return how long it took."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, str(TRAIN), word], capture_output=True, text=True, check=False)
    took = time.perf_counter() - started
    if done.returncode != code:
        raise RuntimeError(f"{word}: exit code {done.returncode}, not {code}: {done.stderr[-300:]}")
    return took


def main() -> None:
    """Time each word and print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    for word, code in ASKED.items():
        seconds(word, code)
        found = [seconds(word, code) for _ in range(args.runs)]
        print(f"train.py {word:<20} median {statistics.median(found):.2f} s, worst {max(found):.2f} s of {args.runs} runs")


if __name__ == "__main__":
    main()
