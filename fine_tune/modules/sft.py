"""The LightningModule of supervised fine-tuning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fine_tune.losses.sft import sft_loss
from fine_tune.models.forward import supervised_logps
from fine_tune.modules.ratios import Ratios
from fine_tune.modules.step import StepModule
from fine_tune.packing.batches import MicroBatch, StepBatch


class SFTModule(StepModule):
    """Fit the supervised tokens of packed conversations; the loss is nats per supervised token of the whole step.

    Args:
        network: The adapted model, packed attention on.
        head_chunk_tokens: Rows of logits that exist at a time.
        step: What every objective takes, see :class:`StepModule`.
    """

    accepts = ("conversations", "documents")
    loss_counts = "supervised_tokens"
    loss_unit = "nats/token"
    has_perplexity = True

    def __init__(self, network: nn.Module, *, head_chunk_tokens: int = 1024, **step: Any) -> None:
        super().__init__(network, **step)
        self.head_chunk_tokens = head_chunk_tokens

    def micro_loss(self, micro: MicroBatch, batch: StepBatch, ratios: Ratios) -> Tensor:
        """Return one micro-batch's share of the step's mean negative log-likelihood."""
        logps = supervised_logps(self.network, micro, chunk_tokens=self.head_chunk_tokens)
        return sft_loss(logps, num_step_tokens=batch.num_supervised)

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Add up nats and tokens; the mean is over tokens, not over batches."""
        if self.start_is_known:
            return
        logps = supervised_logps(self.network, batch, chunk_tokens=self.head_chunk_tokens)
        self._ratios.add("loss", -logps.double().sum(), torch.tensor(logps.numel()))
