"""From the settings of an evaluation to the evaluation: what it asks is its own, or comes from a run's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from fine_tune.data.prepare import PrepareSpec
from fine_tune.data.sources.registry import FORMATS
from fine_tune.errors import ConfigError
from fine_tune.evaluation.asking import Generation
from fine_tune.evaluation.compare import Compare
from fine_tune.evaluation.exact_match import ExactMatch
from fine_tune.evaluation.gsm8k import GSM8K
from fine_tune.evaluation.harness import Harness
from fine_tune.evaluation.mmlu import MMLU
from fine_tune.evaluation.perplexity import Perplexity
from fine_tune.evaluation.preference import Preference
from fine_tune.evaluation.protocol import Evaluation
from fine_tune.subjects import Named

ALL = 10**9
DEFAULT_NEW_TOKENS = 256
KEYS = PrepareSpec.__dataclass_fields__.keys()


def build_evaluation(settings: Mapping[str, Any], named: Sequence[Named], *, seed: int) -> Evaluation:
    """Make the evaluation that ``eval=`` names.

    Args:
        settings: Its checked settings.
        named: The checkpoints; the first run among them whose data fit gives the questions where no file does.
        seed: Decides what is sampled.

    Raises:
        ConfigError: There is neither a file nor a run whose data fit.
    """
    name = settings["name"]
    if name == "mmlu":
        return MMLU(**{key: value for key, value in settings.items() if key != "name"})
    if name == "lm_eval":
        return Harness(seed=seed, **{key: value for key, value in settings.items() if key != "name"})
    if name in ("perplexity", "preference"):
        return _scoring(settings, named)
    data = _data_of(named, ("conversations", "pairs"))
    generation = _generation(settings, data, seed)
    if name == "gsm8k":
        return GSM8K(path=settings["path"], num_items=settings["num_items"], generation=generation)
    spec = None
    if settings["path"] is None and not settings.get("prompts"):
        if data is None:
            raise ConfigError(f"eval.path: eval={name} has no questions, and no run in ckpt= brings any. Pass eval.path=<file>.")
        spec = replace(_spec(data), num_eval_items=settings["num_items"] or ALL)
    if name == "compare":
        return Compare(prompts=settings["prompts"], path=settings["path"], spec=spec, generation=generation)
    rule = settings["answer_rule"] or (data["answer_rule"] if data and spec else None) or "whole"
    return ExactMatch(
        path=settings["path"],
        spec=spec,
        answer_rule=rule,
        normalisation=settings["normalisation"],
        limit_words=settings["limit_words"],
        generation=generation,
    )


def _generation(settings: Mapping[str, Any], data: Mapping[str, Any] | None, seed: int) -> Generation:
    most = settings["max_new_tokens"] or (data["max_new_tokens"] if data else DEFAULT_NEW_TOKENS)
    options = {key: settings[key] for key in ("batch_size", "temperature", "top_p", "top_k")}
    return Generation(max_new_tokens=most, seed=seed, **options)


def _scoring(settings: Mapping[str, Any], named: Sequence[Named]) -> Evaluation:
    pairs = settings["name"] == "preference"
    data = _data_of(named, ("pairs",) if pairs else ("conversations", "documents"))
    split: Literal["val", "train"] = "val"
    if settings["path"] is not None:
        spec, split = _spec_of_file(settings, data, pairs=pairs), "train"
    elif data is None:
        what = "pairs" if pairs else "conversations or documents"
        raise ConfigError(f"eval.path: no run in ckpt= was trained on {what}. Pass eval.path=<file> and eval.format=<format>.")
    else:
        spec = _spec(data)
    options = {key: settings[key] for key in ("num_items", "micro_batch_tokens", "head_chunk_tokens")}
    if pairs:
        return Preference(spec=spec, split=split, by=settings["by"], **options)
    return Perplexity(spec=spec, split=split, **options)


def _data_of(named: Sequence[Named], batches: Sequence[str]) -> Mapping[str, Any] | None:
    return next((one.cfg["data"] for one in named if one.run is not None and one.cfg["data"]["batch"] in batches), None)


def _spec(data: Mapping[str, Any]) -> PrepareSpec:
    return PrepareSpec(**{key: value for key, value in data.items() if key in KEYS})


def _spec_of_file(settings: Mapping[str, Any], data: Mapping[str, Any] | None, *, pairs: bool) -> PrepareSpec:
    """Take every row of a file, cut as the run cuts its own."""
    # The run's own format, unless that one makes its rows itself.
    reads = data is not None and data["format"] in FORMATS and FORMATS[data["format"]].needs_rows
    form = settings["format"] or (data["format"] if data and reads else "preferences" if pairs else "chat")
    own = data is not None and data["format"] == form
    kept = ("options", "max_seq_len", "overflow", "cache_dir") if own else ("max_seq_len", "cache_dir")
    shared = {key: data[key] for key in kept} if data is not None else {}
    return PrepareSpec(
        format=form, path=settings["path"], val_share=0.0, lint="report" if pairs else None, max_lost_share=1.0, **shared
    )
