"""The proof that DPO starts where it says: at step 0 policy and reference are the same model."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fine_tune.errors import ConfigError
from fine_tune.losses.dpo import DPOTerms
from fine_tune.modules.parallel import world_size

# Largest reward that counts as zero, by what is computed in. The same layers run on the same numbers, so even half
# precision gives equal sums; its tolerance is for a store of reference values, see fine_tune.reference_store.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}


def tolerance(network: nn.Module, device: torch.device) -> float:
    """Return the largest reward that counts as zero for what this network computes in."""
    dtypes = {p.dtype for p in network.parameters() if p.is_floating_point()}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    if dtypes == {torch.float64}:
        return TOLERANCE[torch.float64]
    return max(TOLERANCE[dtype] for dtype in dtypes if dtype in TOLERANCE and dtype != torch.float64)


class StartGate:
    """Collect how far a first step is from ``expected_loss`` and zero rewards, and refuse to go on past the tolerance.

    Args:
        reference_name: ``objective.reference``, for the message.
        expected_loss: Loss of a pair whose rewards are zero (ln 2 for DPO's own loss).
        slope: Most that a loss near its expected value moves per unit of both rewards.

    Attributes:
        seen: What the check has found, once it has passed.
    """

    def __init__(self, reference_name: str, expected_loss: float, slope: float = 1.0) -> None:
        self.reference_name, self.expected_loss, self.slope = reference_name, expected_loss, slope
        self._worst: Tensor | None = None
        self.seen: str | None = None

    def forget(self) -> None:
        """Take back what was noted."""
        self._worst = None

    def look(self, terms: DPOTerms, allowed: float) -> None:
        """Note the largest reward and the largest distance of a loss from the expected one."""
        rewards = torch.cat([terms.chosen_reward, terms.rejected_reward]).abs().max()
        losses = (terms.loss.detach() - self.expected_loss).abs().max()
        worst = torch.stack([rewards, losses, torch.full_like(rewards, allowed)])
        self._worst = worst if self._worst is None else torch.maximum(self._worst, worst)

    def check(self) -> None:
        """Compare what all ranks noted with the tolerance, at the same time on all of them.

        Raises:
            ConfigError: The policy does not start as the reference.
        """
        device = torch.device("cpu") if self._worst is None else self._worst.device
        worst = torch.zeros(3, dtype=torch.float64, device=device) if self._worst is None else self._worst.double()
        if world_size() > 1:
            if self._worst is None and dist.get_backend() == "nccl":
                worst = worst.cuda()
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        # What is allowed travels along: a rank without pairs must judge as the others do, or they would wait for it.
        reward, loss, allowed = worst.tolist()
        if reward <= allowed and loss <= allowed * self.slope:
            self.seen = f"at step 0 rewards are within {reward:.1e} of 0, losses within {loss:.1e} of {self.expected_loss:.6f}"
            return
        raise ConfigError(
            f"step 0: the policy is not its reference: a reward is {reward:.3g} (allowed {allowed:g}), and a pair's loss is "
            f"{loss:.3g} from {self.expected_loss:.6f}, which a policy equal to its reference has. Nothing was updated. "
            f"objective.reference={self.reference_name} must be what training starts from: use objective.reference=initial, "
            "or objective.allow_other_start=true if another start is meant."
        )
