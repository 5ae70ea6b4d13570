"""Tasks that `mmscale eval --task NAME` has built in.

mmscale/inference/built_in_tasks.py computes them.
"""

from __future__ import annotations

from mmscale.tables.table import Choice, Table

EVAL_TASKS: Table[Choice] = Table(
    "Built-in tasks",
    ("eval --task",),
    {
        "memorisation": Choice(
            meaning="share of the tokens of training documents and canaries that are the most likely ones in their "
            "places, by number of copies (Tirumala et al. 2022, 2205.10770)"
        ),
    },
)
