"""What the merged model holds: which tensors, and each of them made from the base's and what training left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fine_tune.errors import CheckpointError
from fine_tune.merging.skeleton import Skeleton
from fine_tune.merging.source import Source
from fine_tune.merging.stored import as_trained
from fine_tune.merging.trained import Trained, updated
from fine_tune.merging.writer import Slot
from fine_tune.models.vocabulary import set_to_mean


@dataclass(frozen=True)
class Casts:
    """Dtypes and device of a merge.

    Attributes:
        loaded: What loading casts the base to.
        written: What the merged model is written in.
        device: Where weights are quantised and merged.
    """

    loaded: torch.dtype
    written: torch.dtype
    device: torch.device


@dataclass
class Weights:
    """The tensors of a merged model.

    Attributes:
        source: The base's files.
        model: The base's structure.
        trained: What training left.
        casts: Dtypes and device.
        num_tokens: Length of the tokenizer; the embeddings have at least as many rows.
        origins: Name in the merged model -> name in the files.
        tied: Input embedding and output head stay one tensor.
    """

    source: Source
    model: Skeleton
    trained: Trained
    casts: Casts
    num_tokens: int
    origins: dict[str, str] = field(default_factory=dict)
    tied: bool = False

    def __post_init__(self) -> None:
        """Match names, and refuse what would be merged wrongly or not at all."""
        self.tied = self.model.tied
        for written in self.source.files:
            name = self._own_name(written)
            if name is not None:
                self.origins[name] = written
        self._settle_head()
        self._refuse_strangers()

    def _own_name(self, written: str) -> str | None:
        """Files of some models leave the name of the inner model out, and some hold more than the model has."""
        known = self.model.names
        inner = self.model.embedding.partition(".")[0]
        return next((name for name in (written, f"{inner}.{written}") if name in known), None)

    def _settle_head(self) -> None:
        """Tie the output head or write it apart."""
        head, table = f"{self.model.head}.weight", f"{self.model.embedding}.weight"
        if not self.model.tied:
            return
        update = self.trained.updates.get(self.model.head)
        if update is not None and self.trained.new_tokens:
            raise CheckpointError(
                f"{self.model.head}: it is tied to the input embedding, and both were trained. Merge it with PEFT."
            )
        if head in self.origins and not torch.equal(*(self.source.get(self.origins[n]) for n in (head, table))):
            self.tied = False
        elif update is not None:
            # An update of the head alone: the two are no longer one.
            self.tied, self.origins[head] = False, self.origins[table]
        else:
            self.origins.pop(head, None)

    def _refuse_strangers(self) -> None:
        tied = {f"{self.model.head}.weight"} if self.tied else set()
        missing = set(self.model.names) - set(self.origins) - tied
        if missing:
            raise CheckpointError(
                f"{len(missing)} tensors of the model are not in its files under their own names, for example "
                f"{min(missing)}. Merge it with PEFT."
            )
        for name in self.trained.whole.keys() - self.origins.keys():
            raise CheckpointError(
                f"{name} was trained, and the model's files do not hold it. Use the base it was trained on."
            )
        for module, update in self.trained.updates.items():
            if f"{module}.weight" not in self.origins:
                raise CheckpointError(
                    f"{module} was trained, and the model has no such layer. Use the base it was trained on."
                )
            if update.a is not None and module not in self.model.linear:
                raise CheckpointError(f"{module} was trained, and it is no plain linear layer. Merge it with PEFT.")

    def slots(self) -> list[Slot]:
        """Return what is written, in the order of the base's files."""
        return [Slot(name, self._dtype(name), self._shape(name)) for name in self.origins]

    def _dtype(self, name: str) -> torch.dtype:
        stored = self.source.dtypes[self.origins[name]]
        return self.casts.written if stored.is_floating_point else stored

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in self.trained.whole:
            return tuple(self.trained.whole[name].shape)
        rows, *rest = self.source.shapes[self.origins[name]] or (1,)
        if not self.source.shapes[self.origins[name]]:
            return ()
        return (max(rows, self.num_tokens) if self._is_table(name) else rows, *rest)

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding."""
        return self._shape(f"{self.model.embedding}.weight")[0]

    def _is_table(self, name: str) -> bool:
        module = name.rpartition(".")[0]
        return not self.trained.whole and module in (self.model.embedding, self.model.head)

    @torch.no_grad()
    def make(self, name: str) -> Tensor:
        """Return a merged tensor, cast once, on the CPU."""
        casts, module = self.casts, name.rpartition(".")[0]
        if name in self.trained.whole:
            return self.trained.whole[name].to(casts.written)
        settings = self.model.quantised.get(module) if name.endswith(".weight") else None
        weight = as_trained(self.source.get(self.origins[name]), casts.loaded, casts.device, settings)
        if not weight.is_floating_point():
            return weight.cpu()
        if self._is_table(name):
            weight = self._with_rows(weight, name)
        update = self.trained.updates.get(module)
        if update is not None and update.a is not None and name.endswith(".weight"):
            weight = updated(weight, update, self.trained.scaling)
        return weight.to(casts.written).cpu()

    def _with_rows(self, table: Tensor, name: str) -> Tensor:
        """Give a table the rows of added tokens, as training began them and as it left them."""
        module, _, kind = name.rpartition(".")
        new = self.trained.new_tokens if self._trains_rows(module) else []
        known = min([table.shape[0], *self.trained.new_tokens])
        grown = list(range(table.shape[0], self.num_tokens))
        if not grown and not new:
            # The largest tensor of a model: no copies without need.
            return table
        # In the dtype in which the model was loaded: the mean was rounded there.
        grid = table.to(self.casts.loaded)
        if grown:
            grid = torch.cat([grid, grid.new_zeros(len(grown), *grid.shape[1:])])
        for rows in (grown, new if kind == "weight" else []):
            if rows:
                set_to_mean(SimpleNamespace(weight=grid), rows, known)
        found = grid.float()
        update = self.trained.updates.get(module)
        if kind == "weight" and update is not None and update.rows is not None:
            found[self.trained.new_tokens] = update.rows.to(found)
        return found

    def _trains_rows(self, module: str) -> bool:
        update: Any = self.trained.updates.get(module)
        return update is not None and update.rows is not None


def total_bytes(slots: list[Slot]) -> int:
    """Size of what is written."""
    return sum(slot.num_bytes for slot in slots)


def stored_dtypes(config: Mapping[str, Any]) -> str:
    """Return the dtype that a model's config names."""
    found = config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(found)
