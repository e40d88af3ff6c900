"""What lm-evaluation-harness says about documents and tasks, as plain lines and figures."""

from __future__ import annotations

import contextlib
import io
import json
import os
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

# Resamples behind a standard error that has no formula; lm-eval takes a hundred times as many.
BOOTSTRAP_ITERS = 1000
SLOW_BOOTSTRAP_ITERS = 100
SLOW_METRICS = ("bleu", "chrf", "chrf++", "ter")
RIGHT_OR_WRONG = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Keep the library's own progress off the terminal, and its bootstrap in this process."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def plain(value: Any) -> Any:
    """Turn what tasks compute with into JSON's own types.

    Example:
        >>> plain({"f1": (np.int64(1), np.array([0.5]))})
        {'f1': [1, [0.5]]}
    """
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def always_binary(task: Any) -> bool:
    """Tell whether the task's first metric is right or wrong for each document, by lm-eval's own rules."""
    from lm_eval.api.task import ConfigurableTask

    own = type(task).process_results is ConfigurableTask.process_results and task.get_config("process_results") is None
    return own and next(iter(task.aggregation()), None) in RIGHT_OR_WRONG


def choices_of(requests: Sequence[Any]) -> list[str]:
    """Return the texts among which a multiple-choice document chooses; none where it does not choose."""
    # Requests without a context only measure how likely an answer is anyway.
    asked = [request.args for request in requests if request.request_type == "loglikelihood" and request.args[0]]
    if len(asked) < 2:
        return []
    shared = len({context for context, _ in asked}) == 1
    return [ending if shared else context + ending for context, ending in asked]


def letter(place: int) -> str:
    """Name a choice: A to Z, then numbers."""
    return string.ascii_uppercase[place] if place < len(string.ascii_uppercase) else str(place)


def target_of(task: Any, requests: Sequence[Any]) -> str:
    """Return what is right as text, for a choice its letter."""
    target = plain(task.doc_to_target(requests[0].doc))
    if getattr(task, "multiple_input", 0):
        target = plain(task.doc_to_text(requests[0].doc))
    places = target if isinstance(target, list) else [target]
    if choices_of(requests) and all(type(place) is int and place >= 0 for place in places):
        return ",".join(letter(place) for place in places)
    return target if isinstance(target, str) else json.dumps(target)


def result_of(task: Any, documents: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Filter the answers of documents and return each document's metrics as ``metric,filter``."""
    requests = [request for document in documents for request in document]
    task._instances = requests
    task.apply_filters()
    found = []
    for document in documents:
        metrics: dict[str, Any] = {}
        for name in document[0].filtered_resps:
            results = task.process_results(document[0].doc, [request.filtered_resps[name] for request in document])
            metrics |= {f"{metric},{name}": plain(value) for metric, value in results.items()}
        found.append(metrics)
    return found


def answer_line(task: Any, requests: Sequence[Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what one document was answered and what that is worth."""
    line: dict[str, Any] = {}
    first = requests[0]
    if first.request_type == "generate_until":
        line["completion"] = first.resps[0]
        line["filtered"] = plain(first.filtered_resps)
    elif choices := choices_of(requests):
        scored = [request.resps[0][0] for request in requests if request.args[0]]
        line["choice"] = letter(max(range(len(scored)), key=lambda i: scored[i]))
        line["logps"] = {letter(i): logp for i, logp in enumerate(scored)}
        line["choices"] = {letter(i): text for i, text in enumerate(choices)}
    elif first.request_type == "loglikelihood":
        line["logps"], line["greedy"] = {"target": first.resps[0][0]}, bool(first.resps[0][1])
    else:
        line["logps"] = {"text": first.resps[0]}
    name, score = _score(task, first.request_type, metrics)
    if always_binary(task):
        line["correct"] = bool(score)
    return {**line, "score": score, "metric": name, "metrics": dict(metrics)}


def _score(task: Any, kind: str, metrics: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """Return the first metric that is a number for one document, turned so that higher is better."""
    rising = task.higher_is_better()
    order = list(task.aggregation())
    for key in sorted(metrics, key=lambda key: order.index(_metric(key)) if _metric(key) in order else len(order)):
        value = metrics[key]
        if kind == "loglikelihood_rolling" and isinstance(value, list) and len(value) == 2:
            # Log-probability and its unit: nats per word or byte, whatever the task sums them up to.
            return key, value[0] / value[1]
        if isinstance(value, bool | int | float):
            falls = rising.get(_metric(key)) is False and (kind, _metric(key)) != ("loglikelihood", "perplexity")
            return key, -float(value) if falls else float(value)
    return None, None


def _metric(key: str) -> str:
    return key.rpartition(",")[0]


def summary_of(task: Any, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum a task up as lm-eval does, with its own functions and standard errors."""
    from lm_eval.api.metrics import mean, stderr_for_metric

    own = [line["metrics"] for line in lines if line["task"] == task.task_name]
    found: dict[str, Any] = {
        "name": task.task_name,
        "alias": task.get_config("task_alias") or task.task_name,
        "sample_len": len(own),
    }
    for key in dict.fromkeys(key for metrics in own for key in metrics):
        metric, _, name = key.rpartition(",")
        values = [_numbers(metrics[key]) for metrics in own if key in metrics]
        aggregate = task.aggregation().get(metric, mean)
        found[key] = plain(aggregate(values))
        iterations = SLOW_BOOTSTRAP_ITERS if metric in SLOW_METRICS else BOOTSTRAP_ITERS
        error = stderr_for_metric(aggregate, iterations)
        found[f"{metric}_stderr,{name}"] = plain(error(values)) if error and len(values) > 1 else "N/A"
    shots = task.get_config("num_fewshot")
    return {
        **found,
        "version": plain(task.VERSION),
        "num_fewshot": shots,
        "higher_is_better": plain(task.higher_is_better()),
    }


def _numbers(value: Any) -> Any:
    # A file has no word for what is not finite.
    if value is None:
        return float("nan")
    return [_numbers(inner) for inner in value] if isinstance(value, list) else value
