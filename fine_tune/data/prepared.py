"""What a run gets of its data, and how a cache entry holds it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fine_tune.data.ledger import Ledger
from fine_tune.data.pair_lint import LengthBias
from fine_tune.data.table import TokenTable
from fine_tune.text.conversation import Conversation, Message, PreferencePair


@dataclass(frozen=True)
class EvalItem:
    """A validation question: the turns before its last answer, and the answer it is scored against."""

    id: str
    messages: tuple[Message, ...]
    answer: str

    @classmethod
    def of(cls, row: Conversation | PreferencePair) -> EvalItem:
        """The question of a row; of a pair the chosen side answers it."""
        if isinstance(row, PreferencePair):
            return cls(row.id, row.prompt, row.chosen if row.answer is None else row.answer)
        last = max(index for index, message in enumerate(row.messages) if message.role == "assistant")
        answer = row.messages[last].content if row.answer is None else row.answer
        return cls(row.id, row.messages[:last], answer)


@dataclass
class Prepared:
    """Everything a run needs of its data.

    Attributes:
        train: Training rows.
        val: Validation rows, in an order drawn by hash.
        ledger: The account of all rows and tokens.
        fingerprint: `data_fingerprint` of the spec.
        eval_items: The first `num_eval_items` validation rows with a question that were kept whole.
        length_bias: Lengths in tokens of the two sides of the training pairs; None without pairs.
        flaws: With `lint=report`, one line per flaw that was found: of pairs that are kept all the same, or validate.
        warnings: Sentences for the user.
        from_cache: The tables were found, not built.
    """

    train: TokenTable
    val: TokenTable
    ledger: Ledger
    fingerprint: str
    eval_items: list[EvalItem]
    length_bias: LengthBias | None = None
    flaws: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    from_cache: bool = False

    def pair_warnings(self) -> list[str]:
        """What the user should know of preference pairs before a policy learns from them."""
        found = [f"data.lint=report finds flawed pairs: {line}." for line in self.flaws]
        return found + (self.length_bias.sentences() if self.length_bias is not None else [])

    def repeat_warnings(self) -> list[str]:
        """Tell of training rows that are there twice: they count twice, and are learned by heart sooner."""
        found = self.train.repeated()
        if not found:
            return []
        name, earlier = found[0]
        count = f"{len(found):,} of {len(self.train):,} training rows"
        return [f"{count} repeat another token by token, such as {name}, which is {earlier} again."]

    def save(self, folder: Path) -> None:
        """Write what a cache entry keeps."""
        self.train.save(folder / "train.arrow")
        self.val.save(folder / "val.arrow")
        _dump([asdict(item) for item in self.eval_items], folder / "eval_items.json")
        _dump(self.ledger.as_dict(), folder / "ledger.json")
        bias = None if self.length_bias is None else self.length_bias.as_dict()
        _dump({"length_bias": bias, "flaws": self.flaws}, folder / "pairs.json")

    @classmethod
    def open(cls, folder: Path, fingerprint: str) -> Prepared:
        """Read what `save` wrote."""
        pairs = _parse(folder / "pairs.json")
        return cls(
            train=TokenTable.open(folder / "train.arrow"),
            val=TokenTable.open(folder / "val.arrow"),
            ledger=Ledger.from_dict(_parse(folder / "ledger.json")),
            fingerprint=fingerprint,
            eval_items=[
                EvalItem(item["id"], tuple(Message(**message) for message in item["messages"]), item["answer"])
                for item in _parse(folder / "eval_items.json")
            ],
            length_bias=pairs["length_bias"] and LengthBias.from_dict(pairs["length_bias"]),
            flaws=pairs["flaws"],
            from_cache=True,
        )


def _dump(values: Any, file: Path) -> None:
    file.write_text(json.dumps(values), encoding="utf-8")


def _parse(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
