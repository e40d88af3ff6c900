"""The LightningModule of preference optimisation: both completions of a pair in one packed pass, prompt once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fine_tune.losses.dpo import DPOTerms, LossName, PairLengths, PairLogps, pair_loss, start_loss
from fine_tune.losses.kl import token_kl
from fine_tune.models.adapter import causal_lm
from fine_tune.models.base import output_head
from fine_tune.models.forward import completion_logps, score_states, supervised_states
from fine_tune.modules.ratios import Ratios
from fine_tune.modules.reference import FrozenAdapter
from fine_tune.modules.start_gate import StartGate, tolerance
from fine_tune.modules.step import StepModule
from fine_tune.packing.batches import MicroBatch, StepBatch

SIDES = ("chosen", "rejected")


class DPOModule(StepModule):
    """Fit preference pairs against a frozen reference; the loss is a mean over the pairs of the whole step.

    Dropout is switched off in the whole network: with it the policy would not score like its reference even where
    they are equal.

    Args:
        network: The adapted model, packed attention on.
        reference: The adapter that rewards are measured against, on the same base.
        reference_name: What the config calls it, for messages.
        loss: A name in ``fine_tune.losses.dpo.LOSSES``.
        beta: Reward per nat.
        label_smoothing: Assumed share of flipped labels.
        nll_weight: Weight of the chosen completion's negative log-likelihood per token.
        allow_other_start: Training may start from another adapter than the reference; the check of step 0 is left out.
        head_chunk_tokens: Rows of logits that exist at a time.
        step: What every objective takes, see :class:`StepModule`.

    Attributes:
        stored: Reference log-probabilities of training rows, ``[rows, 2]`` float64 on the CPU (chosen, rejected), in
            nats; None computes them in every step.
    """

    accepts = ("pairs",)
    loss_counts = "samples"
    loss_unit = "per pair"
    metric_names = (
        *(f"rewards/{name}" for name in (*SIDES, "margins", "accuracies")),
        *(f"{kind}/{side}" for kind in ("logps", "mean_logps", "completion_tokens") for side in SIDES),
        "mean_logps_gain/chosen",
    )
    val_metric_names = ("kl",)

    def __init__(
        self,
        network: nn.Module,
        *,
        reference: FrozenAdapter,
        reference_name: str = "initial",
        loss: LossName = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        nll_weight: float = 0.0,
        allow_other_start: bool = False,
        head_chunk_tokens: int = 1024,
        **step: Any,
    ) -> None:
        super().__init__(network, **step)
        self.reference, self.head_chunk_tokens = reference, head_chunk_tokens
        self.loss, self.nll_weight = loss, nll_weight
        self.options = {"beta": beta, "label_smoothing": label_smoothing}
        self.stored: Tensor | None = None
        # How steep each loss is at its start, per unit of both rewards: it scales the tolerance of the check.
        slopes = {"sigmoid": 1.0, "hinge": 2.0, "ipo": 2.0 / beta**2, "robust": 1.0 / (1 - 2 * label_smoothing)}
        expected = start_loss(loss, beta, label_smoothing)
        self.gate = None if allow_other_start else StartGate(reference_name, expected, slopes[loss])
        switch_off_dropout(network)

    @property
    def extra_forwards(self) -> int:  # type: ignore[override]
        """Passes of each token without a backward: the reference's, unless it is stored."""
        return 0 if self.stored is not None else 1

    def micro_loss(self, micro: MicroBatch, batch: StepBatch, ratios: Ratios) -> Tensor:
        """Return one micro-batch's share of the step's mean loss over pairs."""
        # First the reference: its activations are gone before the policy's are kept for the backward pass.
        # Stored values are of whole micro-batches: halves of the first step, which is checked, are computed as they are.
        halved = self.step == 0 and self.replay.most_tokens is not None
        reference = self.reference_logps(micro) if self.stored is None or halved else self._stored(micro)
        policy = self._completion_logps(supervised_states(self.network, micro), micro)
        terms = self._terms(policy, reference, micro, nll_weight=self.nll_weight)
        self._add_metrics(terms, policy, reference, micro, ratios)
        if self.step == 0 and self.gate is not None:
            plain = self._terms(policy.detach(), reference, micro, nll_weight=0.0)
            self.gate.look(plain, tolerance(self.network, self.device))
        return terms.loss.sum() / batch.num_samples

    def before_attempt(self) -> None:
        """Forget what the gate has seen of an attempt that was cut short."""
        if self.gate is not None:
            self.gate.forget()

    def before_update(self, batch: StepBatch) -> None:
        """Stop before the first update unless the policy starts as its reference."""
        if self.step == 0 and self.gate is not None:
            self.gate.check()

    def reference_logps(self, micro: MicroBatch) -> Tensor:
        """Sum the reference's log-probabilities of each completion, ``[C]`` in nats, without a gradient."""
        with self.reference.handed():
            return self._completion_logps(supervised_states(self.network, micro).detach(), micro).detach()

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Add up the loss and every metric of some pairs, and the divergence from the reference on their tokens."""
        with self.reference.handed():
            theirs = supervised_states(self.network, batch)
            reference = self._completion_logps(theirs, batch)
            reference_head = output_head(causal_lm(self.network))
        ours = supervised_states(self.network, batch)
        policy = self._completion_logps(ours, batch)
        terms = self._terms(policy, reference, batch, nll_weight=self.nll_weight)
        self._ratios.add("loss", terms.loss.sum(), terms.loss.numel())
        self._add_metrics(terms, policy, reference, batch, self._ratios)
        heads = {"policy_head": output_head(causal_lm(self.network)), "reference_head": reference_head}
        divergence = token_kl(ours, theirs, **heads, chunk_tokens=self.head_chunk_tokens)
        self._ratios.add("kl", divergence.double().sum(), divergence.numel())

    def _completion_logps(self, states: Tensor, micro: MicroBatch) -> Tensor:
        return completion_logps(score_states(self.network, states, micro, chunk_tokens=self.head_chunk_tokens), micro)

    def _stored(self, micro: MicroBatch) -> Tensor:
        assert self.stored is not None
        return self.stored[list(micro.samples)].flatten().to(micro.targets.device)

    def _terms(self, policy: Tensor, reference: Tensor, micro: MicroBatch, *, nll_weight: float) -> DPOTerms:
        return pair_loss(
            self.loss,
            in_pairs(policy),
            in_pairs(reference),
            lengths=PairLengths(*in_pairs(micro.completion_tokens)),
            nll_weight=nll_weight,
            **self.options,
        )

    def _add_metrics(self, terms: DPOTerms, policy: Tensor, reference: Tensor, micro: MicroBatch, ratios: Ratios) -> None:
        margins = terms.chosen_reward - terms.rejected_reward
        pairs = margins.numel()
        # An undecided pair counts half: a policy that equals its reference is right as often as a coin.
        right = (margins > 0).double() + 0.5 * (margins == 0).double()
        for name, values in (("margins", margins), ("accuracies", right)):
            ratios.add(f"rewards/{name}", values.sum(), pairs)
        rewards = (terms.chosen_reward, terms.rejected_reward)
        for side, reward, logps, tokens in zip(
            SIDES, rewards, in_pairs(policy), in_pairs(micro.completion_tokens), strict=True
        ):
            ratios.add(f"rewards/{side}", reward.sum(), pairs)
            ratios.add(f"logps/{side}", logps.sum(), pairs)
            ratios.add(f"mean_logps/{side}", logps.sum(), tokens.sum())
            ratios.add(f"completion_tokens/{side}", tokens.sum(), pairs)
        gain = (in_pairs(policy).chosen - in_pairs(reference).chosen).sum()
        ratios.add("mean_logps_gain/chosen", gain, in_pairs(micro.completion_tokens).chosen.sum())


def in_pairs(values: Tensor) -> PairLogps:
    """View ``[C]`` values of completions as those of chosen and of rejected ones, ``[P]`` each."""
    both = values.view(-1, 2)
    return PairLogps(both[:, 0], both[:, 1])


def switch_off_dropout(network: nn.Module) -> None:
    """Set the share of every dropout to zero: of layers, and of modules that call the function with one of their own."""
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
