"""`demo`: the whole story on the built-in world, base to SFT to DPO to a verdict, and one page that shows it."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from fine_tune.cli.verb import tell, tell_stopped
from fine_tune.errors import ConfigError, FineTuneError
from fine_tune.visible import visible

USAGE = """usage: fine-tune demo [out=<folder>] [open=true|false]

Trains the built-in 4-bit model on questions (SFT), then on preferences (DPO), asks the base and both of them the same
held-out questions, and writes a report: a few minutes on two CPU cores, no network. What is finished in the folder is
not done again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo verb and return its exit code.

    Args:
        argv: Words after the verb; None takes those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return 0
    try:
        out, shown = _read(words)
        report = demo(out)
    except FineTuneError as error:
        return tell(error)
    except KeyboardInterrupt as stopped:
        return tell_stopped(stopped)
    print(visible(f"the report: {report}"))
    if shown:
        webbrowser.open(report.resolve().as_uri())
    return 0


def demo(out: Path) -> Path:
    """Train, compare and report below a folder, and return the report's file."""
    import fine_tune
    from fine_tune.report.page import write_report

    sft, dpo = out / "sft", out / "dpo"
    for folder, more in ((sft, []), (dpo, ["objective=dpo", f"init_from={_quoted(sft)}"])):
        if not (folder / "summary.json").is_file():
            start = [f"resume={_quoted(folder)}"] if (folder / "config.yaml").is_file() else [f"run_dir={_quoted(folder)}", *more]
            fine_tune.train(start)
    fine_tune.evaluate([f"ckpt=[base,{_quoted(sft)},{_quoted(dpo)}]", "eval=exact_match"])
    fine_tune.evaluate([f"ckpt=[{_quoted(sft)},{_quoted(dpo)}]", "eval=preference"])
    return write_report(dpo, out / "report.html", others=[sft])


def _quoted(path: Path) -> str:
    """Write a path as one value, whatever is in it."""
    return "'" + str(path).replace("'", "\\'") + "'"


def _read(words: Sequence[str]) -> tuple[Path, bool]:
    values = {"out": "runs/demo", "open": "true" if sys.stdout.isatty() else "false"}
    for word in words:
        key, mark, value = word.partition("=")
        if not mark or key not in values or (key == "open" and value not in ("true", "false")) or not value:
            raise ConfigError(f"{word}: not for demo. It takes out=<folder> and open=true or open=false.")
        values[key] = value
    return Path(values["out"]).expanduser(), values["open"] == "true"
