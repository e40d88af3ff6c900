"""The self-check passes where bitsandbytes is sound, and fails where it computes something else."""

from typing import Any

import bitsandbytes.functional as bits
import pytest
import torch

from fine_tune.doctor import four_bits
from fine_tune.doctor.four_bits import NF4, PRODUCT, QUANTISED, four_bit_finding, measure

CPU = torch.device("cpu")


def test_bitsandbytes_is_sound_here() -> None:
    errors = measure(CPU, torch.float32)
    assert errors["nf4"] <= QUANTISED
    assert errors["forward"] <= PRODUCT[torch.float32]
    assert errors["backward"] <= PRODUCT[torch.float32]
    assert four_bit_finding(CPU, torch.float32).state == "ok"


def test_half_precision_is_measured_with_its_own_bound() -> None:
    errors = measure(CPU, torch.bfloat16)
    assert PRODUCT[torch.float32] < errors["forward"] <= PRODUCT[torch.bfloat16]


def test_the_codebook_is_the_libraries() -> None:
    assert torch.equal(torch.tensor(NF4), bits.get_4bit_type("nf4", device="cpu"))


def test_another_codebook_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = bits.quantize_4bit

    def other(weight: Any, **options: Any) -> Any:
        return quantize(weight, **{**options, "quant_type": "fp4"})

    monkeypatch.setattr(bits, "quantize_4bit", other)
    found = four_bit_finding(CPU, torch.float32)
    assert found.state == "broken"
    assert found.says.startswith("bitsandbytes computes something else than NF4: nf4 ")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_product_is_noticed(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, given: torch.Tensor) -> torch.Tensor:
            return given * (1.001 if direction == "forward" else 1)

        @staticmethod
        def backward(ctx: Any, *back: torch.Tensor) -> Any:
            return back[0] * (1.001 if direction == "backward" else 1)

    layer = four_bits._layer

    def wrong(*arguments: Any) -> Any:
        made = layer(*arguments)
        forward = made.forward
        made.forward = lambda given: Wrong.apply(forward(given))
        return made

    monkeypatch.setattr(four_bits, "_layer", wrong)
    found = four_bit_finding(CPU, torch.float32)
    assert found.state == "broken"
    over = {kind for kind, bound in found.values["bounds"].items() if found.values["errors"][kind] > bound}
    assert over == {direction}


def test_a_library_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(bits, "quantize_4bit", fail)
    found = four_bit_finding(CPU, torch.float32)
    assert found.state == "broken"
    assert found.says.endswith("so method=qlora does: RuntimeError: no kernel image")


def test_a_figure_that_is_no_number_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bits, "measure", lambda *a: {"nf4": float("nan"), "forward": 0.0, "backward": 0.0})
    assert four_bit_finding(CPU, torch.float32).state == "broken"
