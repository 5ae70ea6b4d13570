"""Two models fused into one, against models from scratch with the same FLOPs: the table of docs/untied.md.

    python docs/measurements/fuse.py FOLDER SEED [SEED ...]

Prepares emoji (examples/emoji) as three data sets of one vocabulary: names alone, pictures alone, and both. For each
seed it trains a text model and an image model, fuses them in both ways, trains the results on for 10 % of the steps,
and trains models from scratch. Held-out losses are those of the set with both. Data, runs and losses that FOLDER has
are not made again. FOLDER/fuse.json has all losses; the table goes to the terminal.
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
from pathlib import Path

from commands import mmscale

log = logging.getLogger(__name__)
EXAMPLE = Path(__file__).parents[2] / "examples" / "emoji" / "write_documents.py"
TEXT, IMAGE, ON = 150, 450, 60  # steps of the two models, and of training on: a tenth of both together
KEYS = ("loss/text", "loss/image", "loss", "conditional_loss/text_given_image", "conditional_loss/image_given_text")
ALL = TEXT + IMAGE + ON
UNTIED = "model.untie=[attention,ffn,norms]"
TAIL = ("optim.warmup=6", "checkpoint.allow_missing=true")
CONFIG = {
    "vocab": {"modalities": [{"name": "text", "size": 1024}, {"name": "image", "size": 512}], "pad_multiple": 64},
    "model": {
        "kind": "dense",
        "num_layers": 4,
        "hidden_size": 96,
        "ffn_hidden_size": 256,
        "num_attention_heads": 4,
        "seq_length": 256,
        "dropout": 0.1,
    },
    "train": {"micro_batch_size": 4, "global_batch_size": 4, "eval_every": 0},
    "optim": {"lr": 2e-3, "min_lr": 0, "warmup": 30, "schedule": "linear", "weight_decay": 0.1},
    "precision": {"dtype": "fp32"},
    "checkpoint": {"every": 10000, "keep": 1},
}
PREPARE = {"image": {"kind": "kmeans", "size": 32, "channels": 3, "patch": 4}}


def write_parts(folder: Path) -> None:
    """Documents of the names alone and of the pictures alone, in the splits of the set with both."""
    subprocess.run([sys.executable, EXAMPLE, "--out", folder], check=True)
    with (folder / "text.jsonl").open("w") as texts, (folder / "image.jsonl").open("w") as images:
        for line in (folder / "documents.jsonl").read_text().splitlines():
            document = json.loads(line)
            for item in document["content"]:
                if item["type"] == "text":
                    print(json.dumps(document | {"content": [item]}), file=texts)
                elif document["id"].endswith("describe"):  # each picture once
                    print(json.dumps(document | {"content": [item]}), file=images)


def prepare(folder: Path) -> Path:
    """The three data sets; returns the configuration."""
    config = folder / "config.yaml"
    if not config.exists():
        write_parts(folder / "documents")
        files = [str(folder / "documents" / "documents.jsonl")]
        settings = CONFIG | {"data": {"path": str(folder / "both"), "prepare": PREPARE | {"documents": files}}}
        spec = folder / "spec.yaml"
        spec.write_text(json.dumps(settings))
        mmscale("data", "prepare", spec, "--out", folder / "both")
        for name in ("text", "image"):
            file = folder / "documents" / f"{name}.jsonl"
            mmscale("data", "prepare", "--documents", file, "--like", folder / "both", "--out", folder / name)
        config.write_text(json.dumps(CONFIG | {"run": {"dir": str(folder / "runs")}}))
    return config


class Measurement:
    """Losses of one seed."""

    def __init__(self, folder: Path, config: Path, seed: int) -> None:
        self.folder, self.config, self.seed = folder, config, seed
        self.file = folder / f"losses-{seed}.json"
        self.losses: dict[str, dict[str, float]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / f"{name}-{self.seed}"

    def train(self, name: str, data: str, steps: int, *settings: str) -> Path:
        """A model from scratch."""
        run = self.run(name)
        if name not in self.losses:
            where = (f"run.name={run.name}", f"run.seed={self.seed}", f"data.path={self.folder / data}")
            mmscale("train", self.config, *where, f"train.steps={steps}", *settings)
            self.evaluate(name, run)
        return run

    def fuse(self, name: str, *options: str) -> None:
        """A fused model, before and after it is trained on."""
        run, before = self.run(name), f"{name} before"
        if before not in self.losses:
            if not run.exists():
                mmscale("ckpt", "fuse", self.run("text"), self.run("image"), run, "--steps", ON, *options)
            self.evaluate(before, run)
        if name not in self.losses:
            mmscale("train", run / "config.yaml", f"data.path={self.folder / 'both'}", *TAIL)
            self.evaluate(name, run)

    def evaluate(self, name: str, run: Path) -> None:
        """Held-out losses on the set with both modalities."""
        found = mmscale("eval", run, "--data", self.folder / "both")
        self.losses[name] = {key: found[key] for key in KEYS}
        self.file.write_text(json.dumps(self.losses, indent=1))
        log.info("seed %d: %s %s", self.seed, name, self.losses[name])

    def measure(self) -> dict[str, dict[str, float]]:
        """Losses of all models, by name."""
        self.train("text", "text", TEXT)
        self.train("image", "image", IMAGE)
        self.fuse("fused")
        self.fuse("average", "--average")
        self.train("mot", "both", ALL, UNTIED)
        self.train("dense", "both", ALL)
        self.train("mot_briefly", "both", ON, UNTIED, "optim.warmup=6")
        return self.losses


def main(folder: Path, seeds: list[int]) -> None:
    """Measure the seeds, and print means and standard deviations."""
    config = prepare(folder)
    found = {seed: Measurement(folder, config, seed).measure() for seed in seeds}
    (folder / "fuse.json").write_text(json.dumps(found, indent=1))
    for name in found[seeds[0]]:
        row = []
        for key in KEYS:
            values = [losses[name][key] for losses in found.values()]
            row.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}")
        log.info("| %s | %s |", name, " | ".join(row))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]])
