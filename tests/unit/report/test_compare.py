"""Comparing run folders: planted speed-ups come out per modality, what is not comparable is refused or noted."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from launch.goodput import goodput
from mmscale.checkpoint.layout import INFO, Store
from mmscale.cli import main
from mmscale.config import Config
from mmscale.config.derived import tokens_per_step
from mmscale.config.load import dump, resolve
from mmscale.errors import UsageError
from mmscale.plan import flops_per_token
from mmscale.report import compare_view, facts, history, page
from mmscale.report.compare import compare
from mmscale.report.comparison_section import comparison_section
from mmscale.report.equal_loss import Bound
from mmscale.report.run_losses import ALL, read_run
from mmscale.runs.metrics import METRICS
from mmscale.train.log.metrics_log import MetricsLog

SPEEDUPS = {"text": 2.0, "image": 4.0}
STEPS = 600


def config(*overrides: str, kind: str = "dense", mode: str = "off", **model: Any) -> Config:
    counts = {"counts": {"text": 4, "image": 4}, "share": {"text": 0.5, "image": 0.5}} if kind == "moma" else {}
    values = {
        "vocab": {"modalities": [{"name": "text", "size": 100}, {"name": "image", "size": 60}]},
        "model": {
            "kind": kind,
            "num_layers": 2,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_attention_heads": 4,
            "seq_length": 64,
            "experts": counts,
            "auxiliary": {"mode": mode},
        }
        | model,
        "data": {"path": "data/none"},
        "train": {"steps": STEPS},
        "optim": {"schedule": "constant"},
    }
    return resolve(values, overrides)


def law(flops: float, speedup: float) -> float:
    return 1.0 + 30.0 * (speedup * flops) ** -0.1


def make_run(
    folder: Path,
    settings: Config,
    *,
    speedups: dict[str, float],
    causal: dict[str, float] | None = None,
    step_time_s: float | None = 0.5,
    nan_at: Sequence[int] = (),
) -> Path:
    """A run whose losses fall as if it needed 1/speedup of the dense model's FLOPs, seconds per step as given."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(settings))
    log = MetricsLog(folder, attempt=1)
    per_step = tokens_per_step(settings) * flops_per_token(settings).training

    def losses(step: int, by: dict[str, float], prefix: str = "") -> dict[str, float]:
        found = {f"{prefix}loss/{name}": law(step * per_step, speedup) for name, speedup in by.items()}
        return {f"{prefix}loss": math.nan if step in nan_at else float(np.mean(list(found.values())))} | found

    for step in range(2, STEPS + 1, 2):
        log.write(step, losses(step, speedups) | ({} if step_time_s is None else {"step_time_s": step_time_s}))
        if step % 20 == 0:
            log.write(step, losses(step, speedups, "eval/"))
            if causal is not None:
                log.write(step, losses(step, causal, "eval/causal/"))
    log.close()
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    dense = make_run(tmp_path / "dense", config(), speedups=dict.fromkeys(SPEEDUPS, 1.0))
    sparse = make_run(
        tmp_path / "4t4i",
        config(kind="moma", mode="joint"),
        speedups=SPEEDUPS,
        causal={name: value / 2 for name, value in SPEEDUPS.items()},
        step_time_s=0.6,
    )
    return dense, sparse


def test_planted_speedups(runs: tuple[Path, Path]) -> None:
    found = compare(*runs[:1], runs[1:])
    assert found.parts == (ALL, "text", "image")
    for share in (0.25, 0.5, 0.75, 1.0):
        for part, speedup in SPEEDUPS.items():
            for view, factor in (("training", 1.0), ("held_out", 1.0), ("causal", 0.5)):
                one = found.find("4t4i", view, part, "flops", share)
                assert one is not None
                assert one.ratio.value == pytest.approx(speedup * factor, rel=0.02)
        overall = found.find("4t4i", "training", ALL, "flops", share)
        assert overall is not None
        assert 2.0 < overall.ratio.value < 4.0
    # Seconds: the sparse step takes 0.6 s instead of 0.5 s and a little more FLOPs (its routers).
    flops, seconds = (found.find("4t4i", "held_out", "image", measure, 0.5) for measure in ("flops", "seconds"))
    assert flops is not None
    assert seconds is not None
    more = found.models[0].runs[0].flops_per_token / found.baseline.runs[0].flops_per_token
    assert seconds.ratio.value == pytest.approx(flops.ratio.value * more * 0.5 / 0.6, rel=1e-6)


def test_own_last_loss_is_a_bound(runs: tuple[Path, Path]) -> None:
    found = compare(runs[0], [runs[1]], shares=[0.5], losses=[law(1e12, 1.0), 0.5])
    ends = [one for one in found.speedups if one.share is None and one.part == "image" and one.view == "training"]
    assert ends[0].ratio.bound is Bound.AT_LEAST
    # The dense run's whole work over the middle of the last of 64 bins in log(work).
    assert ends[0].ratio.value == pytest.approx((STEPS / 2) ** (0.5 / 64), rel=0.02)
    assert not any(one.loss == 0.5 for one in found.speedups)  # neither reaches it
    short = make_run(runs[0].parent / "short", config("optim.lr=1"), speedups=SPEEDUPS)
    lines = (short / "metrics.jsonl").read_text().splitlines()
    (short / "metrics.jsonl").write_text("\n".join(lines[:2]))
    with pytest.raises(UsageError, match="no loss in common that was measured three times"):
        compare(runs[0], [short])


def test_a_model_that_never_reaches_the_baseline(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    worse = make_run(tmp_path / "worse", config("optim.lr=0.1"), speedups=dict.fromkeys(SPEEDUPS, 0.5))
    one = compare(runs[0], [worse]).find("worse", "held_out", ALL, "flops", 1.0)
    assert one is not None
    assert one.ratio.bound is Bound.AT_MOST
    assert one.ratio.value == pytest.approx(1.0)


def test_seeds_are_one_model(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    for seed, factor in ((2, 1.5), (3, 0.75)):
        make_run(
            tmp_path / f"4t4i_{seed}",
            config(f"run.seed={seed}", "run.name=other", "parallel.ep=2", kind="moma", mode="joint"),
            speedups={name: value * factor for name, value in SPEEDUPS.items()},
        )
    found = compare(runs[0], [runs[1], tmp_path / "4t4i_2", tmp_path / "4t4i_3", runs[1]])
    assert [(model.name, len(model.runs)) for model in found.models] == [("4t4i", 3)]
    one = found.find("4t4i", "training", "text", "flops", 0.5)
    assert one is not None
    assert one.ratio.pairs == 3
    assert (one.ratio.low, one.ratio.high) == (pytest.approx(1.5, rel=0.02), pytest.approx(3.0, rel=0.02))
    assert 1.5 < one.ratio.value < 3.0


def test_a_young_seed_takes_nothing_away(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    for seed, steps in ((2, STEPS), (3, 30)):
        folder = make_run(
            tmp_path / f"4t4i_{seed}",
            config(f"run.seed={seed}", kind="moma", mode="joint"),
            speedups=SPEEDUPS,
            causal=SPEEDUPS,
        )
        lines = [line for line in (folder / "metrics.jsonl").open() if json.loads(line)["step"] <= steps]
        (folder / "metrics.jsonl").write_text("".join(lines))
    found = compare(runs[0], [runs[1], tmp_path / "4t4i_2", tmp_path / "4t4i_3"])
    (note,) = [note for note in found.notes if "points" in note]
    assert note.startswith(f"4t4i: {tmp_path / '4t4i_3'} has fewer than three points of held_out losses, causal losses")
    one = found.find("4t4i", "held_out", "text", "flops", 0.5)
    assert one is not None
    assert (one.ratio.value, one.ratio.pairs) == (pytest.approx(2.0, rel=0.02), 2)


def test_rows_without_numbers_and_times(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    sick = make_run(tmp_path / "sick", config(kind="moma"), speedups=SPEEDUPS, step_time_s=None, nan_at=range(100, 200))
    with (sick / "metrics.jsonl").open("a") as file:
        file.write('{"step": 601, "loss": 1.')  # killed while writing
    found = compare(runs[0], [sick])
    assert "sick: 55 losses that are not finite are left out" in found.notes
    assert any(note.startswith("sick: not measured: held-out loss, causal routing") for note in found.notes)
    assert {one.measure for one in found.speedups} == {"flops"}
    one = found.find("sick", "training", "image", "flops", 1.0)
    assert one is not None
    assert one.ratio.value == pytest.approx(4.0, rel=0.02)


def test_every_step_took_the_work_of_its_attempt(tmp_path: Path) -> None:
    """The second half was trained with twice the batch, and an attempt after it wrote no row."""
    run = make_run(tmp_path / "run", config(), speedups=SPEEDUPS)
    whole = read_run(run)
    assert np.array_equal(whole.losses["training"]["all"].flops, np.arange(2, STEPS + 1, 2) * whole.flops_per_step)
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    half = STEPS // 2
    (run / METRICS).write_text(
        "".join(json.dumps(line | {"attempt": 1 + (line["step"] > half)}) + "\n" for line in lines)
    )
    (run / "config.1.yaml").write_text(dump(config()))
    (run / "config.2.yaml").write_text(dump(config("train.global_batch_size=16")))
    (run / "config.yaml").write_text(dump(config("train.global_batch_size=4096")))
    found = read_run(run)
    points = found.losses["training"]["all"]
    assert found.config.train.global_batch_size == 16
    assert points.flops[-1] == pytest.approx(whole.flops_per_step * (half + 2 * half))
    assert points.flops[half // 2 - 1] == pytest.approx(whole.flops_per_step * half)
    assert facts.settings(run, attempt=history.read(run).attempt)["train.global_batch_size"] == 16


def test_what_is_refused(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    other = config().model_copy(update={"vocab": config("vocab.pad_multiple=64").vocab})
    refused = {
        "has another vocabulary than": make_run(tmp_path / "words", other, speedups=SPEEDUPS),
        r"was trained on other data \(data/more\) than .* \(data/none\)": make_run(
            tmp_path / "data", config("data.path=data/more"), speedups=SPEEDUPS
        ),
        r"is no run of this version: .*there is no such file": tmp_path,
    }
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text(dump(config()))
    refused[r"has no metrics\.jsonl with a logged step"] = tmp_path / "empty"
    for message, folder in refused.items():
        with pytest.raises(UsageError, match=message) as caught:
            compare(runs[0], [folder])
        assert caught.value.remedy
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(runs[0], [runs[0]])


def test_notes(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    wide = make_run(
        tmp_path / "wide",
        config(
            "optim.lr=0.1",
            "optim.schedule=linear",
            "train.eval_batches=2",
            "train.modality_weights={text: 3}",
            ffn_hidden_size=192,
        ),
        speedups=SPEEDUPS,
    )
    notes = "\n".join(compare(wide, [runs[1]]).notes)
    assert "4t4i: -2" in notes
    assert "% FLOPs per token" in notes
    assert "4t4i: another batch, learning rate, schedule or length than wide" in notes
    assert "4t4i: another objective than wide: train.modality_weights" in notes
    assert "4t4i: evaluated on another part of the held-out split than wide" in notes
    assert "learning rates decay (linear)" in notes
    assert "4t4i: auxiliary routers were trained along" in notes


@pytest.mark.parametrize("other", ["dense", "untied", "moma", "depth"])
def test_losses_are_named_by_routing_only_if_something_routes(tmp_path: Path, other: str) -> None:
    """In tables, in the picture, in JSON and in notes."""
    kinds: dict[str, dict[str, Any]] = {
        "dense": {"ffn_hidden_size": 192},
        "untied": {"untie": ["attention", "ffn", "norms"]},
        "moma": {"kind": "moma"},
        "depth": {"depth": {"capacity": 0.25}},
    }
    first = make_run(tmp_path / "first", config(), speedups=SPEEDUPS)
    second = make_run(tmp_path / "second", config(**kinds[other]), speedups=SPEEDUPS)
    found = compare(first, [second])
    routes = other in ("moma", "depth")
    text = compare_view.render(found)
    assert ("leaks the future" in text) is routes and ("held-out loss:" in text) is not routes
    shown = [axes.get_ylabel() for axes in compare_view.step_matching(found).axes if axes.get_ylabel()]
    assert any("batch routing" in label for label in shown) is routes
    assert ("held_out" in found.as_dict()["views"]) is routes


def test_section_of_a_page(runs: tuple[Path, Path]) -> None:
    section = comparison_section(runs[0], page.read_runs(runs, goodput=goodput))
    assert section.count("<table>") >= 1 and "data:image/png;base64," in section and "eta" in section


def test_command(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "eta.png"
    command = ["compare", *map(str, runs), "--at", "0.5,1", "--loss", "3.0"]
    assert main([*command, "--out", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "held-out loss, causal routing (every token routed from itself alone):" in text
    assert "| 4t4i | 50% of its FLOPs | " in text
    with PIL.Image.open(picture) as image:
        assert image.size[0] > 1000
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {one["share_of_baseline"] for one in result["speedups"]} == {0.5, 1.0, None}
    assert result["baseline"]["name"] == "dense"
    assert main([*command, "--out", "eta.pdf"]) == 2
    assert main(["compare", *map(str, runs), "--at", "0,1"]) == 2
    assert "needs shares above 0 and up to 1" in capsys.readouterr().err


@pytest.mark.parametrize(("mine", "theirs", "noted"), [
    ("", "dedup-1", True),
    ("dedup-1", "dedup-2", True),
    ("dedup-1", "dedup-1", False),
    ("", None, False),  # no checkpoint says which
])  # fmt: skip
def test_other_weights_of_the_same_documents(
    runs: tuple[Path, Path], mine: str, theirs: str | None, noted: bool
) -> None:
    for run, selection in zip(runs, (mine, theirs), strict=True):
        if selection is not None:
            source = {"path": "data/none", "weight": 1.0, "identity": "a", "selection": selection}
            saved = Store.of_run(run).path(STEPS)
            saved.mkdir(parents=True)
            (saved / INFO).write_text(json.dumps({"data": [source]}))
    found = [
        note for note in compare(runs[0], [runs[1]]).notes if "trained on other documents of the same data" in note
    ]
    assert [note.split(":")[0] for note in found] == (["4t4i"] if noted else [])
