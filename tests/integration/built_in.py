"""The job of `python train.py` as a user starts it, and its base as other libraries load it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def built_in_job(repository: Path, run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run train.py as a user does, on the CPU; rows that an earlier version prepared on this machine play no part."""
    command = [sys.executable, "train.py", f"run_dir={run_dir}", "trainer=cpu", *more]
    environment = {**os.environ, "FINE_TUNE_CACHE": str(run_dir.parent / "cache")}
    return subprocess.run(
        command, cwd=repository, capture_output=True, text=True, timeout=280, env=environment, check=False
    )


def load_quantised(repository: Path) -> Any:
    """The built-in base as transformers and bitsandbytes load it, with nothing of ours."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        str(repository / "fine_tune/world/base"), dtype=torch.float32, quantization_config=nf4
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model
