"""Small models on names alone, pictures alone and both: the scaling laws of docs/scaling.md.

    sh examples/icons/prepare.sh                                     # the icons of docs/eta.md
    mmscale data prepare examples/icons/equal_loss.yaml --out data/icons-eta
    mmscale data dedup data/icons-eta --match image --max-cluster 20000
    python docs/measurements/scaling_icons.py FOLDER prepare runs fit

`prepare`: the names and the pictures of data/icons-eta as sets of their own, with its tokenizers. `runs`: for each kind
of data three sizes with three numbers of tokens each, dense, and on both also untied; each a run of its own that decays
to its end, in one process with one thread. A run that is finished is not repeated. `fit`: the laws of dense models and
of untied ones, to the terminal and to FOLDER/scaling.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from commands import mmscale

from mmscale.config.load import load

log = logging.getLogger(__name__)
CONFIG = Path("examples/icons/equal_loss.yaml")
DOCUMENTS, BOTH = Path("data/icons-documents/documents"), Path("data/icons-eta")
WIDTHS = (24, 48, 96)
STEPS = (200, 400, 800)
SEQUENCES, LENGTH = 4, 320  # of a step
UNTIED = "model.untie=[attention,ffn,norms]"
# Documents that show each name and each picture once.
PARTS = {"text": " draw", "image": " read"}


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        kind: text, image, both or untied.
        width: hidden size.
        steps: of training.
    """

    kind: str
    width: int
    steps: int

    @property
    def name(self) -> str:
        """Of the run folder."""
        return f"{self.kind}_{self.width}_{self.steps}"

    def settings(self, folder: Path) -> list[str]:
        """What differs from the dense baseline."""
        data = folder / self.kind if self.kind in PARTS else BOTH
        size = (f"model.hidden_size={self.width}", f"model.ffn_hidden_size={self.width * 11 // 4}")
        return [
            f"run.name={self.name}",
            f"run.dir={folder / 'runs'}",
            f"data.path={data}",
            *size,
            f"train.steps={self.steps}",
            f"train.micro_batch_size={SEQUENCES}",
            f"train.global_batch_size={SEQUENCES}",
            "train.eval_every=0",
            "train.eval_batches=60",
            f"optim.decay={self.steps // 2}",
            "optim.warmup=20",
            "checkpoint.every=0",
            *([UNTIED] if self.kind == "untied" else []),
        ]


def planned() -> Iterator[Run]:
    """All runs, the cheapest of each kind first."""
    for width in WIDTHS:
        for steps in STEPS:
            for kind in (*PARTS, "both", "untied"):
                yield Run(kind, width, steps)


def prepare(folder: Path) -> None:
    """The sets of names alone and of pictures alone."""
    for kind, ending in PARTS.items():
        documents = folder / "documents" / kind
        documents.mkdir(parents=True, exist_ok=True)
        for file in sorted(DOCUMENTS.glob("*.parquet")):
            table = pq.read_table(file)
            rows = [only(row, kind) for row in table.to_pylist() if row["id"].endswith(ending)]
            pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), documents / file.name)
        out = folder / kind
        if not (out / "manifest.json").exists():  # goes on where it was ended
            mmscale("data", "prepare", "--documents", f"{documents}/*.parquet", "--like", BOTH, "--out", out)


def only(document: dict[str, Any], kind: str) -> dict[str, Any]:
    """A document's parts of one modality."""
    return document | {"content": [part for part in document["content"] if part["type"] == kind]}


def train(folder: Path) -> None:
    """Every run that is not finished."""
    files = folder / "baselines"
    shutil.rmtree(files, ignore_errors=True)  # the configuration may have changed
    mmscale("baselines", CONFIG, "--out", files)
    dense = files / f"{load(CONFIG).run.name}_dense.yaml"
    for run in planned():
        done = folder / "finished" / run.name
        if not done.exists():
            mmscale("train", dense, *run.settings(folder), one_thread=True)
            done.parent.mkdir(exist_ok=True)
            done.touch()
            log.info("%s is finished", run.name)


def fit(folder: Path) -> None:
    """The laws of dense and of untied models."""
    found = {}
    for pair in ("both", "untied"):
        runs = [folder / "runs" / run.name for run in planned() if run.kind in (*PARTS, pair)]
        picture = folder / f"scaling_{pair}.png"
        found[pair] = mmscale("scaling", "fit", *runs, "--out", picture)
    (folder / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    log.info("%s", json.dumps(found, indent=1))


STAGES = {"prepare": prepare, "runs": train, "fit": fit}


def main() -> None:
    """The stages named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("stages", nargs="+", choices=tuple(STAGES))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for stage in options.stages:
        STAGES[stage](options.folder.resolve())


if __name__ == "__main__":
    main()
