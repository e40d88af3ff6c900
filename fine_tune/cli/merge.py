"""`merge`: an adapter and its base become one model folder, proven to say the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fine_tune.cli.verb import run_verb
from fine_tune.cli.words import above_zero, flag, one_of, path, read_words, text
from fine_tune.evaluation_config import check_evaluation
from fine_tune.report.visible import plain, visible
from fine_tune.threads import wait_politely

USAGE = """usage: fine-tune merge ckpt=<checkpoint> [out=<folder>] [key=value ...]

  ckpt=runs/sft                     a run (its final adapter), a checkpoint in one, or a PEFT adapter folder
  out=<folder>                      where the model goes; <run>/merged by default
  base=nf4|bf16                     the weights that the adapter was trained on (default), or the base as its files hold it
  dtype=float32|bfloat16|float16    of the merged weights; that of the base's files by default
  shard_gb=5                        largest file
  tolerance=<number>                largest difference of a logit after reloading; 1e-4 by default
  accelerator=auto|cpu|gpu          where weights are quantised, merged and compared
  overwrite=true                    replace an earlier merge

The folder is loaded in a fresh process with plain transformers and compared with base and adapter, weight by weight and
logit by logit; merge_report.json has the figures. If it does not say the same, nothing is kept and the exit code is 4.
A foreign adapter may need model=<name> or model.path=<folder>."""

READERS = {
    "ckpt": text,
    "out": path,
    "base": one_of("nf4", "fp4", "int8", "bf16"),
    "dtype": one_of("float32", "bfloat16", "float16"),
    "shard_gb": above_zero,
    "tolerance": above_zero,
    "accelerator": one_of("auto", "cpu", "gpu"),
    "overwrite": flag,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the merge verb and return its exit code.

    Args:
        argv: Words after the verb; None takes those of the process.
    """
    return run_verb(argv, USAGE, _merge)


def _merge(words: list[str]) -> None:
    found = read_words(words, READERS, needed=["ckpt"], groups=("model", "method"))
    values = found.values
    cfg = check_evaluation(["ckpt=base", f"accelerator={values.pop('accelerator', 'auto')}", *found.rest])
    # Not through the config's grammar: a path may hold anything.
    cfg["ckpt"] = values.pop("ckpt")
    wait_politely()
    # The first import of torch, after everything that can be refused without it.
    from fine_tune.merging.merge import merge
    from fine_tune.merging.settings import MergeSettings

    settings = MergeSettings(**values)
    print(visible("\n".join(lines(merge(cfg, settings)))))


def lines(report: Mapping[str, Any]) -> list[str]:
    """Say what a merge report says, in a few lines."""
    own, rounding = report["reloaded"], report["against_base_and_adapter"]
    found = [
        f"merged: {report['checkpoint']} into {report['base']}, {report['dtype']}, "
        f"{plain(report['written_gb'], '{:.3g} GB')} in {report['seconds']:.0f} s",
        f"reloaded: {report['num_tensors_compared']} tensors as base and adapter have them, logits within "
        f"{own['max_logit_gap']:.2g} (allowed {report['tolerance']:g}), greedy text "
        f"{'equal' if own['greedy_equal'] else 'equal up to ties'} on {report['num_prompts']} prompts",
    ]
    if report["dtype"] != "float32":
        found.append(
            f"rounded to {report['dtype']}: logits {rounding['max_logit_gap']:.2g} at most from base and adapter in float32, "
            f"{rounding['mean_logit_gap']:.2g} on average, top-1 agreement {rounding['top1_agreement']:.1%}"
        )
    for base, gap in report["bases"].items():
        found.append(
            f"base={base}: {gap['reason']}"
            if "reason" in gap
            else f"base={base}, against what was trained: logits {gap['max_logit_gap']:.2g} at most, {gap['mean_logit_gap']:.2g} "
            f"on average, KL {gap['kl']:.2g} nats, top-1 agreement {gap['top1_agreement']:.1%}"
        )
    return [*found, f"everything is in {report['folder']}"]
