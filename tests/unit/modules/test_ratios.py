"""Means kept as sums: exact over uneven parts, over ranks, and over many small terms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fine_tune.modules import ratios as ratios_file
from fine_tune.modules.ratios import Ratios

CPU = torch.device("cpu")


def test_parts_of_any_size_add_up_to_the_mean_of_all() -> None:
    ratios = Ratios(["loss", "tokens"], CPU)
    for values in ([1.0, 2.0, 3.0, 4.0], [10.0]):
        ratios.add("loss", torch.tensor(values).sum(), len(values))
        ratios.add("tokens", torch.tensor(values).sum(), torch.tensor(2 * len(values)))
    assert ratios.means() == {"loss": 4.0, "tokens": 2.0}
    assert ratios.means()["loss"] != (2.5 + 10.0) / 2, "the control: a mean of the parts' means"


def test_a_name_without_anything_is_left_out_and_no_names_are_no_metrics() -> None:
    ratios = Ratios(["rewards", "kl"], CPU)
    ratios.add("rewards", torch.tensor(0.0), 3)
    assert ratios.means() == {"rewards": 0.0}
    assert Ratios((), CPU).means() == {}


def test_a_name_that_was_not_announced_is_refused() -> None:
    """Ranks that disagree on the names would add up different metrics."""
    with pytest.raises(ValueError, match="not in tuple"):
        Ratios(["loss"], CPU).add("los", torch.tensor(1.0), 1)


def test_small_terms_are_not_lost_in_a_large_sum() -> None:
    ratios, narrow = Ratios(["loss"], CPU), torch.tensor(2.0**24)
    ratios.add("loss", narrow, 1)
    for _ in range(8):
        ratios.add("loss", torch.tensor(1.0), 1)
        narrow = narrow + torch.tensor(1.0)
    assert ratios.means()["loss"] == (2.0**24 + 8) / 9
    assert narrow.item() == 2.0**24, "the control: float32 forgets all eight"


def test_no_graph_is_kept() -> None:
    ratios, weight = Ratios(["loss"], CPU), torch.ones((), requires_grad=True)
    ratios.add("loss", 3 * weight, 1)
    assert not ratios.sums.requires_grad
    assert ratios.means() == {"loss": 3.0}


def test_ranks_are_added_up_and_asking_twice_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank without any work takes the others' means."""
    others = torch.tensor([[6.0, 3.0], [1.0, 0.0]], dtype=torch.float64)

    def all_reduce(values: Tensor) -> Tensor:
        return values.add_(others.view_as(values))

    monkeypatch.setattr(ratios_file, "sum_scalars", all_reduce)
    ratios = Ratios(["loss", "kl"], CPU)
    assert ratios.means() == {"loss": 2.0}
    ratios.add("loss", torch.tensor(0.0), 1)
    assert ratios.means() == ratios.means() == {"loss": 1.5}
