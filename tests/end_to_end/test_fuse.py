"""`mmscale ckpt fuse`: what the fused model computes, that it trains on in every layout, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints_tools.fused_settings import fused_tokenizers
from checkpoints_tools.sources import open_source
from mmscale.checkpoint.layout import Store
from mmscale.data.stream.packed import pack_rows
from mmscale.data.vocab import EOS, SPECIAL_TOKENS
from mmscale.errors import CheckpointError
from mmscale.inference.model import open_run
from tests.end_to_end.running import assert_says, losses, mmscale, ok

STEPS = 4
MAIN = (
    *(f"train.steps={STEPS}", "optim.schedule=constant", "optim.warmup=1", "train.eval_every=0", "log.every=1"),
    *("checkpoint.asynchronous=false", "optim.lr=1e-2"),
)
DENSE = ("model.kind=dense", "model.experts.counts={}", "model.depth=null", "parallel.ep=1")
KINDS: dict[str, tuple[str, ...]] = {
    "pre": (),
    "post, tied output": ("model.norm=post", "model.tie_embeddings=true", "model.num_query_groups=1"),
    "post_per_expert": ("model.norm=post_per_expert",),
}


@pytest.fixture(scope="module")
def runs(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of each kind with other initial weights and data."""
    folder = tmp_path_factory.mktemp("fuse")
    for kind, model in KINDS.items():
        for name, seed in (("text", 1), ("image", 2)):
            settings = (f"run.dir={folder / kind}", f"run.name={name}", f"run.seed={seed}", *MAIN, *DENSE, *model)
            ok("train", config, *settings)
    return folder


def logits(run: Path, ids: str, *, step: int) -> tuple[Tensor, slice]:
    """Logits of a document with ids of one modality only, and where the columns of these ids are."""
    with open_run(run, step=step) as model:
        (low, middle), (_, end) = model.vocabulary.ranges
        first, last = (low + len(SPECIAL_TOKENS), middle) if ids == "text" else (middle, end)
        document = np.random.default_rng(5).integers(first, last, size=40)
        if ids == "text":
            document[-1] = EOS
        batch, _ = pack_rows([[document]], vocabulary=model.vocabulary, seq_length=model.config.model.seq_length)
        found = model.logits(batch)[0, : len(document)]
        return found, slice(low, middle) if ids == "text" else slice(middle, end)


@pytest.mark.parametrize("kind", [pytest.param(one, marks=() if one == "pre" else pytest.mark.long) for one in KINDS])
def test_each_modality_alone_computes_what_its_model_computes(kind: str, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "fused"
    made = json.loads(ok("ckpt", "fuse", runs / kind / "text", f"{runs / kind / 'image'}@{STEPS}", out, "--json"))
    assert made["fused"] == "Mixture-of-Transformers" and made["contents"] == "weights" and made["step"] == 0
    assert [parent["path"] for parent in made["origin"]["parents"]]
    for name, other in (("text", "image"), ("image", "text")):
        found, own = logits(out, name, step=0)
        wanted, _ = logits(runs / kind / name, name, step=STEPS)
        size = float(wanted.abs().max())
        assert float((found[:, own] - wanted[:, own]).abs().max()) < 1e-6 * size
        strange, _ = logits(runs / kind / other, name, step=STEPS)
        assert float((found[:, own] - strange[:, own]).abs().max()) > 1e-2 * size
    text = open_source(runs / kind / "text", STEPS)
    fused = open_source(out, 0)
    assert torch.equal(
        fused.read("decoder.layers.1.self_attention.linear_qkv.text"),
        text.read("decoder.layers.1.self_attention.linear_qkv.weight"),
    )


@pytest.mark.long
def test_it_trains_on_in_every_layout_and_is_exported(runs: Path, tmp_path: Path) -> None:
    found = {}
    for name, layout in (("one", ()), ("tp2", ("parallel.tp=2",)), ("pp2", ("parallel.pp=2",)), ("dp2", ())):
        out = tmp_path / name
        ok("ckpt", "fuse", runs / "pre" / "text", runs / "pre" / "image", out, "--steps", str(STEPS))
        settings = ("checkpoint.allow_missing=true", *layout)
        ok("train", out / "config.yaml", *settings, nproc=1 if name == "one" else 2)
        found[name] = list(losses(out).values())
        assert len(found[name]) == STEPS
    for name, own in found.items():
        assert own == pytest.approx(found["one"], rel=1e-5), name
    assert found["one"][-1] < found["one"][0]
    evaluated = json.loads(ok("eval", tmp_path / "one", "--batches", "1", "--json"))
    assert math.isfinite(evaluated["loss"])
    ok("convert", "to-hf", tmp_path / "one", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "conversion_report.json").read_text())["gate"]["passed"]
    ok("convert", "from-hf", tmp_path / "hf", tmp_path / "back")
    trained, back = open_source(tmp_path / "one"), open_source(tmp_path / "back")
    assert "decoder.final_layernorm.image" in back.names() and "decoder.final_layernorm.weight" not in back.names()
    assert all(torch.equal(back.read(name), trained.read(name)) for name in back.names())
    ok("ckpt", "upcycle", tmp_path / "one", tmp_path / "up", "--experts", "text=2,image=1")
    ok("train", tmp_path / "up" / "config.yaml", "parallel.ep=2", "train.steps=2", nproc=2)


@pytest.mark.long
def test_exports_and_the_mean(runs: Path, tmp_path: Path) -> None:
    """A model may be a Hugging Face folder; --average gives the mean of all weights, a dense model."""
    ok("convert", "to-hf", runs / "pre" / "image", tmp_path / "hf")
    for out, image in (("fused", runs / "pre" / "image"), ("of-hf", tmp_path / "hf")):
        ok("ckpt", "fuse", runs / "pre" / "text", image, tmp_path / out)
    one, other = open_source(tmp_path / "fused", 0), open_source(tmp_path / "of-hf", 0)
    assert one.names() == other.names() and all(torch.equal(one.read(name), other.read(name)) for name in one.names())
    said = ok("ckpt", "fuse", runs / "pre" / "text", runs / "pre" / "image", tmp_path / "mean", "--average", "--json")
    assert json.loads(said)["fused"] == "average"
    mean, text, image = (open_source(path) for path in (tmp_path / "mean", runs / "pre/text", runs / "pre/image"))
    assert mean.info()["config"]["model"]["untie"] == []
    for name in mean.names():
        assert torch.allclose(mean.read(name), (text.read(name) + image.read(name)) / 2), name
    ok("train", tmp_path / "mean" / "config.yaml", "checkpoint.allow_missing=true", "train.steps=2")


@pytest.mark.parametrize("option", [(), pytest.param(("--average",), marks=pytest.mark.long)], ids=["fused", "average"])
def test_models_of_other_data_make_a_run_without_data(
    option: tuple[str, ...], config: Path, runs: Path, tmp_path: Path
) -> None:
    """Neither model's data is that of the new run, whose first data needs no confirmation."""
    data = Path(open_source(runs / "pre" / "text", STEPS).info()["config"]["data"]["path"])
    shutil.copytree(data, tmp_path / "data")
    settings = (f"run.dir={tmp_path}", "run.name=image", *MAIN, *DENSE, "train.steps=1", f"data.path={tmp_path}/data")
    ok("train", config, *settings)
    out = tmp_path / "fused"
    made = json.loads(ok("ckpt", "fuse", runs / "pre" / "text", tmp_path / "image", out, *option, "--json"))
    assert made["next"].endswith(" data.path=DATA`")
    goes_on = (out / "config.yaml", "checkpoint.allow_missing=true", "train.steps=1")
    refused = mmscale("train", *goes_on)
    assert_says(refused, status=2, cause="neither data.path nor data.blend is set", remedy="set data.path")
    ok("train", *goes_on, f"data.path={data}")
    for step in (0, 1):  # with which leaks of held-out documents are compared
        (learned,) = Store.of_run(out).info(step)["made_from"]["main_data"]
        assert learned["path"] in (str(data), f"{tmp_path}/data")


def test_other_tokenizers_are_refused() -> None:
    one, other = (
        SimpleNamespace(path=name, info=lambda own=found: {"tokenizers": own})
        for name, found in (("a", {"text": "1", "image": "2"}), ("b", {"text": "3", "image": "2"}))
    )
    with pytest.raises(CheckpointError, match="a and b have different tokenizers of text"):
        fused_tokenizers(one, other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "status", "cause", "remedy"),
    [
        ("model.hidden_size=64", 4, "hold different models: model.hidden_size is 32 and 64", "of one configuration"),
        ("model.rope_base=500", 4, "different functions of their weights: model.rope_base", "of one configuration"),
        ("model.untie=[norms]", 4, "model.untie is None and", "of one configuration"),
    ],
)
def test_other_models_are_refused(
    change: str, status: int, cause: str, remedy: str, config: Path, runs: Path, tmp_path: Path
) -> None:
    ok("train", config, f"run.dir={tmp_path}", "run.name=other", *MAIN, *DENSE, change, "train.steps=1")
    refused = mmscale("ckpt", "fuse", runs / "pre" / "text", tmp_path / "other", tmp_path / "out")
    assert_says(refused, status=status, cause=cause, remedy=remedy)
    both = mmscale("ckpt", "fuse", tmp_path / "other", tmp_path / "other", tmp_path / "out")
    assert_says(both, status=2, cause="both models are", remedy="name a text model and an image model")
    assert not (tmp_path / "out").exists()
