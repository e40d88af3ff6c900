"""The model card: what was trained on what, how it did, and how to use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from fine_tune.pushing.facts import Facts
from fine_tune.pushing.inert import block, code, is_hub_id, one_line, short_name, without_folders
from fine_tune.redaction import redact
from fine_tune.report.visible import number

METHOD_KEYS = (
    "name",
    "bits",
    "quant_type",
    "double_quant",
    "rank",
    "alpha",
    "dropout",
    "target_modules",
    "rank_stabilized",
)
OPTIM_KEYS = ("name", "lr", "schedule", "warmup_share", "weight_decay", "global_batch_size")
SUMMARY_KEYS = {
    "steps": "optimizer steps", "epochs": "epochs", "final_loss": "validation loss", "final_perplexity": "validation perplexity",
    "exact_match": "exact match on held-out questions", "base_exact_match": "the same, base model",
    "preference_accuracy": "preference accuracy", "mean_completion_tokens": "tokens per answer",
    "trainable_parameters": "trained parameters", "total_parameters": "parameters", "train_seconds": "seconds of training",
    "tokens_per_second": "tokens per second", "peak_memory_gb": "peak memory, GB", "device": "device", "precision": "precision",
}  # fmt: skip


def card(facts: Facts, *, repo: str, merged: bool, licence: str | None) -> str:
    """Write a card; every text of it that comes from elsewhere is inert.

    Args:
        facts: What the run's folder says.
        repo: The hub id that it is pushed to.
        merged: It is of a merged model, else of an adapter.
        licence: The hub's name of the base's licence.
    """
    sections = [
        _introduction(facts, repo, merged=merged, licence=licence),
        _use(facts, repo, merged=merged),
        _table("Method", {**_chosen(facts.part("method"), METHOD_KEYS), **_prefixed("optimizer", facts)}),
        _data(facts),
        _table("Result", {text: facts.summary.get(key) for key, text in SUMMARY_KEYS.items()}),
        *(_table(f"Evaluation: {code(name)}", _numbers(found)) for name, found in facts.metrics.items()),
        _verdict(facts),
        _merge(facts) if merged else "",
        _command(facts),
    ]
    return _front_matter(facts, merged=merged, licence=licence) + "\n\n".join(part for part in sections if part) + "\n"


def _front_matter(facts: Facts, *, merged: bool, licence: str | None) -> str:
    base, objective = str(facts.part("model").get("path")), str(facts.part("objective").get("name"))
    found: dict[str, Any] = {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "license": one_line(licence or "other"),
        "tags": ["fine-tune", one_line(objective), *([] if merged else ["lora"])],
    }
    if is_hub_id(base):
        found |= {"base_model": base, "base_model_relation": "finetune" if merged else "adapter"}
    if datasets := _hub_datasets(facts.part("data")):
        found["datasets"] = datasets
    # ASCII: what YAML would not show is written as an escape.
    return f"---\n{yaml.safe_dump(redact(found), sort_keys=False, allow_unicode=False, width=1000)}---\n\n"


def _hub_datasets(data: Mapping[str, Any]) -> list[str]:
    sources = data.get("sources")
    named = [data.get("hub"), *(one.get("hub") for one in sources.values() if isinstance(one, dict))] if isinstance(
        sources, dict
    ) else [data.get("hub")]  # fmt: skip
    return sorted({one for one in named if isinstance(one, str) and is_hub_id(one)})


def _introduction(facts: Facts, repo: str, *, merged: bool, licence: str | None) -> str:
    model = facts.part("model")
    what = "A fine-tuned model" if merged else "An adapter"
    revision = f", revision {code(model['revision'], key='revision')}" if model.get("revision") else ""
    terms = f"Licence of the base: {code(licence)}; it holds for what is made from it." if licence else (
        "The licence of the base is not known here: see where the base comes from, it holds for what is made from it."
    )  # fmt: skip
    if model.get("trust_remote_code"):
        pinned = f", commit {code(model['revision'], key='revision')}" if model.get("revision") else ""
        terms += (
            f"\n\nThe base runs code of its own: {code(short_name(str(model.get('path'))))}{pinned}. It was trained with "
            "`model.trust_remote_code=true`; read that code before you load it."
        )
    return (
        f"# {code(repo.rpartition('/')[2])}\n\n{what}, made from {code(short_name(str(model.get('path'))))}{revision} by "
        f"{code(facts.part('objective').get('name'))}.\n\n{terms}"
    )


def _use(facts: Facts, repo: str, *, merged: bool) -> str:
    model = facts.part("model")
    base = short_name(str(model.get("path")))
    trusted = ", trust_remote_code=True" if model.get("trust_remote_code") else ""
    pinned = f", revision={model['revision']!r}{trusted}" if trusted and model.get("revision") else trusted
    if merged:
        lines = ["from transformers import pipeline", f"chat = pipeline('text-generation', model={repo!r}{trusted})"]
        lines.append("print(chat([{'role': 'user', 'content': 'Hello!'}], max_new_tokens=64, return_full_text=False))")
    else:
        lines = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
        if facts.part("method").get("bits") == 4:
            kind, double = facts.part("method").get("quant_type"), facts.part("method").get("double_quant")
            lines[1] = lines[1].replace("AutoTokenizer", "AutoTokenizer, BitsAndBytesConfig")
            lines.append("# The base as it was in training; `fine-tune merge` makes one model of both.")
            settings = f"load_in_4bit=True, bnb_4bit_quant_type={kind!r}, bnb_4bit_use_double_quant={double!r}"
            lines.append(f"quantised = BitsAndBytesConfig({settings})")
            lines.append(f"base = AutoModelForCausalLM.from_pretrained({base!r}, quantization_config=quantised{pinned})")
        else:
            lines.append(f"base = AutoModelForCausalLM.from_pretrained({base!r}{pinned})")
        lines.append(f"model = PeftModel.from_pretrained(base, {repo!r})")
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({repo!r})")
    end = code(facts.manifest.get("chat_template"))
    return (
        f"## Use\n\n{block(chr(10).join(lines)).replace('```text', '```python', 1)}\n\nThe chat template ({end}) is with the "
        "tokenizer. `passport.json` holds prompts, their token ids and what the model says to them: `fine-tune verify` "
        "compares a server with it."
    )


def _data(facts: Facts) -> str:
    data, ledger = facts.part("data"), facts.ledger
    path = data.get("path")
    values = {
        "name": data.get("name"),
        "format": data.get("format"),
        "dataset": data.get("hub"),
        "revision": data.get("revision") if data.get("hub") else None,
        "file": short_name(str(path)) if path else None,
        "rows read": ledger.get("read"),
        "rows kept": ledger.get("kept"),
        "longest row, tokens": data.get("max_seq_len"),
    }
    dropped = ledger.get("dropped")
    if isinstance(dropped, dict):
        values |= {f"dropped: {reason}": count for reason, count in dropped.items()}
    return _table("Data", values)


def _verdict(facts: Facts) -> str:
    return "" if not facts.sentences else "## Verdict\n\n" + "\n\n".join(block(one) for one in facts.sentences)


def _merge(facts: Facts) -> str:
    own = facts.merge.get("against_base_and_adapter")
    values = {key: facts.merge.get(key) for key in ("base", "trained_on", "dtype", "tolerance")}
    if isinstance(own, dict):
        values |= {
            "largest logit gap to base and adapter": own.get("max_logit_gap"),
            "greedy text equal": own.get("greedy_equal"),
        }
    return _table("Merge", values)


def _command(facts: Facts) -> str:
    command = facts.manifest.get("command")
    versions = facts.manifest.get("versions")
    told = block(without_folders(str(command))) if command else ""
    return "\n\n".join(
        part for part in ("## Command" if told else "", told, _table("Versions", versions if isinstance(versions, dict) else {}))
        if part
    )  # fmt: skip


def _table(title: str, values: Mapping[str, Any]) -> str:
    rows = [f"| {code(name)} | {code(value, key=name)} |" for name, value in values.items() if value is not None]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *rows]) if rows else ""


def _chosen(values: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: values.get(key) for key in keys}


def _prefixed(prefix: str, facts: Facts) -> dict[str, Any]:
    return {f"{prefix} {key}": value for key, value in _chosen(facts.part("optim"), OPTIM_KEYS).items()}


def _numbers(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if number(value) is not None}
