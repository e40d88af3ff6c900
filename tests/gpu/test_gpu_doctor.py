"""The doctor on a GPU: 4-bit arithmetic there is that of float64."""

import pytest
import torch

from fine_tune.doctor.devices import device_findings
from fine_tune.doctor.four_bits import PRODUCT, QUANTISED, measure

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]


@pytest.mark.parametrize("dtype", list(PRODUCT))
def test_bitsandbytes_is_sound(dtype: torch.dtype) -> None:
    errors = measure(torch.device("cuda"), dtype)
    assert errors["nf4"] <= QUANTISED
    assert max(errors["forward"], errors["backward"]) <= PRODUCT[dtype]


def test_the_gpu_is_healthy() -> None:
    found = {one.name: one.state for one in device_findings()}
    assert found["gpu 0"] == found["4 bits, cuda"] == found["a run here"] == "ok"
