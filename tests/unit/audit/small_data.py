"""A few rows of a file, prepared as for a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from fine_tune.audit.placing import Placed, encode_whole, place
from fine_tune.audit.rows import Painter, Shown
from fine_tune.data.collect import collect
from fine_tune.data.ledger import Ledger
from fine_tune.data.prepare import Prepared, PrepareSpec, prepare
from fine_tune.text.encode import Encoder
from fine_tune.text.template import ChatTemplate

Tokenizer = PreTrainedTokenizerFast


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


class Data:
    """Rows of one file, prepared, and what an audit makes of them."""

    def __init__(
        self, tmp_path: Path, tokenizer: Tokenizer, template: ChatTemplate, rows: list[dict[str, Any]], **keys: Any
    ):
        options = {"format": "chat", "val_share": 0.0, "max_lost_share": 1.0, "cache_dir": str(tmp_path / "cache")}
        tmp_path.mkdir(exist_ok=True)
        self.spec = PrepareSpec(**{**options, "path": write(tmp_path / "rows.jsonl", rows), **keys})
        self.tokenizer, self.encoder = tokenizer, Encoder(tokenizer, template)
        self.prepared: Prepared = prepare(self.spec, tokenizer, template)
        train, _ = collect(self.spec, Ledger(max_seq_len=self.spec.max_seq_len))
        self.rows: list[Placed] = place(train, self.prepared.train, "train")

    def shown(self, placed: Placed) -> Shown:
        [(_, whole)] = encode_whole([placed], self.encoder)
        return Painter(self.tokenizer, special=[1, 2]).show(placed, whole, kind="random")


def talk(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]}


def pair(chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": "ask", "chosen": chosen, "rejected": rejected}
