"""Siblings of equal FLOPs: of shipped configurations, against counts by hand, and as files of `mmscale baselines`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmscale.cli import main
from mmscale.config import Config
from mmscale.config.load import load, resolve
from mmscale.config.rules import check
from mmscale.config.train.schema import TrainConfig
from mmscale.errors import ConfigError
from mmscale.plan import flops_per_token
from mmscale.plan.siblings import Sibling, group_name, siblings, text_of

CONFIGS = Path(__file__).parents[2] / "configs"


def config(*overrides: str, **model: Any) -> Config:
    values = {
        "vocab": {"modalities": [{"name": "text", "size": 100}, {"name": "image", "size": 60}]},
        "model": {"num_layers": 8, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "seq_length": 64}
        | model,
    }
    return resolve(values, overrides)


TWENTY_FOUR = TrainConfig(micro_batch_size=1, global_batch_size=24)  # a sequence for each of 24 ranks


def by_name(found: list[Sibling]) -> dict[str, Sibling]:
    return {sibling.name: sibling for sibling in found}


@pytest.mark.parametrize("name", ["quickstart", "equal_loss", "moma_90m_dense", "moma_435m_moe8x", "moma_1b4_mod_4t4i"])
def test_shipped_configurations(name: str) -> None:
    given = load(CONFIGS / f"{name}.yaml")
    found = by_name(siblings(given))
    untied = [] if given.precision.fp8 != "off" or given.parallel.overlap_tensor else ["mot", "4t4i_untied", "mot_4t1i"]
    plain = ["dense", "1t1i", "moe8x", "4t4i", *untied, "tc_8x", "tc_4t4i"]
    assert list(found) == [*plain, "mod_dense", "mod_1t1i", "mod_4t4i"]
    target = flops_per_token(given).forward
    for sibling in found.values():
        assert flops_per_token(sibling.config).forward == pytest.approx(target, rel=0.01)
        assert sibling.ratio == sibling.flops / target
        check(sibling.config, world_size=given.parallel.tp * given.parallel.pp * given.parallel.ep)
        assert (sibling.config.model.depth is not None) == sibling.name.startswith("mod_")
    # The given configuration comes back under the name of its kind.
    own = [sibling for sibling in found.values() if not sibling.changes]
    assert [sibling.ratio for sibling in own] == [1.0]
    assert own[0].config.model_copy(update={"run": given.run}) == given


def test_depth_of_the_paper() -> None:
    """Dense 8 -> 14 and 24 -> 40 layers with Mixture-of-Depths, Table 1 of arXiv 2407.21770."""
    for size, layers in (("90m", 14), ("435m", 40)):
        found = by_name(siblings(load(CONFIGS / f"moma_{size}_dense.yaml")))
        assert found["mod_4t4i"].config.model.num_layers == layers
        assert found["dense"].config.model.ffn_hidden_size == found["4t4i"].config.model.ffn_hidden_size


def test_shared_experts_become_width() -> None:
    """A dense FFN as wide as one expert and the shared one does the same products; routers are what is left."""
    given = config(experts={"counts": {"text": 4, "image": 4}, "shared": 1, "shared_ffn_hidden_size": 32})
    found = by_name(siblings(given, tolerance=0.02))
    assert found["dense"].config.model.ffn_hidden_size == 96 + 32
    routers = 8 * 2 * 64 * 8  # layers, a product, width, experts
    assert found["4t4i"].flops - found["dense"].flops == routers
    assert found["moe8x"].config.model.experts.shared == 1


def test_layout_and_routing_settings_follow() -> None:
    experts = {"counts": {"text": 4, "image": 4}, "noise": "gumbel", "threshold_decay": 0.9, "capacity_factor": 1.0}
    given = config("parallel.tp=2", "parallel.pp=2", "parallel.ep=2", experts=experts, auxiliary={"mode": "joint"})
    found = by_name(siblings(given))
    assert {name: s.config.parallel.ep for name, s in found.items() if not name.startswith("mod")} == {
        "dense": 1,
        "1t1i": 2,
        "moe8x": 2,
        "4t4i": 2,
        "mot": 1,
        "4t4i_untied": 2,
        "mot_4t1i": 2,
        "tc_8x": 2,
        "tc_4t4i": 2,
    }
    assert found["dense"].config.model.auxiliary.mode == "off"
    assert found["mod_dense"].config.model.auxiliary.mode == "joint"
    assert found["mod_dense"].config.model.experts.threshold_decay == 0.9
    assert found["1t1i"].config.model.experts.noise == "gumbel"
    assert all(s.config.model.num_layers % 2 == 0 and s.config.model.ffn_hidden_size % 2 == 0 for s in found.values())


@pytest.mark.parametrize(
    ("ep", "expected"),
    [
        (4, {"dense": 1, "1t1i": 2, "moe8x": 4, "7t1i": 4}),  # groups of 7 and 1 are not divisible
        (8, {"dense": 1, "1t1i": 2, "moe8x": 8, "7t1i": 8}),
        (6, {"dense": 1, "1t1i": 2, "moe8x": 6, "7t1i": 6}),
        (3, {"dense": 1, "1t1i": 1, "moe8x": 3, "7t1i": 3}),  # 2 ranks would not divide those of the others
    ],
)
def test_expert_parallelism_is_kept_where_every_rank_has_an_expert(ep: int, expected: dict[str, int]) -> None:
    given = config(f"parallel.ep={ep}", experts={"counts": {"text": 7, "image": 1}})
    found = by_name(siblings(given))
    assert {name: found[name].config.parallel.ep for name in expected} == expected
    assert {found[f"mod_{name}"].config.parallel.ep for name in ("1t1i", "7t1i")} == {expected["1t1i"], ep}
    for sibling in found.values():
        check(sibling.config.model_copy(update={"train": TWENTY_FOUR}), world_size=24)


@pytest.mark.parametrize("layout", [("delayed", 1), ("blockwise", 2)])
def test_widths_that_fp8_takes(layout: tuple[str, int]) -> None:
    """Every sibling of the cluster's recipe keeps rows of sixteen on a rank, and is as near as without FP8."""
    fp8, tp = layout
    given = load(CONFIGS / "moma_1b4_4t4i.yaml", [f"precision.fp8={fp8}", f"parallel.tp={tp}"])
    found = siblings(given)
    assert len({sibling.config.model.ffn_hidden_size for sibling in found}) > 1  # it is a width that was looked for
    for sibling in found:
        assert sibling.config.model.ffn_hidden_size % (16 * tp) == 0
        assert sibling.ratio == pytest.approx(1.0, rel=0.01)
        check(sibling.config, world_size=tp * given.parallel.ep)


def test_untied_siblings_do_the_work_of_their_tied_ones() -> None:
    """With as many parameters more as the other modality's weights have."""
    found = by_name(siblings(config(kind="dense")))
    assert found["mot"].flops == pytest.approx(found["dense"].flops)
    assert found["mot"].changes == ("model.untie: [] -> [attention, ffn, norms]",)
    assert found["4t4i_untied"].flops == pytest.approx(found["4t4i"].flops)
    layer = (2 * 64 * 64 + 2 * 64 * 64) + (2 * 64 + 2 * 16)  # attention, and norms with those of queries and keys
    assert found["4t4i_untied"].parameters == found["4t4i"].parameters + 8 * layer
    assert found["mot"].parameters == found["dense"].parameters + 8 * (layer + 3 * 64 * 96)
    hybrid = found["mot_4t1i"].config.model
    assert hybrid.experts.counts == {"text": 4, "image": 1} and hybrid.experts.ungated == ("image",)
    assert hybrid.untie == ("attention", "norms")
    routers = 8 * 64 * 4  # weights of the text experts' routers
    assert found["mot_4t1i"].flops == pytest.approx(found["dense"].flops + 2 * routers)
    assert found["mot_4t1i"].parameters == found["mot"].parameters + 8 * 3 * 3 * 64 * 96 + routers
    assert by_name(siblings(found["mot_4t1i"].config))["mot_4t1i"].changes == ()
    given = config(kind="dense", untie=["norms", "ffn", "attention"])
    assert by_name(siblings(given))["mot"].changes == ()


def test_siblings_in_which_tokens_choose() -> None:
    """As much work as the experts that choose, without their settings; and back again."""
    experts = {"counts": {"text": 4, "image": 4}, "choice": "softmax", "capacity": "actual", "threshold_decay": 0.9}
    found = by_name(siblings(config(experts=experts, auxiliary={"mode": "joint"})))
    for name, like in (("tc_4t4i", "4t4i"), ("tc_8x", "moe8x")):
        model = found[name].config.model
        assert found[name].flops == pytest.approx(found[like].flops) and not model.routes
        assert model.experts.token_choice is not None and model.experts.token_choice.top_k == 1
        assert model.auxiliary.mode == "off" and model.experts.choice == "sigmoid"
        assert found[like].config.model.experts.token_choice is None
    own = {"top_k": 2, "scores": "softmax", "capacity_factor": 1.25}
    given = config(experts={"counts": {"text": 4, "image": 4}, "token_choice": own})
    found = by_name(siblings(given))
    assert found["tc_4t4i"].changes == () and found["tc_8x"].config.model.experts.token_choice is not None
    assert found["tc_8x"].config.model.experts.token_choice.model_dump(exclude_defaults=True) == own
    assert found["4t4i"].config.model.experts.token_choice is None
    assert found["4t4i"].config.model.ffn_hidden_size == 240  # 2 * 1.25 slots for each token


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (["model.qkv_bias=true"], {"mot", "4t4i_untied", "mot_4t1i"}),
        (["model.backend=te"], {"mot_4t1i"}),
        (["precision.fp8=tensorwise"], {"mot_4t1i"}),
        (["precision.fp8=tensorwise", "precision.fp8_emulate=true"], set()),
    ],
    ids=str,
)
def test_no_untied_siblings_where_a_rule_refuses_them(overrides: list[str], refused: set[str]) -> None:
    given = config("precision.dtype=bf16", *overrides, kind="dense", qk_norm=False)
    untied = {"mot", "4t4i_untied", "mot_4t1i"}
    assert untied - set(by_name(siblings(given, tolerance=0.1))) == refused


def test_number_of_experts() -> None:
    assert "moe4x" in by_name(siblings(config(kind="moe", experts={"counts": {"mixed": 4}})))
    uneven = by_name(siblings(config(experts={"counts": {"text": 3, "image": 1}})))
    assert uneven["3t1i"].changes == ()
    assert {"2t2i", "moe4x"} <= set(by_name(siblings(config(kind="dense"), experts=2)))
    assert len(siblings(config(kind="dense"), experts=1)) == 10  # 1t1i is there once
    assert group_name({"text": 2, "image": 2, "speech": 1}) == "2t2i1s"
    assert group_name({"text": 2, "touch": 1}) == "2text1touch"


def test_nothing_near_enough() -> None:
    with pytest.raises(ConfigError, match="forward FLOPs per token are the nearest") as caught:
        siblings(config(kind="dense", ffn_hidden_size=8), tolerance=1e-4)
    assert caught.value.remedy.startswith("allow it with --tolerance 0.0")


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "files"
    command = ["baselines", str(CONFIGS / "equal_loss.yaml"), "train.steps=50", "--out", str(out), "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tolerance"] == 0.01
    assert len(list(out.iterdir())) == len(result["siblings"]) == 12
    for entry, sibling in zip(result["siblings"], siblings(load(command[1], ["train.steps=50"])), strict=True):
        assert load(entry["file"]) == sibling.config
        assert entry["flops_per_token"] == flops_per_token(load(entry["file"])).forward
        assert Path(entry["file"]).read_text() == text_of(sibling, of=command[1])
    assert "# changed: model.num_layers: 4 -> 7\n" in (out / "eta_mod_4t4i.yaml").read_text()
    assert main(command[:-1]) == 0  # the same again: nothing to complain about
    assert "eta_moe8x.yaml" in capsys.readouterr().out
    (out / "eta_dense.yaml").write_text("mine")
    assert main(command) == 2
    assert "differs from the file to write" in capsys.readouterr().err
    assert (out / "eta_dense.yaml").read_text() == "mine"
