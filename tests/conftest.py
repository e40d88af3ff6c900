from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

# Before anything imports a tokenizer or torch: tests share few cores and never ask the network.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

# Until the tests begin: seven seconds of each worker go to looking through what importing torch and others leaves alive.
gc.disable()

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, tokenizers and small checkpoints."""
    named = os.environ.get("FINE_TUNE_REAL_DATA")
    if not named:
        pytest.skip("FINE_TUNE_REAL_DATA names no folder of real data")
    folder = Path(named).expanduser()
    if not folder.is_absolute():
        folder = (REPOSITORY / folder).resolve()
    if not folder.is_dir():
        pytest.fail(f"FINE_TUNE_REAL_DATA={named}: no such folder")
    return folder


@pytest.fixture
def gpu() -> None:
    """Skip where there is no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let no worker wait for the built-in run that another one is doing: what starts from it comes after other long tests."""
    first, waiting = ("configs", "integration"), ("test_built_in_preferences.py", "test_chat_terminal.py", "test_merge.py")
    items.sort(key=lambda item: 1 if item.path.name in waiting else 0 if item.path.parent.name in first else 2)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Collect garbage again, but look no more at what was imported; it stays until the end."""
    gc.freeze()
    gc.enable()
