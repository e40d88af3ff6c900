"""A hub that hangs up or says nothing is told in seconds, not waited for."""

from __future__ import annotations

import time
from collections.abc import Iterator

import huggingface_hub
import pytest
from huggingface_hub import constants

from benchmarks.faults.network import server
from fine_tune.errors import EnvironmentProblem
from fine_tune.models import hub


@pytest.fixture(params=[False, True], ids=["hangs up", "silent"])
def came(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with server(silent=request.param) as (port, visitors):
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", f"http://127.0.0.1:{port}")
        yield visitors


def test_the_message_comes_in_seconds(came: list[float]) -> None:
    started = time.monotonic()
    with pytest.raises(EnvironmentProblem, match="the hub cannot be reached") as told:
        hub.resolve_model("nobody/nothing", revision="abcdef12" * 5)
    assert came, "nobody asked the hub"
    assert time.monotonic() - started < 10
    assert told.value.exit_code == 5
