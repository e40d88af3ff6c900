"""Tasks of lm-evaluation-harness on the loaded model: its prompts, filters and metrics, our items, lines and verdicts."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

import torch

from fine_tune.errors import DataError, FineTuneError
from fine_tune.evaluation.answers import adapter_as_asked
from fine_tune.evaluation.harness_lines import (
    always_binary,
    answer_line,
    plain,
    quiet_bars,
    result_of,
    summary_of,
    target_of,
)
from fine_tune.evaluation.harness_tasks import OTHER_SEED, LoadedTasks, TaskSource, fixed_rng, load_tasks
from fine_tune.evaluation.protocol import Subject, evaluating
from fine_tune.text.conversation import Message
from fine_tune.text.template import ChatTemplate

CHUNK_DOCUMENTS = 128


@dataclass(frozen=True)
class HarnessItem:
    """One document of a task with the requests that it makes."""

    id: str
    task: str
    prompt: str
    target: str
    digest: str
    requests: tuple[Any, ...] = field(repr=False, compare=False)


@dataclass
class Harness:
    """Any task of lm-evaluation-harness; made before a model is loaded, so that what cannot be asked is told at once.

    Attributes:
        tasks: Tasks, groups or tags.
        include_path: Folder with task files of one's own.
        num_fewshot: Examples in each prompt; None takes each task's own number.
        limit: So many documents of each task, the first ones; None takes all.
        apply_chat_template: Whether prompts are rendered by the chat template of the run, examples as earlier turns.
        batch_size: Prompts that are answered at a time.
        micro_batch_tokens: Tokens of one forward pass where log-probabilities are taken.
        download: Whether data may be fetched from the hub.
        unsafe_code: Whether tasks that run code are let in.
        seed: Decides what is drawn, for tasks that ask for a temperature.
    """

    tasks: Sequence[str]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    batch_size: int = 16
    micro_batch_tokens: int = 8192
    download: bool = False
    unsafe_code: bool = False
    seed: int = 0
    name: str = "lm_eval"
    compares: str | None = field(default="score", init=False)
    better: Literal["higher", "lower"] = field(default="higher", init=False)
    _loaded: LoadedTasks = field(init=False, repr=False)
    _built: dict[str, list[HarnessItem]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Load the tasks."""
        source = TaskSource(self.include_path, self.download, self.unsafe_code)
        self._loaded = load_tasks(list(self.tasks), source, num_fewshot=self.num_fewshot)
        if all(map(always_binary, self._loaded.tasks.values())):
            self.compares = "correct"

    def prepare(self, tokenizer: Any, template: ChatTemplate) -> list[HarnessItem]:
        """Build the prompts; without the chat template they are the same for every checkpoint."""
        key = template.sha256 if self.apply_chat_template else ""
        if key not in self._built:
            with fixed_rng():
                self._built[key] = [item for name in self._loaded.tasks for item in self._build(name, template)]
        return self._built[key]

    def _build(self, name: str, template: ChatTemplate) -> list[HarnessItem]:
        task, chat = self._loaded.tasks[name], self.apply_chat_template
        try:
            task.set_fewshot_seed(seed=OTHER_SEED)
            with quiet_bars():
                task.build_all_requests(
                    limit=self.limit,
                    rank=0,
                    world_size=1,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                    chat_template=ChatPrompt(template) if chat else None,
                )
            documents: dict[int, list[Any]] = {}
            for request in task.instances:
                documents.setdefault(request.doc_id, []).append(ending_turns(request, template) if chat else request)
            fingerprint = _fingerprint(task)
            return [_item(name, task, number, found, fingerprint) for number, found in documents.items()]
        except FineTuneError:
            raise
        except Exception as error:  # whatever a task's own templates and functions raise
            raise DataError(
                f"eval.tasks: the prompts of {name} cannot be built ({type(error).__name__}: {error})."
            ) from error

    def chunks(self, items: Sequence[HarnessItem]) -> list[list[int]]:
        """Divide each task into so many documents at a time."""
        tasks: dict[str, list[int]] = {}
        for index, item in enumerate(items):
            tasks.setdefault(item.task, []).append(index)
        return [
            found[i : i + CHUNK_DOCUMENTS] for found in tasks.values() for i in range(0, len(found), CHUNK_DOCUMENTS)
        ]

    def score(self, subject: Subject, items: Sequence[HarnessItem], chunk: list[int]) -> list[dict[str, Any]]:
        """Answer the requests of one chunk and let the task judge them."""
        from fine_tune.evaluation.harness_model import NetworkLM

        asked = [items[i] for i in chunk]
        task = self._loaded.tasks[asked[0].task]
        copies = {item.id: [_fresh(request) for request in item.requests] for item in asked}
        # A compiled layer would be made anew for every length.
        eager = torch.compiler.set_stance("force_eager")
        with evaluating(subject), eager, adapter_as_asked(subject.network, base=subject.base):
            # What a task draws must not depend on the chunks before it.
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{self.seed}:{asked[0].id}".encode()).digest()[:7]))
            sizes = {"batch_size": self.batch_size, "micro_batch_tokens": self.micro_batch_tokens}
            model = NetworkLM(subject, templated=self.apply_chat_template, **sizes)
            _answer(model, [request for requests in copies.values() for request in requests])
        with fixed_rng():
            judged = result_of(task, list(copies.values()))
        lines = []
        for item, metrics in zip(asked, judged, strict=True):
            line = {"id": item.id, "prompt": item.prompt, "target": item.target, "task": item.task}
            cut = any(request.args[0] in model.cut for request in item.requests)
            lines.append({**line, **answer_line(task, copies[item.id], metrics), "cut": cut})
        return lines

    def metrics(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return lm-eval's own figures by task and group, the values among them also flat, as ``task/metric``."""
        with fixed_rng(), quiet_bars():
            tasks = {name: summary_of(task, lines) for name, task in self._loaded.tasks.items()}
            groups = {name: plain(group.aggregate(tasks)) for name, group in self._loaded.groups.items()}
        flat = {
            f"{name}/{key.removesuffix(',none')}": value
            for name, found in (*groups.items(), *tasks.items())
            for key, value in found.items()
            if "," in key and "_stderr," not in key
        }
        return {
            **flat,
            "num_cut": sum(line["cut"] for line in lines),
            "tasks": tasks,
            "groups": groups,
            "lm_eval": version("lm_eval"),
        }

    def groups(self, line: Mapping[str, Any]) -> str | None:
        """Group by task."""
        return str(line["task"])

    def note(self, items: Sequence[HarnessItem], tokenizer: Any) -> str:
        """Say what is asked, for the terminal."""
        counts = {name: sum(item.task == name for item in items) for name in self._loaded.tasks}
        return f"lm-evaluation-harness {version('lm_eval')}: {', '.join(f'{name} {n:,}' for name, n in counts.items())}"


@dataclass(frozen=True)
class ChatPrompt:
    """The run's chat template in the place of lm-eval's: prompts read as training's do."""

    template: ChatTemplate

    def __call__(self, turns: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Render turns; without a generation prompt the last one is an answer that is begun and goes on."""
        messages = [Message(turn["role"], turn["content"]) for turn in turns]  # type: ignore[arg-type]
        if add_generation_prompt:
            return self.template.render(messages, add_generation_prompt=True)
        return self.template.render(messages[:-1], add_generation_prompt=True) + messages[-1].content


def ending_turns(request: Any, template: ChatTemplate) -> Any:
    """Let a generation also end where the template ends a turn."""
    if request.request_type == "generate_until":
        context, options = request.args
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        request.arguments = (context, {**options, "until": [*until, template.end_of_turn]})
    return request


def _item(name: str, task: Any, number: int, requests: Sequence[Any], fingerprint: str) -> HarnessItem:
    arguments = plain([[request.request_type, request.args, request.repeats] for request in requests])
    digest = hashlib.sha256(json.dumps([fingerprint, arguments]).encode()).hexdigest()
    prompt = str(requests[0].args[0])
    return HarnessItem(f"{name}/{number}", name, prompt, target_of(task, requests), digest, tuple(requests))


def _fingerprint(task: Any) -> str:
    """Hash what a task says about itself, its version and the library's."""
    # Where its file lies decides no answer, and a function is its source.
    config = {key: value for key, value in task.dump_config().items() if key != "metadata"}
    known = json.dumps([version("lm_eval"), str(task.VERSION), config], default=_source, sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()


def _source(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return str(getattr(value, "__qualname__", type(value).__qualname__))


def _fresh(request: Any) -> Any:
    request = copy.copy(request)
    request.resps, request.filtered_resps = [], {}
    return request


def _answer(model: Any, requests: Sequence[Any]) -> None:
    """Put the model's answers into requests, kind by kind, each as often as its task repeats it."""
    for kind in dict.fromkeys(request.request_type for request in requests):
        asked = [request for request in requests if request.request_type == kind for _ in range(request.repeats or 1)]
        for request, answer in zip(asked, getattr(model, kind)(asked, disable_tqdm=True), strict=True):
            request.resps.append(answer)
