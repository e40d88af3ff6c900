"""Fine-tune a language model: `python train.py [group=option ...] [key=value ...]`.

With no words, the built-in job. The same as `fine-tune train`.
"""

from __future__ import annotations

import sys

from fine_tune.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
