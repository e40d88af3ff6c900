"""Record the kept curves anew: ``python tests/properties/record_trajectories.py --reason "..."``.

Only for a change that is meant to change them. The reason is written beside the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

# As a script it is not part of a package: the folder that holds tests/ is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["OMP_NUM_THREADS"] = "1"


def main() -> None:
    """Run both jobs and write a file for each."""
    # Behind the environment: torch reads it when it is imported.
    from tests.properties.trajectory import FOLDER, OBJECTIVES, curves_of, job, lines_of, stamp

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reason", required=True, help="why the curves are no longer what they were")
    reason = parser.parse_args().reason.strip()
    if len(reason) < 10:
        parser.error("--reason: say in a sentence what changed the numbers")
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        for objective in OBJECTIVES:
            curves = curves_of(lines_of(job(objective, Path(root) / objective, Path(root) / "cache")))
            record = {"reason": reason, "environment": stamp(), **curves}
            (FOLDER / f"{objective}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print(f"{objective}: {len(curves['train/loss'])} steps")


if __name__ == "__main__":
    main()
