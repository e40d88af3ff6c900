"""A module stays where its quantised layers were loaded when Lightning is done with it."""

from __future__ import annotations

import torch
from torch import nn

from fine_tune.modules.optim import OptimSpec
from fine_tune.modules.sft import SFTModule


class Unmovable(nn.Linear):
    """Like a quantised layer: loaded for one device."""

    def _apply(self, *args: object, **kwargs: object) -> nn.Module:
        raise AssertionError("moved")


def test_the_end_of_training_does_not_move_the_network() -> None:
    module = SFTModule(Unmovable(2, 2), optim=OptimSpec(torch.optim.AdamW, lr=0.1), num_steps=1, head_chunk_tokens=8)
    assert module.cpu() is module
