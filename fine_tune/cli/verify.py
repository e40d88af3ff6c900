"""`verify`: replay an artifact's passport against a model folder or a server."""

from __future__ import annotations

from collections.abc import Sequence

from fine_tune.cli.verb import run_verb
from fine_tune.cli.words import above_zero, one_of, path, read_words, text
from fine_tune.errors import ConfigError
from fine_tune.evaluation_config import check_evaluation
from fine_tune.report.visible import visible
from fine_tune.threads import wait_politely

USAGE = """usage: fine-tune verify passport=<folder or file> model=<folder>
       fine-tune verify passport=<folder or file> url=http://host:port/v1 [model_name=<name>] [key_env=<variable>]

  passport=runs/sft                 a run, an adapter or a merged folder, or its passport.json
  model=runs/sft/merged             a model folder, or an adapter's
  url=http://localhost:8000/v1      vLLM, llama.cpp's server, Ollama, or another OpenAI-compatible server
  model_name=<name>                 the server's name of the model; its first by default
  key_env=<variable>                the environment variable that holds the server's key
  tolerance=<nats>                  what rounding may move a log-probability by; 0.25, or 0.01 where both are float32
  timeout_seconds=120               how long an answer may take
  accelerator=auto|cpu|gpu          where a folder is loaded

Says where the replay first differs: in the prompt's token ids, in the first token, or later. Exit code 10 if it does."""

READERS = {
    "passport": path,
    "model": path,
    "url": text,
    "model_name": text,
    "key_env": text,
    "tolerance": above_zero,
    "timeout_seconds": above_zero,
    "accelerator": one_of("auto", "cpu", "gpu"),
}
OF_SERVERS = ("model_name", "key_env", "timeout_seconds")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verify verb and return its exit code.

    Args:
        argv: Words after the verb; None takes those of the process.
    """
    return run_verb(argv, USAGE, _verify)


def _verify(words: list[str]) -> None:
    values = read_words(words, READERS, needed=["passport"]).values
    problems = [f"{key}: belongs to url=. Leave it out." for key in OF_SERVERS if key in values and "url" not in values]
    if ("model" in values) == ("url" in values):
        problems.append("model, url: pass one of them, what is to be checked against the passport.")
    if problems:
        raise ConfigError(problems)
    defaults = check_evaluation(["ckpt=base", f"accelerator={values.pop('accelerator', 'auto')}"])
    wait_politely()
    # The first import of torch, after everything that can be refused without it.
    from fine_tune.verifying.verify import Diverges, conclusion, verify

    findings = verify(values, defaults)
    for finding in findings:
        print(visible(f"{finding.name:<12} {finding.stage or 'same':<12} {finding.detail}"))
    problem = conclusion(findings)
    if problem is not None:
        raise Diverges(problem)
    print(f"the same on {len(findings)} prompts")
