"""Says what came of a quickstart, and whether it is what it should be: `make quickstart` ends with it.

    python tests/quickstart_summary.py runs/quickstart [--strict]

Reads what `mmscale eval --json`, `mmscale sample --json` and examples/digits/recognise.py wrote; it measures nothing.
With --strict, a target that is missed is exit status 1: for CI.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

READ, DRAWN = 0.85, 0.40  # chance is 0.1 for both


def main(run: Path, *, strict: bool) -> int:
    """Print a summary; the exit status."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    drawings = json.loads((run / "drawings.json").read_text())
    found = json.loads((run / "recognition.json").read_text())
    targets = [
        ("held-out digits read", float(evaluation["accuracy/digit"]), READ, "the word after the image, of ten"),
        (
            f"digits drawn, of {found['asked']}",
            found["share"],
            DRAWN,
            f"read as asked by a classifier that reads {found['ceiling']:.1%} of real ones",
        ),
    ]
    print(f"the exported model {evaluation['run']}, in transformers, {evaluation['routing']} routing:")
    missed = 0
    for name, value, target, how in targets:
        reached = value >= target  # false for NaN
        missed += not reached
        verdict = "reached" if reached else "MISSED"
        print(f"  {name:<24}{value:>7.1%}   target {target:.0%} {verdict:<8} {how}")
    print(f"pictures: {run / 'curves.png'} {drawings['sheet']}")
    print(f"page, for a browser: {run / 'report.html'}")
    return int(strict and missed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), strict="--strict" in sys.argv[2:]))
