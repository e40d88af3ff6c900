"""Evaluate checkpoints: `python evaluate.py ckpt=<run, checkpoint, adapter, model or base> eval=<name> [key=value ...]`.

The same as `fine-tune evaluate`.
"""

from __future__ import annotations

import sys

from fine_tune.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
