"""Models of equal FLOPs per token on the icons: the runs of docs/eta.md.

    sh examples/icons/prepare.sh                                        # fetches and renders the icons
    mmscale data prepare examples/icons/equal_loss.yaml --out data/icons-eta
    mmscale data dedup data/icons-eta --match image --max-cluster 20000
    python docs/measurements/eta_icons.py FOLDER rates choices runs [--jobs 2] [--seeds 3]
    python docs/measurements/eta_icons.py FOLDER collect
    python docs/measurements/eta_icons.py FOLDER rebuild               # from the published curves
    mmscale compare FOLDER/rebuilt/dense_s* FOLDER/rebuilt/4t4i_s* ...

`rates`: four learning rates for dense and 4t4i, a quarter of the steps. `choices`: ranking x capacity of 4t4i and
moe8x, a quarter of the steps. `runs`: every model, its auxiliary routers, and its losses on the whole held-out split.
Each run is one process with one thread; --jobs of them run at once. A run that is finished is not repeated, one that
was ended goes on. `collect` writes FOLDER/eta_icons.json with the curves of all runs that are finished, and of those
in docs/measurements/eta_icons.json, which are not repeated either. `rebuild` makes folders of the runs that are in that
file, as far as `mmscale compare` reads them.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import mmscale
from run_folders import rebuild

from mmscale.config.load import load

log = logging.getLogger(__name__)
CONFIG = Path("examples/icons/equal_loss.yaml")
SHORT = 325  # steps of a run that only decides a setting
RATES = (2.5e-3, 5e-3, 1e-2, 2e-2)
SEEDED = ("dense", "4t4i", "moe8x", "mot")  # three seeds each; one of the others
OTHERS = ("1t1i", "mod_4t4i", "4t4i_untied", "mot_4t1i", "tc_8x", "tc_4t4i")
PAPER = ("4t4i", "moe8x")  # also with the paper's ranking, by the sigmoid of the router's logit
PUBLISHED = Path("docs/measurements/eta_icons.json")
CHOICES = ("sigmoid", "competitive", "softmax")
CAPACITIES = ("nominal", "actual")
CURVES = ("loss", "loss/text", "loss/image")
HELD_OUT = tuple(f"eval/{routing}{name}" for routing in ("", "causal/") for name in CURVES)


@dataclass(frozen=True)
class Run:
    """A run of a baseline.

    Attributes:
        stage: rates, choices or runs.
        model: name of the baseline.
        name: of the run folder.
        settings: what differs from the baseline's file.
    """

    stage: str
    model: str
    name: str
    settings: tuple[str, ...] = ()


def planned(seeds: int) -> Iterator[Run]:
    """All runs, in the order in which they start."""
    short = (f"train.steps={SHORT}", f"optim.decay={SHORT // 5}", "run.seed=1")
    for model in ("dense", "4t4i"):
        for rate in RATES:
            yield Run("rates", model, f"rate_{model}_{rate:g}", (*short, f"optim.lr={rate:g}"))
    for model in ("4t4i", "moe8x"):
        for choice in CHOICES:
            for capacity in CAPACITIES:
                settings = (f"model.experts.choice={choice}", f"model.experts.capacity={capacity}")
                yield Run("choices", model, f"choice_{model}_{choice}_{capacity}", (*short, *settings))
    for seed in range(1, seeds + 1):
        for model in SEEDED + OTHERS if seed == 1 else SEEDED:
            yield Run("runs", model, f"{model}_s{seed}", (f"run.seed={seed}",))
        for model in PAPER if seed == 1 else ():
            settings = ("run.seed=1", "model.experts.choice=sigmoid")
            yield Run("runs", model, f"{model}_sigmoid_s1", settings)


class Measurement:
    """Runs in a folder."""

    def __init__(self, folder: Path, config: Path, known: Path) -> None:
        self.folder, self.config = folder, config
        self.base = load(config).run.name
        self.known: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}

    def baselines(self) -> Path:
        """The folder of the models' configurations."""
        files = self.folder / "baselines"
        shutil.rmtree(files, ignore_errors=True)  # the configuration may have changed
        mmscale("baselines", self.config, "--out", files, one_thread=True)
        return files

    def train(self, run: Run) -> None:
        """Train a run, unless it is finished; `runs` also get auxiliary routers and losses on the whole split."""
        out = self.folder / "runs" / run.name
        done = self.folder / "finished" / f"{run.name}.json"
        if done.exists() or run.name in self.known:
            return
        file = self.folder / "baselines" / f"{self.base}_{run.model}.yaml"
        found: dict[str, Any] = {"model": run.model, "settings": run.settings}
        where = (f"run.name={run.name}", f"run.dir={self.folder / 'runs'}")
        mmscale("train", file, *where, *run.settings, one_thread=True)
        if run.stage == "runs":
            found["joint"] = self.evaluate(out)
            if load(file).model.auxiliary.mode == "joint":
                mmscale("train", file, *where, *run.settings, "--stage", "auxiliary", one_thread=True)
                found["stage"] = self.evaluate(out)
        done.parent.mkdir(exist_ok=True)
        done.write_text(json.dumps(found, indent=1))
        log.info("%s is finished", run.name)

    def evaluate(self, run: Path) -> dict[str, float]:
        """Losses on the whole held-out split under both routings, and accuracy of the task `which`."""
        found = {}
        for routing in ("batch", "causal"):
            result = mmscale("eval", run, "--routing", routing, one_thread=True)
            found |= {f"{routing}/{key}": value for key, value in result.items() if key.startswith("loss")}
        return found

    def collect(self) -> None:
        """Curves of all finished runs, with those that were known before."""
        runs = dict(self.known)
        for file in sorted((self.folder / "finished").glob("*.json")):
            out = self.folder / "runs" / file.stem
            runs[file.stem] = json.loads(file.read_text()) | curves(out)
        # One line for each run.
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(runs[name])}" for name in sorted(runs))
        (self.folder / "eta_icons.json").write_text(f"{{\n{lines}\n}}\n")


def whole_runs(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those of the stage `runs`, dense first: its curves, joint routers and losses on the whole split are known."""
    found = {name: run for name, run in runs.items() if "joint" in run}
    return dict(sorted(found.items(), key=lambda one: (one[1]["model"] != "dense", one[0])))


def curves(run: Path) -> dict[str, list[float]]:
    """Training losses and held-out losses of a run folder, each with its steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, list[float]] = {}
    for axis, names in (("training_step", CURVES), ("step", HELD_OUT)):
        # The routings of one evaluation are separate lines. What a resumed run repeats counts once.
        points: dict[int, dict[str, float]] = {}
        for line in lines:
            points.setdefault(line["step"], {}).update({name: line[name] for name in names if name in line})
        having = {step: values for step, values in points.items() if names[0] in values}
        found[axis] = list(having)
        for name in names:
            if all(name in values for values in having.values()):
                found[name] = [round(values[name], 4) for values in having.values()]
    return found


def main() -> None:
    """The stages named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("stages", nargs="+", choices=("rates", "choices", "runs", "collect", "rebuild"))
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--known", type=Path, default=PUBLISHED, help="curves of runs that are not repeated")
    parser.add_argument("--seeds", type=int, default=3, help=f"of {', '.join(SEEDED)}")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    measurement = Measurement(options.folder.resolve(), options.config, options.known)
    if "rebuild" in options.stages:
        rebuild(whole_runs(measurement.known), load(options.config), measurement.folder / "rebuilt")
    if not set(options.stages) <= {"collect", "rebuild"}:
        measurement.baselines()
    chosen = [run for run in planned(options.seeds) if run.stage in options.stages]
    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in pool.map(measurement.train, chosen):
            pass
    if "collect" in options.stages:
        measurement.collect()


if __name__ == "__main__":
    main()
