"""The same jobs from Python and notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fine_tune.allocator import let_segments_grow
from fine_tune.interrupts import Interrupted
from fine_tune.threads import wait_politely


def train(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Fine-tune, as ``python train.py`` with these overrides does, and return the run's summary.

    Args:
        overrides: Words such as ``"method.rank=8"``, as on the command line.

    Returns:
        The content of ``summary.json``.

    Raises:
        ConfigError: The overrides are refused; all problems are listed together.
        FineTuneError: The run stopped; the class says why.
        KeyboardInterrupt: It was interrupted, after saving a checkpoint.

    Example:
        >>> import fine_tune
        >>> fine_tune.train(["method.rnk=8"])
        Traceback (most recent call last):
        fine_tune.errors.ConfigError: 1 problem(s) in the config:
          - method.rnk: unknown key. Did you mean method.rank?
    """
    # Imported here, so that importing fine_tune stays instant.
    from fine_tune.config import check_config

    cfg = check_config(overrides).cfg
    let_segments_grow()
    wait_politely()
    from fine_tune.runs import run

    try:
        return run(cfg, overrides=list(overrides)).summary
    except Interrupted as stopped:
        if stopped.exit_code == 130:
            # So that "run all cells" ends here, as it does with an interrupt anywhere else.
            raise KeyboardInterrupt(str(stopped)) from stopped
        raise


def evaluate(overrides: Sequence[str]) -> dict[str, Any]:
    """Evaluate checkpoints, as ``python evaluate.py`` with these overrides does.

    Args:
        overrides: Words such as ``"ckpt=[base,runs/sft]"``, as on the command line.

    Returns:
        ``results`` (metrics by checkpoint), ``verdicts`` and the ``folder`` they are in.

    Raises:
        ConfigError: The overrides are refused; all problems are listed together.
        FineTuneError: The evaluation stopped; the class says why.

    Example:
        >>> import fine_tune
        >>> fine_tune.evaluate([])
        Traceback (most recent call last):
        fine_tune.errors.ConfigError: 1 problem(s) in the config:
          - ckpt: no value. Pass ckpt=<run, checkpoint, adapter, model or base>, or a list such as ckpt=[base,runs/sft].
    """
    from fine_tune.evaluation_config import check_evaluation

    cfg = check_evaluation(overrides)
    let_segments_grow()
    wait_politely()
    from fine_tune.evaluating import run_evaluation

    try:
        return run_evaluation(cfg)
    except Interrupted as stopped:
        if stopped.exit_code == 130:
            raise KeyboardInterrupt(str(stopped)) from stopped
        raise
