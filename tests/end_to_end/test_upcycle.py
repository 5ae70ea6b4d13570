"""`mmscale ckpt upcycle`: what is copied, what is new, what the model still computes, and that training goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import checkpoints_tools.upcycle  # noqa: F401  what forked commands would import one by one
import mmscale.inference.evaluate
from checkpoints_tools.sources import open_source
from mmscale.data.stream.mixture import open_mixture
from mmscale.data.vocab import PAD
from mmscale.inference.model import open_run
from mmscale.model.moma import MoMaMLP
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import assert_says, mmscale, ok

STEPS = 4
MAIN = (
    *(f"train.steps={2 * STEPS}", "optim.warmup=3", "train.eval_every=0", "log.every=1", "parallel.ep=1"),
    *(f"checkpoint.every={STEPS}", "checkpoint.asynchronous=false"),
)
ONE_EACH = ("model.experts.counts.text=1", "model.experts.counts.image=1")
DENSE = ("model.kind=dense", "model.experts.counts={}", "model.depth=null")
# Weights of a model as young as this make outputs of the size of the usual epsilon, which would not cancel.
POST = ("model.norm=post", "model.norm_eps=1e-12")
MODELS = {
    "pre": ONE_EACH,
    "post": (*ONE_EACH, *POST),
    "post_per_expert": (
        *ONE_EACH,
        *("model.norm=post_per_expert", "model.experts.threshold_decay=0.9", "model.experts.choice=softmax"),
    ),
    "dense": (*DENSE, "model.qkv_bias=true"),
    "dense-post": (*DENSE, *POST),
    "dense-post_per_expert": (*DENSE, "model.norm=post_per_expert", "model.untie=[final_norm]"),
}
EXPERTS = {"text": 4, "image": 2}


@pytest.fixture(scope="module")
def runs(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every model, each with checkpoints of steps 4 and 8; and `NAME-up`, upcycled at step 4."""
    folder = tmp_path_factory.mktemp("upcycle")
    for name, model in MODELS.items():
        ended = mmscale("train", config, f"run.dir={folder}", f"run.name={name}", *MAIN, *model)
        assert ended.status == 0, ended
        upcycled(folder / name, folder / f"{name}-up")
    return folder


def upcycled(run: Path, out: Path, *options: str) -> dict[str, Any]:
    ended = mmscale("ckpt", "upcycle", f"{run}@{STEPS}", out, "--experts", "text=4,image=2", "--json", *options)
    assert ended.status == 0, ended
    found: dict[str, Any] = json.loads(ended.out)
    return found


def test_weights_are_copies_and_everything_else_stays(runs: Path) -> None:
    """Against loops over experts, for a dense model's layout of weights and for that of one expert."""
    for name in ("pre", "dense"):
        old, new = open_source(runs / name, STEPS), open_source(runs / f"{name}-up", 0)
        made = {weight for weight in new.names(weights=True) if ".mlp.experts." in weight or ".mlp.router." in weight}
        for weight in sorted(set(new.names(weights=True)) - made):
            assert torch.equal(new.read(weight), old.read(weight)), weight
        for layer in range(2):
            mlp = f"decoder.layers.{layer}.mlp."
            for group, count in EXPERTS.items():
                w1, w2 = new.read(f"{mlp}experts.{group}.w1"), new.read(f"{mlp}experts.{group}.w2")
                assert len(w1) == len(w2) == count
                for expert in range(count):
                    if name == "pre":
                        assert torch.equal(w1[expert], old.read(f"{mlp}experts.{group}.w1")[0])
                        assert torch.equal(w2[expert], old.read(f"{mlp}experts.{group}.w2")[0])
                    else:
                        gate, up = old.read(f"{mlp}linear_fc1.weight").chunk(2)
                        assert torch.equal(w1[expert, :, 0], gate.t()) and torch.equal(w1[expert, :, 1], up.t())
                        assert torch.equal(w2[expert], old.read(f"{mlp}linear_fc2.weight").t())
                router = new.read(f"{mlp}router.{group}")
                assert len({tuple(row.tolist()) for row in router}) == count, "experts would choose the same tokens"
                assert 0.01 < float(router.std()) < 0.03
        assert not [weight for weight in new.names() if "linear_fc" in weight]


@pytest.mark.parametrize("name", ["pre", "dense"])
@pytest.mark.parametrize("keep", [False, True])
def test_optimizer_state(name: str, keep: bool, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept" if keep else runs / f"{name}-up"
    if keep:
        upcycled(runs / name, out, "--keep-moments")
    old, new = open_source(runs / name, STEPS), open_source(out, 0)
    for weight in new.names(weights=True):
        state = {kind: new.read(f"optimizer.state.{kind}.{weight}") for kind in ("param", "exp_avg", "exp_avg_sq")}
        assert torch.equal(state["param"], new.read(weight).float()), weight
        for kind in ("exp_avg", "exp_avg_sq"):
            if ".mlp.router." in weight or (".mlp.experts." in weight and not keep):
                assert not state[kind].any(), weight
            elif ".mlp.experts." not in weight:
                assert torch.equal(state[kind], old.read(f"optimizer.state.{kind}.{weight}")), weight
            elif name == "pre":
                one = old.read(f"optimizer.state.{kind}.{weight}")[0]
                assert one.any() and all(torch.equal(expert, one) for expert in state[kind]), weight
    others, experts = (new.common()["optimizer"][number]["optimizer"]["param_groups"] for number in (0, 1))
    assert {group["step"] for group in (*others, *experts)} == {STEPS}
    assert [group["is_expert_parallel"] for group in experts] == [True]


def _logits(run: Path, *, step: int | None, everyone: bool, gates: float | None, scale: float = 1.0) -> Tensor:
    """Of real documents.

    Args:
        run: its folder.
        step: of it.
        everyone: every expert has room for every token.
        gates: None: routers as they are; else all gates are 1/2.
        scale: of every expert's output.
    """
    with open_run(run, step=step) as model:
        for module in model.module.modules():
            if not isinstance(module, MoMaMLP):
                continue
            if everyone:
                module.settings = dataclasses.replace(module.settings, capacity_factor=1e6)
            for group in module.settings.groups:
                with torch.no_grad():
                    if gates is not None:
                        module.router.get_parameter(group.name).zero_()
                    if module.settings.norm_experts:
                        module.expert_norm[group.name].weight.mul_(scale)
                    else:
                        module.experts[group.name].w2.mul_(scale)
        batch = open_mixture(model.config, "train", vocabulary=model.vocabulary).micro_batch(0)
        # A dense FFN sees padding, experts do not.
        return model.logits(batch)[torch.from_numpy(batch.tokens) != PAD]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_preserved(name: str, runs: Path) -> None:
    """PRESERVES, word by word, where every token finds experts.

    Post: the same logits, whatever the routers say. Pre and post_per_expert: the output times the sum of new gates over
    the old one: with all gates at 1/2, N of them, that is a factor that one can take back.
    """
    dense, norm = name.startswith("dense"), name.removeprefix("dense").removeprefix("-") or "pre"
    old = _logits(runs / name, step=STEPS, everyone=True, gates=None if norm == "post" or dense else 0.5)
    size = float(old.abs().max())

    def apart(**settings: Any) -> float:
        return float((_logits(runs / f"{name}-up", step=0, everyone=True, **settings) - old).abs().max()) / size

    if norm == "post":
        assert apart(gates=None) < 2e-5
        return
    assert apart(gates=0.5) > 1e-3
    # Groups have different numbers of experts: as many for both as one factor can take back.
    both = runs / f"{name}-both"
    if not both.exists():
        ended = mmscale("ckpt", "upcycle", f"{runs / name}@{STEPS}", both, "--experts", "text=2,image=2")
        assert ended.status == 0, ended
        assert "times the sum of its new gates" in ended.out
    new = _logits(both, step=0, everyone=True, gates=0.5, scale=1.0 if dense else 0.5)
    assert float((new - old).abs().max()) / size < 2e-5


def apart(one: Path, other: Path, *, step: int = 0) -> float:
    """Largest difference of logits, relative to the largest one."""
    old = _logits(one, step=STEPS, everyone=False, gates=None)
    return float((_logits(other, step=step, everyone=False, gates=None) - old).abs().max() / old.abs().max())


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [
        ("dense", ("--top-k", "2", "--untie", "norms"), {"text": 4, "image": 4}),
        ("dense-post", (), {"text": 4, "image": 4}),
        ("dense-post_per_expert", ("--experts", "text=8,image=4", "--keep-moments"), {"text": 8, "image": 4}),
        ("dense-post_per_expert", ("--experts", "mixed=4"), {"mixed": 4}),
    ],
)
def test_parts_beside_the_whole(
    name: str, options: tuple[str, ...], counts: dict[str, int], runs: Path, tmp_path: Path
) -> None:
    """--split: the same function at first, with parts of the FFN as experts; then the experts learn."""
    if name == "dense":  # untied weights have no biases
        run = tmp_path / name
        settings = (*MAIN, *DENSE, f"train.steps={STEPS}")
        ok("train", runs / "dense/config.yaml", f"run.dir={tmp_path}", *settings, "model.qkv_bias=false")
    else:
        run = runs / name
    up = tmp_path / "up"
    ended = mmscale("ckpt", "upcycle", f"{run}@{STEPS}", up, "--split", "4", "--shared", "keep", *options, "--json")
    assert ended.status == 0, ended
    made = json.loads(ended.out)
    assert made["experts"] == counts and "outputs start at zero" in made["preserves"]
    assert apart(run, up) < 1e-6
    model = yaml.safe_load((up / "config.yaml").read_text())["model"]
    width = model["experts"]["shared_ffn_hidden_size"]
    assert model["ffn_hidden_size"] == width // 4 and model["experts"]["shared"] == 1
    old, new = open_source(run, STEPS), open_source(up, 0)
    for layer in range(2):
        mlp = f"decoder.layers.{layer}.mlp."
        gate, up_projection = old.read(f"{mlp}linear_fc1.weight").chunk(2)
        down = old.read(f"{mlp}linear_fc2.weight")
        for group, count in counts.items():
            w1, w2 = new.read(f"{mlp}experts.{group}.w1"), new.read(f"{mlp}experts.{group}.w2")
            for expert in range(count):
                part = slice(expert % 4 * width // 4, (expert % 4 + 1) * width // 4)
                assert torch.equal(w1[expert, :, 0], gate[part].t())
                assert torch.equal(w1[expert, :, 1], up_projection[part].t())
                assert torch.equal(w2[expert], down[:, part].t() if "per_expert" in name else torch.zeros_like(w2[0]))
    ended = mmscale("train", up / "config.yaml", "parallel.ep=2", f"train.steps={STEPS}", nproc=2)
    assert ended.status == 0, ended
    assert apart(run, up, step=STEPS) > 1e-3
    group = next(iter(counts))
    trained = open_source(up, STEPS)
    assert not torch.equal(trained.read(f"{mlp}experts.{group}.w2"), new.read(f"{mlp}experts.{group}.w2"))


@pytest.mark.parametrize(
    ("run", "options", "cause", "remedy"),
    [
        (
            "dense",
            ("--split", "3", "--shared", "keep"),
            "--split 3 does not divide model.ffn_hidden_size = 64",
            "divisor",
        ),
        ("dense", ("--split", "4"), "--split and --shared keep belong together", "--split 4 --shared keep"),
        ("dense", ("--split", "4", "--shared", "half"), "--split and --shared keep belong together", "give both"),
        (
            "dense",
            ("--split", "4", "--shared", "keep", "--experts", "text=4,image=6"),
            "--experts image=6 is no multiple of --split 4",
            "leave --experts out",
        ),
        ("pre", ("--split", "2", "--shared", "keep"), "model.kind = moma has experts", "upcycle a dense model"),
        (
            "dense",
            ("--experts", "text=2,image=2", "--ungated", "image"),
            "--ungated names image, to which --experts does not give one expert",
            "--experts image=1",
        ),
        ("pre", ("--experts", "text=2,image=1", "--ungated", "image"), "experts of this model have gates", "leave"),
        (
            "dense",
            ("--experts", "text=4,image=1", "--ungated", "image", "--split", "2", "--shared", "keep"),
            "--ungated with --split",
            "give one of them",
        ),
    ],
)
def test_parts_that_cannot_be(
    run: str, options: tuple[str, ...], cause: str, remedy: str, runs: Path, tmp_path: Path
) -> None:
    ended = mmscale("ckpt", "upcycle", f"{runs / run}@{STEPS}", tmp_path / "new", *options)
    assert_says(ended, status=2, cause=cause, remedy=remedy)
    assert not (tmp_path / "new").exists()


@pytest.mark.long
def test_training_goes_on_at_another_layout(runs: Path) -> None:
    """From the source's place in the data, with the schedule from its start, noise on, and the same on two ranks."""
    found = {}
    for name, layout in (("pre", ("parallel.ep=2",)), ("dense", ("parallel.ep=1", "parallel.tp=2"))):
        run = runs / f"{name}-up"
        settings = yaml.safe_load((run / "config.yaml").read_text())
        assert settings["model"]["experts"]["noise"] == "gumbel" and settings["train"]["steps"] == STEPS
        assert settings["model"]["kind"] == "moma" and settings["model"]["experts"]["counts"] == EXPERTS
        ended = mmscale("train", run / "config.yaml", *layout, nproc=2)
        assert ended.status == 0, ended
        lines = read_metrics(run)
        source = {line["step"]: line for line in read_metrics(runs / name)}
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert [line["lr"] for line in lines[:3]] == [source[step]["lr"] for step in (1, 2, 3)]
        # tokens are counted from the beginning of the source: the same batches follow
        assert [line["tokens"] for line in lines] == [source[STEPS + step]["tokens"] for step in range(1, STEPS + 1)]
        found[name] = [line["loss"] for line in lines]
    assert all(abs(loss - 5.5) < 1.0 for losses in found.values() for loss in losses), found


@pytest.mark.long
def test_a_mixed_group_and_the_way_of_the_commands(runs: Path, tmp_path: Path) -> None:
    ended = mmscale(
        "ckpt", "upcycle", runs / "dense", tmp_path / "moe", "--experts", "mixed=4", "--steps", "9", "--seed", "5"
    )
    assert (
        ended.status == 0 and "4 of mixed" in ended.out and "9 steps after 32 sequences" in ended.out.replace("\n", " ")
    )
    settings = yaml.safe_load((tmp_path / "moe" / "config.yaml").read_text())
    assert settings["model"]["kind"] == "moe" and settings["train"]["steps"] == 9
    assert mmscale("eval", tmp_path / "moe", "--batches", "1").status == 0
    show = json.loads(mmscale("ckpt", "show", tmp_path / "moe", "--json").out)
    assert show["step"] == 0
    one, other = (open_source(run).read("decoder.layers.0.mlp.router.mixed") for run in (tmp_path / "moe",) * 2)
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("run", "experts", "status", "cause", "remedy"),
    [
        ("pre", "text=4", 2, "--experts names text", "text=N, image=N, or one name for a mixed group"),
        ("pre", "mixed=4", 2, "the model has groups image, text", "cannot become the experts"),
        ("pre", "text=4,image", 2, "'image' is not NAME=N", "text=4,image=4"),
        ("pre", "text=0,image=2", 2, "'text=0' is not NAME=N", "text=4,image=4"),
        ("dense", "text=4,image=2,speech=2", 2, "--experts names text, image, speech", "name text=N"),
        ("pre-up@0", "text=8,image=8", 4, "4 experts of text, 2 experts of image already", "one expert of each group"),
        ("pre@3", "text=4,image=4", 4, "no checkpoint of step 3", "choose one of 4, 8"),
        ("nothing", "text=4,image=4", 4, "does not exist", "run folder"),
    ],
)
def test_refused(runs: Path, tmp_path: Path, run: str, experts: str, status: int, cause: str, remedy: str) -> None:
    ended = mmscale("ckpt", "upcycle", f"{runs}/{run}", tmp_path / "new", "--experts", experts)
    assert_says(ended, status=status, cause=cause, remedy=remedy)
    assert not (tmp_path / "new").exists()


def test_a_run_with_checkpoints_is_no_place_for_it(runs: Path) -> None:
    ended = mmscale("ckpt", "upcycle", runs / "pre", runs / "dense", "--experts", "text=4,image=4")
    assert_says(ended, status=4, cause="has checkpoints already", remedy="name a new run folder")
