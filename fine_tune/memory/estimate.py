"""Device memory of one training step, in bytes, from shapes: what is stored, kept for the backward pass, and worked with.

Counted are the tensors that a decoder of this project's layers really keeps; docs/performance.md compares the sums with
measured peaks. One sequence's length does not matter: attention keeps rows, not squares.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from fine_tune.losses.logps import rows_at_a_time
from fine_tune.memory.shape import LinearShape, ModelShape
from fine_tune.models.execution import Execution

# A weight's scale of double quantisation: 8 bits per block of 64, and a float32 per 256 of these.
SCALES_DOUBLE, SCALES_PLAIN = 1 / 64 + 4 / (64 * 256), 4 / 64
# Layers' inputs that are on the device at a time while the others are in host memory.
INPUTS_UNDER_WAY = 3
# Bytes per value of the residual stream that a layer's uncompiled norms and rotary embeddings keep besides, by the bytes of
# a computed value: norms of half precision keep copies in float32 (measured).
EAGER_EXTRA = {2: 10, 4: 7}
# Attention without a kernel for sequences of any length copies queries, keys, values and its result into rows of like length,
# keys and values once per query head; padding included, which is under half of each row.
COPIED_HEADS = 4 * 1.4


@dataclass(frozen=True)
class Stored:
    """How the frozen base is stored: bits of its linear weights, bytes of everything else, 4-bit scales, made dense once."""

    bits: int
    bytes_per_value: int
    double_quant: bool = True
    dense_base: bool = False


@dataclass(frozen=True)
class Trained:
    """What trains, besides the base's own weights when ``everything`` does.

    Attributes:
        rank: LoRA's rank.
        layers: Adapted linear layers of one decoder layer.
        dropout: LoRA's inputs are dropped at random, so a second copy of them is kept.
        state_bytes: Optimizer state on the device, per trained weight.
        num_copies: Frozen copies of the adapter (a live reference that starts from an adapter).
        everything: Every weight of the base trains.
    """

    rank: int = 0
    layers: tuple[LinearShape, ...] = ()
    dropout: bool = False
    state_bytes: int = 8
    num_copies: int = 0
    everything: bool = False


@dataclass(frozen=True)
class Step:
    """One micro-batch.

    Attributes:
        tokens: Its size.
        compute_bytes: Of a computed value.
        head_rows: Rows of logits at a time.
        copies_heads: Attention copies what it reads, as it does where flash attention is missing.
        casts_head: The head is stored in another dtype than it is multiplied in, so there is a copy of it.
    """

    tokens: int
    compute_bytes: int
    head_rows: int
    copies_heads: bool = False
    casts_head: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device at the peak of a step, by what they are for."""

    base: int
    trained: int
    kept: int
    working: int

    @property
    def total(self) -> int:
        """All of them together: what ``torch.cuda.max_memory_allocated`` would say."""
        return sum(getattr(self, field.name) for field in fields(self))


def footprint(shape: ModelShape, stored: Stored, trained: Trained, execution: Execution, step: Step) -> Footprint:
    """Add up a step's memory at its peak: the backward pass of one layer, or the head, with all activations kept."""
    weight = num_trained(shape, trained)
    layer = _backward_of_a_layer(shape, stored, trained, execution, step)
    return Footprint(
        base=base_bytes(shape, stored, trained),
        # Master weights and gradients are float32.
        trained=weight * (4 + 4 + trained.state_bytes) + 4 * weight * trained.num_copies,
        kept=_kept(shape, stored, trained, execution, step),
        working=max(layer, _head(shape, step)),
    )


def num_trained(shape: ModelShape, trained: Trained) -> int:
    """Count the weights that train."""
    if trained.everything:
        return shape.linear_weights + shape.other
    return shape.num_layers * trained.rank * sum(one.in_features + one.out_features for one in trained.layers)


def base_bytes(shape: ModelShape, stored: Stored, trained: Trained) -> int:
    """Count the bytes of the base as it lies on the device; none where every weight trains and is counted there."""
    if trained.everything:
        return 0
    size = {4: 0.5 + (SCALES_DOUBLE if stored.double_quant else SCALES_PLAIN), 8: 1.0, 16: stored.bytes_per_value}
    each = stored.bytes_per_value if stored.dense_base else size[stored.bits]
    return round(shape.linear_weights * each + shape.other * stored.bytes_per_value)


def _kept(shape: ModelShape, stored: Stored, trained: Trained, execution: Execution, step: Step) -> int:
    """Bytes that wait for the backward pass."""
    if execution.recompute == "full":
        layers = min(INPUTS_UNDER_WAY, shape.num_layers) if execution.offload else shape.num_layers
        return step.tokens * layers * shape.hidden * step.compute_bytes
    each = _selected if execution.recompute == "selective" else _everything
    return step.tokens * shape.num_layers * each(shape, stored, trained, execution, step)


def _everything(shape: ModelShape, stored: Stored, trained: Trained, execution: Execution, step: Step) -> int:
    """Bytes per token that one layer keeps without recomputation.

    The last product only adds to the residual stream, which needs no product to be kept.
    """
    inputs = sum({one.source: one.in_features for one in shape.linears}.values())
    casts = stored.bits == 16 and bool(trained.layers) and not (execution.compile or execution.fused_lora)
    if trained.dropout or casts:
        # Each adapted layer keeps a copy of its own: dropped, or cast to the adapter's dtype and back (PEFT's dense layers).
        inputs = sum(one.in_features for one in trained.layers)
    values = _outputs(shape.linears[:-1]) + inputs + shape.hidden + trained.rank * len(trained.layers)
    eager = 0 if execution.compile else EAGER_EXTRA.get(step.compute_bytes, 14) * shape.hidden
    # One byte for each value that may be dropped.
    masks = sum(one.in_features for one in trained.layers) if trained.dropout else 0
    copies = round(COPIED_HEADS * shape.attention) * step.compute_bytes if step.copies_heads else 0
    return values * step.compute_bytes + eager + masks + copies + _attention_sums(shape)


def _selected(shape: ModelShape, stored: Stored, trained: Trained, execution: Execution, step: Step) -> int:
    """Bytes per token that one layer keeps when only products and attention are kept."""
    fused = execution.fused_lora
    products = shape.linears[:-1] if fused or execution.compile else shape.linears
    values = _outputs(products) + shape.attention + shape.hidden + trained.rank * len(trained.layers)
    # PEFT's own code adds the adapter's product to the base's: two results where our operation has one.
    values += 0 if fused else _outputs(trained.layers)
    return values * step.compute_bytes + _attention_sums(shape)


def _attention_sums(shape: ModelShape) -> int:
    return 4 * shape.heads


def _backward_of_a_layer(shape: ModelShape, stored: Stored, trained: Trained, execution: Execution, step: Step) -> int:
    """Bytes that the backward pass of one layer works with: what it computed again, gradients, and a dense weight."""
    again = 0
    if execution.recompute != "none":
        again = _everything(shape, stored, trained, execution, step)
        again -= _selected(shape, stored, trained, execution, step) if execution.recompute == "selective" else 0
    groups: dict[int, int] = {}
    for one in shape.linears:
        groups[one.source] = groups.get(one.source, 0) + one.out_features
    gradients = (max(groups.values()) + shape.hidden) * step.compute_bytes
    largest = max(one.in_features * one.out_features for one in shape.linears)
    dense = 0 if stored.bits == 16 or stored.dense_base else largest * step.compute_bytes
    return step.tokens * (max(0, again) + gradients) + dense


def _head(shape: ModelShape, step: Step) -> int:
    """Bytes that the output head works with: a chunk of logits, its copy, and rows of the residual stream."""
    rows = min(rows_at_a_time(step.head_rows, shape.vocabulary), step.tokens)
    logits = rows * shape.vocabulary * (4 + 2 * step.compute_bytes)
    cast = shape.vocabulary * shape.hidden * step.compute_bytes if step.casts_head else 0
    return cast + logits + 3 * step.tokens * shape.hidden * step.compute_bytes


def _outputs(linears: tuple[LinearShape, ...]) -> int:
    return sum(one.out_features for one in linears)
