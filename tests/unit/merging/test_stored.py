"""A weight read from a file and quantised alone is bit for bit the one that loading the model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

from fine_tune.merging.skeleton import skeleton
from fine_tune.merging.source import Source
from fine_tune.merging.stored import as_trained
from fine_tune.models.base import BaseSpec, load_base

from .conftest import write_model

CPU = torch.device("cpu")
METHODS: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4, "quant_type": "nf4", "double_quant": True},
    "nf4, single": {"bits": 4, "quant_type": "nf4", "double_quant": False},
    "fp4": {"bits": 4, "quant_type": "fp4", "double_quant": True},
    "int8": {"bits": 8, "quant_type": None, "double_quant": False},
}


def loaded(folder: Path, method: dict[str, Any], dtype: torch.dtype) -> Any:
    kind = {"quant_type": method["quant_type"] or "nf4", "double_quant": method["double_quant"]}
    return load_base(BaseSpec(folder, method["bits"], dtype, torch.float32, CPU, **kind))


def values(module: Any) -> Tensor:
    state = getattr(module.weight, "quant_state", None)
    if state is not None:
        state.dtype = torch.float32
    return dequantize_module_weight(module).detach().float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_every_weight_is_the_one_that_loading_gives(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    settings = METHODS[method]
    model, source = loaded(folder, settings, dtype), Source(folder)
    quantised = skeleton(folder, settings, trust_remote_code=False).quantised
    # Seven layers in each of two blocks; the head stays as it is.
    assert len(quantised) == 14
    assert "lm_head" not in quantised
    for name in source.files:
        module, _, kind = name.rpartition(".")
        mine = as_trained(source.get(name), dtype, CPU, quantised.get(module) if kind == "weight" else None)
        theirs = values(model.get_submodule(module))
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs), name
        if module in quantised:
            assert not torch.equal(mine, source.get(name).float()), f"{name} was not quantised"


def test_numbers_that_are_no_weights_stay(tmp_path: Path) -> None:
    table = torch.arange(5)
    assert as_trained(table, torch.bfloat16, CPU, None) is table
