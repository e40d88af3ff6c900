"""The base folder of the model tests, and two threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ..models.conftest import base_folder as base_folder


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
