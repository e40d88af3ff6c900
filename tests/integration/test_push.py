"""A real run's folder as the hub would get it: usable with PEFT and transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fine_tune.cli.push import main


def test_the_pushed_adapter_loads_with_peft_alone(lora: Path, stand_in: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "pushed"
    assert main([f"ckpt={lora}", "repo=me/small", "dry_run=true", f"out={out}"]) == 0
    base: Any = AutoModelForCausalLM.from_pretrained(str(stand_in[0]))
    ids = torch.tensor([[1, 7, 8, 9]])
    before = base(input_ids=ids).logits
    model = PeftModel.from_pretrained(base, str(out))
    assert (model(input_ids=ids).logits - before).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(str(out)).chat_template
    card = (out / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "peft"
    # Folders of this machine are in the run's records, and not in what is pushed.
    assert str(tmp_path.parent) not in "".join(
        file.read_text(encoding="utf-8") for file in out.iterdir() if file.suffix != ".safetensors"
    )


def test_a_run_without_an_adapter_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"ckpt={tmp_path}", "repo=me/small", "dry_run=true"]) == 4
    assert "no adapter model of a run there" in capsys.readouterr().err
