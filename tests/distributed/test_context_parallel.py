"""Context parallelism equals one process: loss, gradient norm and every tensor, with choices among whole sequences.

Documents are padded to a multiple of 8 tokens in all of these tests, also in the one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from mmscale.config import Config
from mmscale.data.stream.micro_batch import MicroBatch
from mmscale.data.stream.packed import pack_rows
from mmscale.data.vocab import EOS, SPECIAL_TOKENS
from mmscale.model.context import ContextSplit
from mmscale.model.mixed_modal import MixedModalParams
from mmscale.model.moma import MoMaMLP
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.proof import trial
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.proof.trial import Trace
from mmscale.train.proof.verify_layout import compare_tensors, single_process, verdict
from tests.distributed.layouts import MODELS, References, assert_passes, judge, start, trace
from tests.distributed.layouts import config as plain_config
from tests.support import run_ranks

TWO_RANKS: dict[str, dict[str, Any]] = {
    "cp2": {"cp": 2},
    "cp2_ep2": {"cp": 2, "ep": 2},
    "cp2_recompute": {"cp": 2, "recompute": "full"},
    "cp2_loss_chunk": {"cp": 2, "loss_chunk": 24},
    "cp2_recompute_selective": {"cp": 2, "recompute": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "cp2_ep2_overlap_experts": {"cp": 2, "ep": 2, "overlap_experts": True},
}
FOUR_RANKS: dict[str, dict[str, Any]] = {
    "cp4": {"cp": 4},
    "cp2_dp2": {"cp": 2},
    "cp2_tp2": {"cp": 2, "tp": 2},
    "cp2_pp2": {"cp": 2, "pp": 2},
    "cp2_ep4": {"cp": 2, "ep": 4},
    "cp4_ep2": {"cp": 4, "ep": 2},
    "cp2_dp2_ep2_overlap": {"cp": 2, "ep": 2, "overlap_grad_reduce": True, "overlap_param_gather": True},
    "cp2_pp2_interleaved_ep2": {"cp": 2, "pp": 2, "vpp": 2, "ep": 2},
    "cp2_tp2_ep2_recompute": {"cp": 2, "tp": 2, "ep": 2, "recompute": "full"},
}
EVERYTHING = "moma_depth_joint"
# What every change takes, four ranks in `make test-long`; the rest is exhaustive.
PLAIN = {2: ("cp2_ep2", "cp2_loss_chunk"), 4: ("cp2_tp2", "cp2_pp2")}  # cp4: ranks without images, below
LAYOUTS = {2: TWO_RANKS, 4: FOUR_RANKS}


def config(model: str, **options: Any) -> Config:
    """A model of the layout tests, its documents padded."""
    return plain_config(model, data={"document_multiple": 8}, **options)


def _run(references: References, model: str, folder: Path, world_size: int, names: list[str], **train: Any) -> None:
    """Layouts one after another in one set of forked ranks."""
    references.get(config(model, **train))

    def steps(ranks: RankEnv) -> None:
        start(ranks)
        for name in names:
            made = config(model, parallel=LAYOUTS[world_size][name], **train)
            assert_passes(judge(references, made, ranks, folder / name), f"{model} {name}")
        groups.finalize()

    run_ranks(steps, world_size=world_size, timeout_s=300 + 100 * len(names))


def _fitting(model: str, world_size: int) -> list[str]:
    layers, dense = MODELS[model].get("num_layers", 4), MODELS[model]["kind"] == "dense"
    return [
        name
        for name, parallel in LAYOUTS[world_size].items()
        if not (dense and parallel.get("ep", 1) > 1) and layers % (parallel.get("pp", 1) * parallel.get("vpp", 1)) == 0
    ]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_split_sequences_equal_one_process(references: References, world_size: int, tmp_path: Path) -> None:
    _run(references, EVERYTHING, tmp_path, world_size, list(PLAIN[world_size]))


@pytest.mark.long
@pytest.mark.parametrize(
    "model", [pytest.param("moe_token_choice", marks=pytest.mark.exhaustive), "moma_token_choice_depth"]
)
def test_token_choice_of_split_sequences(references: References, model: str, tmp_path: Path) -> None:
    """Experts keep their earliest tokens of the sequence, not of a rank's part; loads count once for each token."""
    _run(references, model, tmp_path, 2, ["cp2_ep2"])


@pytest.mark.long
@pytest.mark.parametrize("model", ["mot_4t1i", "mot_4t1i_depth"])
def test_ungated_groups_of_split_sequences(references: References, model: str, tmp_path: Path) -> None:
    _run(references, model, tmp_path, 2, ["cp2_ep2"])


@pytest.mark.long
def test_stretched_positions_of_split_sequences(references: References, tmp_path: Path) -> None:
    assert MODELS["dense_tied"]["rope_scaling"]["rope_type"] == "yarn"
    _run(references, "dense_tied", tmp_path, 2, ["cp2"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("world_size", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_under_every_split(references: References, model: str, world_size: int, tmp_path: Path) -> None:
    """Scopes, capacities, choices, norms, quotas, uneven groups, and key/value heads that ranks share."""
    _run(references, model, tmp_path, world_size, _fitting(model, world_size))


class Odd(SyntheticMixture):
    """Sequences whose tokens are spread unevenly: each micro-batch of a step is another case."""

    # Documents of a sequence: tokens before its images, image tokens, tokens behind them.
    CASES = (
        [(2, 0, 0)] * 8,  # padded to 8 tokens each: of 4 ranks two have padding only
        [(1, 7, 56)],  # one document is the sequence, and only one rank has images
        [(3, 20, 15), (10, 0, 8)],  # longer than the part of a rank; padding behind both
        [],  # nothing but padding
    )

    def micro_batch(self, index: int) -> MicroBatch:
        rng = np.random.Generator(np.random.Philox(key=[self.config.run.seed, index]))
        (text, _), (image, end) = self.vocabulary.ranges
        rows = []
        for _ in range(self.config.train.micro_batch_size):
            rows.append([])
            for before, images, behind in self.CASES[index % len(self.CASES)]:
                ids = rng.integers(text + len(SPECIAL_TOKENS), image, size=before + images + behind)
                ids[before : before + images] = rng.integers(image, end, size=images)
                ids[-1] = EOS
                rows[-1].append(ids)
        length, multiple = self.config.model.seq_length, self.config.data.document_multiple
        return replace(
            pack_rows(rows, vocabulary=self.vocabulary, seq_length=length, multiple=multiple)[0], index=index
        )


@pytest.mark.parametrize(
    "model", [pytest.param(one, marks=pytest.mark.long) for one in (EVERYTHING, "mot", "mot_4t1i")]
)
def test_ranks_without_images_and_with_nothing_but_padding(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "SyntheticMixture", Odd)
    _run(References(tmp_path), model, tmp_path, 4, ["cp4"])


# Negative controls: each of them is one mistake that a split can make.


def _own_part(self: ContextSplit, tensor: Tensor, group: Any) -> Tensor:
    """`ContextSplit.gather` whose backward keeps this rank's own part instead of summing those of all ranks."""
    rows = gather_from_sequence_parallel_region(tensor.contiguous(), tensor_parallel_output_grad=False, group=group)
    return rows.flatten(0, 1).index_select(0, self._places).view(rows.shape)


def _across_documents(self: MixedModalParams, dtype: torch.dtype) -> Tensor:
    """`attention_bias` that is causal only."""
    assert self.context is not None
    places = torch.arange(self.document_ids.shape[0])
    own = self.context.own.t().unsqueeze(2)
    return torch.zeros(own.shape[0], own.shape[1], len(places), dtype=dtype).masked_fill(own < places, -torch.inf)[
        :, None
    ]


def _counted_anew(self: MixedModalParams, table: Tensor) -> Tensor:
    """`rotary` with positions of the first rows instead of this rank's."""
    assert self.context is not None
    return table[:, 0, 0, :][self.position_ids[: len(self.context.own)]].unsqueeze(2)


def _shifted_after_the_split(to_device: Callable[..., Any]) -> Callable[..., Any]:
    """`to_device` whose labels are the next tokens of this rank, not of the document."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        batch = to_device(*args, **kwargs)
        return replace(batch, labels=torch.where(batch.loss_mask > 0, batch.tokens.roll(-1, 1), batch.labels))

    return wrong


def _in_the_order_of_ranks(choose: Callable[..., Any]) -> Callable[..., Any]:
    """`_choose` among the tokens of rank 0, then those of rank 1: another token wins where two are equal."""

    def wrong(self: MoMaMLP, name: str, logits: Tensor, member: Tensor, slots: Any, params: Any, **more: Any) -> Any:
        order = params.context.order
        moved = logits.gather(0, order.unsqueeze(-1).expand_as(logits))
        found = choose(self, name, moved, member.gather(0, order), slots, params, **more)
        return found._replace(token=order.reshape(-1)[found.token] * order.shape[1] + found.token % order.shape[1])

    return wrong


@dataclass(frozen=True)
class Mistake:
    """What is replaced by something wrong.

    Attributes:
        owner, name: the attribute.
        wrong: what it becomes, from what it is.
        loss: whether the loss of the first step already shows it.
        equal: all experts find all tokens equally good.
    """

    owner: Any
    name: str
    wrong: Callable[[Any], Any]
    loss: bool = True
    equal: bool = False


MISTAKES = {
    "backward of the gather": Mistake(ContextSplit, "gather", lambda _: _own_part, loss=False),
    "document mask": Mistake(MixedModalParams, "attention_bias", lambda _: _across_documents),
    "positions": Mistake(MixedModalParams, "rotary", lambda _: _counted_anew),
    "label shift": Mistake(trial, "to_device", _shifted_after_the_split),
    "tie order": Mistake(MoMaMLP, "_choose", _in_the_order_of_ranks, equal=True),
}


def _indifferent(chunks: list[Any]) -> None:
    """Routers that find all tokens equal."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if ".mlp.router." in name:
                torch.nn.init.zeros_(parameter)


@pytest.mark.long
def test_each_mistake_of_a_split_is_seen(tmp_path: Path) -> None:
    """And without the mistake the same steps pass."""
    made = config("moma", parallel={"cp": 2})
    alters: dict[bool, Any] = {False: None, True: _indifferent}

    def alone(ranks: RankEnv) -> None:
        start(ranks)
        for equal, alter in alters.items():
            found = trace(single_process(made), ranks, steps=1, saved=tmp_path / f"alone_{equal}", alter=alter)
            (tmp_path / f"{equal}").write_text(f"{found.losses[0]!r} {found.grad_norms[0]!r}")
        groups.finalize()

    run_ranks(alone, world_size=1)

    def split(ranks: RankEnv) -> None:
        start(ranks)

        def judged(name: str, *, equal: bool) -> dict[str, Any]:
            loss, norm = map(float, (tmp_path / f"{equal}").read_text().split())
            found = trace(made, ranks, steps=1, saved=tmp_path / name, alter=alters[equal])
            same = compare_tensors(tmp_path / f"alone_{equal}", tmp_path / name) if ranks.rank == 0 else None
            return verdict(made, reference=Trace((loss,), (norm,)), trace=found, tensors=groups.from_first(same))

        for equal in alters:
            assert_passes(judged(f"right_{equal}", equal=equal), f"equal {equal}")
        for name, mistake in MISTAKES.items():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(mistake.owner, mistake.name, mistake.wrong(getattr(mistake.owner, mistake.name)))
                found = judged(name, equal=mistake.equal)
            assert not found["passed"] and found["gradients"]["differ"], (name, found)
            assert (found["loss_difference"] > found["tolerance"]) == mistake.loss, (name, found)
        groups.finalize()

    run_ranks(split, world_size=2, timeout_s=600)
