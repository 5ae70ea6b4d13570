"""Upcycling: converts a trained model with one FFN, or one per modality, to one with experts (MoMa, section 2.5).

Every expert begins as a copy of the FFN, routers are new, and Gumbel noise breaks the tie between copies, unless tokens
choose. Parts that are to be untied (Mixture-of-Transformers, arXiv 2411.04996) become a copy for each modality, which
changes nothing in what the model computes. Or the FFN is cut into fine-grained experts, whose outputs start at
zero, and stays whole as a shared expert beside them (Innovator, arXiv 2507.18671).

The result is a checkpoint of step 0, so the learning rate's schedule starts again. It has the source's position in the
data, so that training sees new documents. Tensors are streamed. Any layout can train the result, through mmscale.train.

Whether the new model computes the same as the old one depends on the norm placement (`PRESERVES`, with a test for
each).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.moments import decoded
from checkpoints_tools.refusals import check_upcycle
from checkpoints_tools.sources import open_source, summary
from checkpoints_tools.upcycle_recipes import WeightRecipe, final_norms, recipes
from mmscale.checkpoint import rewrite
from mmscale.checkpoint.integrity import CheckpointManifest
from mmscale.checkpoint.settings import config_of
from mmscale.checkpoint.shape import shape_of
from mmscale.checkpoint.tensors import OPTIMIZER, SCALING, Region, TensorEntry, TensorSource, origin_of, unknown_tensor
from mmscale.config import Config
from mmscale.config.load import digest
from mmscale.errors import CheckpointError, shell_command
from mmscale.layers import layer_tensors
from mmscale.model.ranking import RANKINGS
from mmscale.runtime.environment import code_version

PRESERVES = {
    "pre": "a token gets the FFN's output times the sum of its new gates over its old gate (1 for a dense model); new "
    "gates begin near 1/2, and a token that no expert takes gets nothing from the layer",
    "post": "for every token that at least one expert takes: the norm behind the experts cancels the sum of gates, as "
    "far as outputs are large against norm_eps; a token that none takes gets nothing from the layer",
    "post_per_expert": "a token gets the normalised FFN's output times the sum of its new gates over its old gate (1 "
    "for a dense model); new gates begin near 1/2, and a token that no expert takes gets nothing from the layer",
}
_UNTIED = "every token gets what it got: the modalities' weights are copies"
_SPLIT = "every token gets what it got: the whole FFN is the shared expert, and the experts' outputs start at zero"
# Gates of several experts that a token chooses add up to 1, as the gate of a dense model's FFN.
_CHOSEN = "every token gets what it got: its experts are copies, and their gates add up to 1"
_STATES = ("exp_avg", "exp_avg_sq", "param")
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Dropped, because the old auxiliary routers predict other choices.
_AUXILIARY = (".mlp.auxiliary.", ".depth_auxiliary.", "auxiliary_optimizer.")


def upcycle(
    run: Path,
    step: int | None,
    out: Path,
    *,
    experts: Mapping[str, int],
    untie: Sequence[str] = (),
    top_k: int | None = None,
    ungated: Sequence[str] = (),
    split: int | None = None,
    keep_moments: bool = False,
    steps: int | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Write the upcycled model as the checkpoint of a new run.

    Args:
        run: the run's folder, or an archive.
        step: the checkpoint; None: the newest.
        out: the folder of the new run.
        experts: number of each group's experts: of each modality, or of one mixed group; none: the FFN stays.
        untie: parts that get weights of their own for each modality, besides those that have them (`model.untie`).
        top_k: new experts that each token chooses (token choice); None: as in the old model, or experts choose.
        ungated: new groups of one expert without a router, which compute what the FFN did (`model.experts.ungated`).
        split: cut the FFN into this number of experts, beside the whole one as shared expert; of each modality if
            `experts` names none, else every group has a multiple of this number. None: experts have its full width.
        keep_moments: copy the FFN's optimizer moments to the experts too; otherwise theirs begin at 0, like routers'.
        steps: `train.steps` of the new run; None: the old run's remaining steps, or as many again if there are none.
        seed: of the new routers; None: `run.seed`.

    Returns:
        A summary of the new checkpoint, and `experts`, `preserves`, `sequences`, `steps` and `next`.

    Raises:
        UsageError: the groups are not those of the model's modalities.
        CheckpointError: the source is missing, damaged, or has several experts already; `out` has checkpoints.
        ConfigError: the new model breaks a rule between settings.
    """
    wanted: dict[str, Any] = {"experts": experts, "untie": untie, "top_k": top_k, "ungated": ungated, "split": split}
    new = check_upcycle(run, step, out, **wanted, steps=steps)
    source = decoded(open_source(run, step))
    old = config_of(source.info(), where=source.path)
    if split is not None and not experts:
        experts = dict.fromkeys(old.vocab.names, split)
    own_seed = new.run.seed if seed is None else seed
    made = Upcycled(source, old, new, experts=bool(experts), split=split, keep_moments=keep_moments, seed=own_seed)
    asked = {"experts": dict(experts), "untie": list(untie), "keep_moments": keep_moments}
    asked |= {"split": split} if split is not None else {}
    origin = origin_of("upcycle", [source], **asked)
    path = rewrite.into_run(made, out, origin=origin, code_version=code_version())
    return summary(path) | {
        "experts": dict(new.model.experts.counts),
        "untie": list(new.model.untie),
        "preserves": _preserves(new, split=split) if experts else _UNTIED,
        "sequences": made.common()["progress"]["sequences"],
        "steps": new.train.steps,
        "next": shell_command("train", out / "config.yaml"),
    }


def _preserves(new: Config, *, split: int | None) -> str:
    if split is not None:
        return _SPLIT
    chosen = new.model.experts.token_choice
    if chosen is not None and chosen.top_k > 1 and chosen.capacity_factor is None:
        return _CHOSEN
    return PRESERVES[new.model.norm]


class Upcycled:
    """The tensors of the upcycled model (a `TensorSource`), made as they are read.

    Args:
        source: the old model's.
        old, new: configurations.
        experts: whether experts are new, too; otherwise parts are untied and nothing else.
        split: as in `upcycle`.
        keep_moments: as in `upcycle`.
        seed: of new routers.

    Raises:
        CheckpointError: the source does not hold the model of its configuration.
    """

    def __init__(
        self,
        source: TensorSource,
        old: Config,
        new: Config,
        *,
        experts: bool,
        split: int | None,
        keep_moments: bool,
        seed: int,
    ) -> None:
        self.path, self.step = source.path, 0
        self._source, self._new, self._keep, self._seed = source, new, keep_moments, seed
        remain = {tensor.name for tensor in layer_tensors(new, depth=False)}
        self._gone = [tensor.name for tensor in layer_tensors(old, depth=False) if tensor.name not in remain]
        self._new_experts = new.model.has_experts and not old.model.has_experts
        replaced: set[str] = set()
        self._recipes: dict[str, WeightRecipe] = {}
        for layer in range(new.model.num_layers):
            for name, recipe in recipes(old, new, f"decoder.layers.{layer}.", experts=experts, split=split):
                self._recipes[name] = recipe
                replaced |= {recipe.source} if recipe.source is not None else set()
        for name, recipe in final_norms(old, new):
            self._recipes[name] = recipe
            replaced |= {recipe.source} if recipe.source is not None else set()
        # The FP8 scales of the old model do not apply to the new one.
        there = {name for name in source.names() if not name.endswith(SCALING)}
        missing = sorted(replaced - there)
        if missing:
            raise CheckpointError(
                f"{source.path} lacks {missing[0]}, which its configuration has", remedy="`mmscale ckpt verify` it"
            )
        kept = {
            name
            for name in there
            if _weight_of(name) not in replaced | self._recipes.keys()
            and not (experts and any(part in name for part in _AUXILIARY))
        }
        has_state = any(name.startswith(OPTIMIZER) for name in there)
        states = [f"{OPTIMIZER}state.{state}." for state in _STATES] if has_state else []
        self._made = dict.fromkeys(self._recipes, "") | {
            f"{prefix}{name}": prefix
            for name, recipe in self._recipes.items()
            for prefix in states
            # Matrices that Muon trains have no second moment.
            if recipe.is_parameter and (recipe.source is None or f"{prefix}{recipe.source}" in there)
        }
        self._names = sorted(kept | self._made.keys())

    def names(self, *, weights: bool = False) -> list[str]:
        """Names of all tensors, sorted; `weights`: without the optimizer's."""
        return [name for name in self._names if not (weights and name.startswith(OPTIMIZER))]

    def entry(self, name: str) -> TensorEntry:
        """Shape and type of a tensor."""
        if name not in self._made:
            if name not in self._names:
                raise unknown_tensor(name, self._names, where=self.path)
            return self._source.entry(name)
        prefix = self._made[name]
        recipe = self._recipes[name.removeprefix(prefix)]
        exact = bool(prefix) or not recipe.is_parameter  # optimizer state and thresholds are fp32 in every run
        return TensorEntry(name, recipe.shape, torch.float32 if exact else self._source.entry(recipe.like).dtype)

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """A tensor, or a box of it; copies of an FFN are views of one until they are cut."""
        entry = self.entry(name)
        if name not in self._made:
            return self._source.read(name, region)
        prefix = self._made[name]
        weight = name.removeprefix(prefix)
        recipe = self._recipes[weight]
        is_moment = prefix.endswith(tuple(f".{state}." for state in _MOMENTS))
        if recipe.source is not None and not (is_moment and recipe.is_expert and not self._keep):
            whole = recipe.form(self._source.read(f"{prefix}{recipe.source}")).expand(recipe.shape)
        elif recipe.fresh == "router" and not is_moment:
            # The optimizer's fp32 copy and the weight are drawn from the same numbers; the weight is rounded.
            whole = _drawn(recipe.shape, key=f"{self._seed}/upcycle/{weight}", std=self._new.model.init_std)
            whole = whole.to(self._source.entry(recipe.like).dtype).float() if prefix else whole
        elif recipe.fresh == "cutoffs":
            whole = RANKINGS[self._new.model.experts.choice](torch.zeros(recipe.shape))
        else:
            whole = torch.zeros(1, dtype=entry.dtype).expand(recipe.shape)
        assert tuple(whole.shape) == recipe.shape, (name, whole.shape, recipe.shape)
        whole = whole.to(entry.dtype)
        return whole if region is None else whole[tuple(region)].clone()

    def info(self) -> dict[str, Any]:
        """The content of mmscale.json."""
        settings = {
            "shape": shape_of(self._new),
            "config": self._new.model_dump(mode="json"),
            "config_digest": digest(self._new),
        }
        return self._source.info() | settings | {"attempt": 1}

    def manifest(self) -> CheckpointManifest:
        """Its origin."""
        return CheckpointManifest(
            step=0, attempt=1, config_digest=digest(self._new), code_version=code_version(), topology={}, files={}
        )

    def common(self) -> dict[str, Any]:
        """Counters of a run that has not begun, at the source's place in the data; the optimizer's settings."""
        found = copy.deepcopy(self._source.common())
        progress = found.get("progress", {})
        kept = {name: progress.get(name, 0) for name in ("sequences", "tokens")}
        kept["stream"] = progress.get("stream", [])
        found["progress"] = {"step": 0, **kept, "modality_tokens": progress.get("modality_tokens", {})}
        found.pop("auxiliary_optimizer", None)
        if "optimizer" in found:
            found["optimizer"] = self._optimizer(found["optimizer"])
        return found

    def _optimizer(self, settings: dict[Any, Any]) -> dict[Any, Any]:
        """Settings of megatron-core's two optimizers, for dense parameters (0) and for experts (1).

        Both keep the old step count: megatron-core needs the same one for all groups, and with a count of zero Adam's
        bias correction would scale the kept moments up. Moments that begin at 0 without that correction make first
        updates (1 - beta1) / sqrt(1 - beta2) of full size, 0.45 by default, while the learning rate warms up.
        """
        if not self._new_experts:
            return settings
        expert = copy.deepcopy(settings)
        groups = expert["optimizer"]["param_groups"]
        expert["optimizer"]["param_groups"] = [
            group | {"is_expert_parallel": True} for group in groups if group["wd_mult"] != 0.0
        ]
        return {0: settings, 1: expert}

    def objects(self) -> dict[str, bytes]:
        """Serialized objects of the unchanged parts."""
        gone = tuple(f".{name.removesuffix('weight')}" for name in self._gone)
        return {name: value for name, value in self._source.objects().items() if not any(part in name for part in gone)}


def _weight_of(name: str) -> str:
    """The weight that a tensor is, or whose optimizer state it is."""
    for state in _STATES:
        name = name.removeprefix(f"{OPTIMIZER}state.{state}.")
    return name


def _drawn(shape: tuple[int, ...], *, key: str, std: float) -> Tensor:
    """Normal, fp32, the same for the same key."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    return torch.empty(shape).normal_(0.0, std, generator=torch.Generator().manual_seed(number))
