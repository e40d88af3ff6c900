"""Layers share what is compiled, and a graph's inputs are never marked as something to compute again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch.fx import Graph
from torch.utils.checkpoint import CheckpointPolicy

from fine_tune.models import compiler
from fine_tune.models.compiler import InputsStay, compiled


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.drill
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layers_of_one_kind_and_inputs_of_any_length_take_one_graph(fresh: None) -> None:
    layers = [compiled(Twice()._call_impl) for _ in range(3)]
    for length in (5, 9, 2):
        for layer in layers:
            assert torch.equal(layer(torch.ones(length)), torch.full((length,), 2.0))
    assert counters["stats"]["unique_graphs"] == 1


def test_layers_are_compiled_with_equal_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else torch compiles each of them anew."""
    seen: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda step, **how: seen.append(how) or step)
    compiled(Twice()._call_impl)
    compiled(Twice()._call_impl)
    assert seen[0] == seen[1]
    assert isinstance(seen[0]["options"]["joint_custom_post_pass"], InputsStay)


def marked(mark: CheckpointPolicy) -> Graph:
    graph = Graph()
    rows = graph.placeholder("rows")
    drawn = graph.call_function(torch.rand, (rows,))
    graph.output(drawn)
    for node in (rows, drawn):
        node.meta["recompute"] = mark
    return graph


@pytest.mark.parametrize("mark", [CheckpointPolicy.PREFER_RECOMPUTE, CheckpointPolicy.MUST_RECOMPUTE])
def test_the_mark_is_taken_off_inputs_and_off_nothing_else(mark: CheckpointPolicy) -> None:
    graph = marked(mark)
    InputsStay()(graph)
    rows, drawn, _ = graph.nodes
    assert "recompute" not in rows.meta
    assert drawn.meta["recompute"] == mark


def test_an_input_that_is_to_be_kept_keeps_its_mark() -> None:
    graph = marked(CheckpointPolicy.MUST_SAVE)
    InputsStay()(graph)
    assert next(iter(graph.nodes)).meta["recompute"] == CheckpointPolicy.MUST_SAVE


def test_torchs_cache_knows_the_pass_by_its_source() -> None:
    assert InputsStay().uuid() == get_hash_for_files((compiler.__file__,))
    assert InputsStay().uuid() != get_hash_for_files((__file__,))
