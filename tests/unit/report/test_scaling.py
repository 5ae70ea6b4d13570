"""The mixed-modal scaling law: planted constants come back, through numbers and through run folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mmscale.cli import main
from mmscale.config import Config
from mmscale.config.load import dump, resolve
from mmscale.errors import UsageError
from mmscale.plan import count_parameters
from mmscale.report import scaling_runs, scaling_view
from mmscale.report.scaling import Law, Observations, Terms, barrier_parameters, cheapest_barrier, fit, interval
from mmscale.train.log.metrics_log import MetricsLog

# Exponents of text and image of arXiv 2301.03728.
TEXT = Terms(1.6, 30.0, 0.18, 80.0, 0.22)
IMAGE = Terms(2.0, 20.0, 0.13, 30.0, 0.13)
PAIR = Terms(-0.12, 40.0, 0.25, 60.0, 0.28)
LAW = Law({"text": TEXT, "image": IMAGE}, {("text", "image"): PAIR})
SIZES = np.geomspace(8e6, 6.7e9, 6)
TOKENS = np.geomspace(5e9, 1e11, 4)


def planted(*, noise: float = 0.0, seed: int = 0) -> dict[tuple[str, ...], Observations]:
    n, d = (values.ravel() for values in np.meshgrid(SIZES, TOKENS))
    random = np.random.default_rng(seed)
    found = {}
    for names in (("text",), ("image",), ("text", "image")):
        tokens = {name: d / len(names) for name in names}
        found[names] = Observations(n, tokens, LAW.loss(n, tokens) * np.exp(random.normal(0, noise, len(n))))
    return found


def constants(terms: Terms) -> list[float]:
    return [terms.constant, terms.A, terms.alpha, terms.B, terms.beta]


def test_planted_constants() -> None:
    law = fit(planted(), replicas=0).law
    for found, wanted in ((law.alone["text"], TEXT), (law.alone["image"], IMAGE), (law.pairs["text", "image"], PAIR)):
        assert constants(found) == pytest.approx(constants(wanted), rel=1e-4)


def test_intervals_hold_the_truth_through_noise() -> None:
    """Of 4 x 15 constants, 90 % intervals of resampled residuals should hold most."""
    held = total = 0
    for seed in range(4):
        found = fit(planted(noise=1e-3, seed=seed), replicas=30)
        for pick in (
            lambda law: law.alone["text"],
            lambda law: law.alone["image"],
            lambda law: law.pairs["text", "image"],
        ):
            replicas = np.array([constants(pick(one)) for one in found.replicas])
            for place, wanted in enumerate(constants(pick(LAW))):
                low, high = interval(list(replicas[:, place]))
                held += low <= wanted <= high
                total += 1
        # Constants trade off against each other; what they predict together is much better known.
        n, tokens = 1e9, {"text": 2e10, "image": 2e10}
        assert float(found.law.loss(n, tokens)) == pytest.approx(float(LAW.loss(n, tokens)), rel=2e-3)
    assert total == 60
    assert held / total > 0.75


def test_barrier() -> None:
    for tokens in (4e10, 1e11):
        n = barrier_parameters(PAIR, tokens)
        assert n is not None
        both = {"text": tokens / 2, "image": tokens / 2}
        apart = (TEXT(n, tokens / 2) + IMAGE(n, tokens / 2)) / 2
        assert float(LAW.loss(n, both)) == pytest.approx(float(apart), rel=1e-9)
        assert float(LAW.loss(2 * n, both) - (TEXT(2 * n, tokens / 2) + IMAGE(2 * n, tokens / 2)) / 2) < 0
    assert barrier_parameters(PAIR, 1e8) is None  # data too small at any size
    assert barrier_parameters(Terms(0.1, 1.0, 0.2, 1.0, 0.2), 1e12) is None
    assert barrier_parameters(Terms(-0.1, 0.0, 0.2, 0.0, 0.2), 1e6) == 0.0


def test_cheapest_barrier_against_a_search() -> None:
    found = cheapest_barrier(PAIR)
    assert found is not None
    products = []
    for tokens in np.geomspace(found[1] / 100, found[1] * 100, 4001):
        n = barrier_parameters(PAIR, tokens)
        products.append(math.inf if n is None else n * tokens)
    assert found[0] * found[1] == pytest.approx(min(products), rel=1e-4)
    assert barrier_parameters(PAIR, found[1]) == pytest.approx(found[0])
    assert cheapest_barrier(Terms(0.0, 1.0, 0.2, 1.0, 0.2)) is None


def config(width: int, layers: int, *overrides: str) -> Config:
    values = {
        "vocab": {"modalities": [{"name": "text", "size": 100}, {"name": "image", "size": 60}]},
        "model": {
            "kind": "dense",
            "num_layers": layers,
            "hidden_size": width,
            "ffn_hidden_size": 2 * width,
            "num_attention_heads": 4,
            "seq_length": 64,
        },
        "data": {"path": "data/none"},
    }
    return resolve(values, overrides)


def make_run(folder: Path, settings: Config, tokens: dict[str, float], *, special: float = 0.0) -> Path:
    """A run that ends where the law says; `special`: share of text tokens beside its modality's own."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(settings))
    n = count_parameters(settings).active
    log = MetricsLog(folder, attempt=1)
    counts = {"text": 0.0, "image": 0.0} | tokens
    if special:
        counts["text"] += special * sum(tokens.values())
    for step in (500, 1000):
        done = {name: step / 1000 * count for name, count in tokens.items()}
        loss = float(LAW.loss(n, done))
        log.write(step, {"loss": loss} | {f"tokens/{name}": step / 1000 * count for name, count in counts.items()})
        # Losses of the modalities that are not alike: the law is about their mean.
        apart = {name: loss + (0.2 if name == "text" else -0.2) * (len(done) - 1) for name in done}
        log.write(step, {"eval/loss": loss} | {f"eval/loss/{name}": value for name, value in apart.items()})
    log.close()
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Few runs and small ones: constants that such sizes can tell."""
    folders = []
    for names in (("text",), ("image",), ("text", "image")):
        for width, layers in ((64, 2), (128, 4), (256, 8), (512, 8)):
            for count in (1e8, 1e9, 1e10):
                tokens = {name: count / len(names) for name in names}
                folder = tmp_path / f"{'_'.join(names)}_{width}_{count:g}"
                folders.append(make_run(folder, config(width, layers), tokens, special=0.02 * (names == ("image",))))
    return folders


def test_command(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "scaling.png"
    command = ["scaling", "fit", *map(str, runs), "--bootstrap", "5", "--at", "4e10,45.1e9"]
    assert main([*command, "--json", "--out", str(picture)]) == 0
    result = json.loads(capsys.readouterr().out)
    for name, terms in (("text", TEXT), ("image", IMAGE)):
        found = result["modalities"][name]
        assert found["runs"] == 12
        assert [found[key]["value"] for key in ("E", "A", "alpha", "B", "beta")] == pytest.approx(
            constants(terms), rel=0.01
        )
    pair = result["pairs"]["text+image"]
    assert [pair[key]["value"] for key in ("C", "A", "alpha", "B", "beta")] == pytest.approx(
        [-PAIR.constant, *constants(PAIR)[1:]], rel=0.01
    )
    assert pair["barrier"][0]["parameters"] == pytest.approx(barrier_parameters(PAIR, 4e10), rel=0.05)
    assert pair["cheapest"]["tokens"] == pytest.approx(cheapest_barrier(PAIR)[1], rel=0.05)
    with PIL.Image.open(picture) as image:
        assert image.size[0] > 1000
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "text+image: together better than apart (synergy)" in text
    assert "- at 45.1B tokens: from " in text
    assert "In brackets: the middle 90 % of 5 fits" in text


def test_without_replicas_there_are_no_intervals() -> None:
    seen = planted()
    result = scaling_view.summary(fit(seen, replicas=0), seen, tokens=[4e10])
    assert set(result["modalities"]["text"]["E"]) == {"value"}
    assert set(result["pairs"]["text+image"]["barrier"][0]) == {"tokens", "parameters"}
    json.dumps(result, allow_nan=False)
    text = scaling_view.render(result)
    assert "nan" not in text and "never" not in text and "(synergy)\n- at 40B tokens: from " in text
    assert "In brackets" not in text and "| text | 1.6 | 30 |" in text


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda name: name.startswith(("text_image", "image")), "none on text alone"),
        (lambda name: name.startswith("image_64"), "image: 3 runs of 1 sizes and 3 numbers of tokens do not determine"),
    ],
)
def test_too_few_runs(runs: list[Path], keep: Any, message: str) -> None:
    chosen = scaling_runs.read_points([run for run in runs if keep(run.name)])
    with pytest.raises(UsageError, match=message) as caught:
        scaling_runs.observations(chosen)
    assert caught.value.remedy


def test_tokens_in_proportion_to_size(tmp_path: Path) -> None:
    folders = []
    for width in (64, 96, 128, 160, 192, 256):
        settings = config(width, 2)
        tokens = {"text": 20.0 * count_parameters(settings).active}
        folders.append(make_run(tmp_path / str(width), settings, tokens))
    with pytest.raises(UsageError, match="a function of the sizes"):
        scaling_runs.observations(scaling_runs.read_points(folders))


def test_what_a_run_must_have(tmp_path: Path, runs: list[Path]) -> None:
    point = scaling_runs.read_points(runs[:1], size="total")[0]
    assert point.parameters == count_parameters(config(64, 2)).total
    assert list(point.tokens) == ["text"]
    other = config(64, 2, "vocab.pad_multiple=64")
    with pytest.raises(UsageError, match="another vocabulary"):
        scaling_runs.read_points([runs[0], make_run(tmp_path / "other", other, {"text": 1e8})])
    moma = resolve(
        config(64, 2).model_dump(mode="json"), ["model.kind=moma", "model.experts.counts={text: 2, image: 2}"]
    )
    leaks = make_run(tmp_path / "leaks", moma, {"text": 1e8})
    with pytest.raises(UsageError, match="leaks has no causal loss of text") as caught:
        scaling_runs.read_points([leaks])
    assert "--view held_out" in caught.value.remedy
    assert scaling_runs.read_points([leaks], view="held_out")[0].loss > 0
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text(dump(config(64, 2)))
    MetricsLog(bare, attempt=1).write(1, {"eval/loss": 1.0})
    with pytest.raises(UsageError, match="has logged no tokens"):
        scaling_runs.read_points([bare])


def test_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (("--view", "training"), "is not a loss of a run"),
        (("--parameters", "all"), "is not a size"),
        (("--at", "many"), "needs numbers of tokens"),
        (("--out", "x.pdf"), "the picture is a .png"),
    ):
        assert main(["scaling", "fit", "runs/x", *options]) == 2
        assert message in capsys.readouterr().err
