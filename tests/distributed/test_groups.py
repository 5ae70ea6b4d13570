"""Process groups: a plain megatron-core GPT trains alike in every layout, on CPU over gloo."""

import pytest
import torch
from megatron.core import rerun_state_machine
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from mmscale.errors import ConfigError
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.optim import adam
from tests.support import Ranks, distributed, run_ranks

VOCAB, LENGTH, BATCHES, STEPS = 32, 8, 4, 3


def _fill(chunks: list[torch.nn.Module], *, offsets: list[int]) -> None:
    """Weights by global name, so that every layout starts from the same model."""
    for chunk, offset in zip(chunks, offsets, strict=True):
        for name, parameter in sorted(chunk.named_parameters()):
            parts = name.split(".")
            if "layers" in parts:
                at = parts.index("layers") + 1
                parts[at] = str(int(parts[at]) + offset)
            generator = torch.Generator().manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(".".join(parts))))
            start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.data.copy_(start + 0.05 * torch.randn(parameter.shape, generator=generator))


def _batch(step: int, index: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + index)
    tokens = torch.randint(0, VOCAB, (1, LENGTH + 1), generator=generator)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}


def _train(pg: ProcessGroupCollection, *, pp: int = 1, vpp: int | None = None, dp: int = 1) -> list[float]:
    """Loss (of the last stage, over all data-parallel ranks) and gradient norm after each of a few steps."""
    adam.install()
    config = TransformerConfig(
        num_layers=4,
        hidden_size=16,
        num_attention_heads=2,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        calculate_per_token_loss=True,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        pipeline_dtype=torch.float32,
        # Batched send and receive to one peer match in the wrong order with 2 stages and chunks.
        batch_p2p_comm=vpp is None,
        overlap_p2p_comm=vpp is not None,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )
    chunks: list[torch.nn.Module] = []
    for chunk in range(vpp or 1):
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="LayerNorm"),
            VOCAB,
            LENGTH,
            pre_process=pg.pp.rank() == 0 and chunk == 0,
            post_process=pg.pp.rank() == pp - 1 and chunk == (vpp or 1) - 1,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            pg_collection=pg,
            vp_stage=chunk if vpp else None,
        )
        model.model_type = "gpt"
        chunks.append(model)
    per_chunk = 4 // (pp * (vpp or 1))
    offsets = [(chunk * pp + groups.pipeline_rank()) * per_chunk for chunk in range(vpp or 1)]
    _fill(chunks, offsets=offsets)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    wrapped = [
        DistributedDataParallel(config, ddp, chunk, pg_collection=pg, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=1e-2, weight_decay=0.1, clip_grad=1.0, use_distributed_optimizer=True),
        wrapped,
        use_gloo_process_groups=False,
        pg_collection=pg,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    schedule = get_forward_backward_func(pp, vpp)

    def forward(batches, model):  # type: ignore[no-untyped-def]
        batch = next(batches)
        positions = torch.arange(LENGTH).unsqueeze(0)
        mask = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), diagonal=1)
        output = model(batch["tokens"], positions, mask, labels=batch["labels"])
        count = torch.tensor(LENGTH, dtype=torch.int)
        return output, lambda losses: (losses.sum(), count, {"loss": losses.sum().detach()})

    curve: list[float] = []
    for step in range(STEPS):
        mine = range(groups.data_parallel_rank(), BATCHES, dp)
        iterators = [iter([_batch(step, index) for index in mine]) for _ in chunks]
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        results = schedule(
            forward_step_func=forward,
            data_iterator=iterators if vpp else iterators[0],
            model=wrapped if vpp else wrapped[0],
            num_microbatches=BATCHES // dp,
            seq_length=LENGTH,
            micro_batch_size=1,
            p2p_communicator=P2PCommunicator(pp_group=pg.pp, config=config) if pp > 1 else None,
            pg_collection=pg,
        )
        ok, norm, _ = optimizer.step()
        assert ok
        loss = torch.stack([result["loss"] for result in results]).sum() if results else torch.zeros(())
        torch.distributed.all_reduce(loss)  # only last stages add to it
        curve += [float(loss) / (BATCHES * LENGTH), float(norm)]
    return curve


@distributed(world_size=2)
def test_layouts_train_alike(ranks: Ranks) -> None:
    groups.start(ranks)
    curves = {}
    for name, layout in {
        "dp2": {"dp": 2},
        "pp2": {"pp": 2},
        "pp2vpp2": {"pp": 2, "vpp": 2},
    }.items():
        parallel = {key: value for key, value in layout.items() if key != "dp"}
        curves[name] = _train(groups.initialize_layout(**parallel), **layout)
        groups.destroy_layout()
    groups.finalize()

    groups.initialize(Ranks(rank=0, world_size=1))  # one process of its own, for each rank
    curves["alone"] = _train(groups.collection())
    groups.finalize()
    assert curves["alone"][0] > curves["alone"][-2], "it does not learn"
    for name, curve in curves.items():
        # Norms too: a wrong gradient reduction hardly moves the first losses, but does move the norm.
        assert curve == pytest.approx(curves["alone"], rel=2e-6), name


@distributed(world_size=4)
def test_groups_of_every_layout(ranks: Ranks) -> None:
    groups.start(ranks)
    for tp, pp, ep, cp in (
        (1, 1, 1, 1),
        (2, 1, 1, 1),
        (1, 2, 1, 1),
        (2, 2, 1, 1),
        (1, 1, 4, 1),
        (2, 1, 2, 1),
        (1, 2, 2, 1),
        (4, 1, 1, 1),
        (1, 4, 1, 1),
        (1, 1, 1, 2),
        (1, 1, 4, 2),
        (1, 1, 2, 4),
        (2, 1, 2, 2),
        (1, 2, 1, 2),
    ):
        pg = groups.initialize_layout(tp=tp, pp=pp, ep=ep, cp=cp)
        holders = 4 // (tp * pp)  # of the same dense weights
        dp = holders // cp
        sizes = {"tp": tp, "pp": pp, "cp": cp, "dp": dp, "dp_cp": holders, "ep": ep, "expt_tp": tp}
        sizes |= {"mp": tp * pp, "tp_ep": tp * ep, "tp_ep_pp": tp * ep * pp, "tp_cp": tp * cp, "intra_dist_opt": 4}
        sizes |= {"expt_dp": holders // ep}
        assert {name: getattr(pg, name).size() for name in sizes} == sizes
        for name in sizes:
            total = torch.ones(1)
            torch.distributed.all_reduce(total, group=getattr(pg, name))
            assert int(total) == sizes[name]
        assert (pg.embd is None) == (groups.pipeline_rank() not in (0, pp - 1))
        assert (groups.tensor_parallel_size(), groups.pipeline_size(), groups.expert_parallel_size()) == (tp, pp, ep)
        assert groups.data_parallel_size() == dp
        assert pg.tp.rank() == ranks.rank % tp  # neighbours share a node and its fast links
        assert groups.pipeline_rank() == ranks.rank // (4 // pp)
        assert (groups.context_parallel_size(), groups.context_parallel_rank()) == (cp, ranks.rank // tp % cp)
        assert groups.data_parallel_rank() == ranks.rank // (tp * cp) % dp
        assert pg.ep.rank() == ranks.rank // tp % ep
        assert groups.virtual_pipeline_size() is None
        groups.destroy_layout()
        assert torch.distributed.distributed_c10d._world.pg_map.keys() == {torch.distributed.group.WORLD}


@distributed(world_size=2)
def test_random_states_differ_over_tensor_parallel_ranks_only(ranks: Ranks) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    def draws() -> list[Tensor]:
        with get_cuda_rng_tracker().fork():
            own = torch.rand(4)
        gathered = [torch.empty(4) for _ in range(2)]
        torch.distributed.all_gather(gathered, own)
        return gathered

    groups.initialize(ranks, tp=2, seed=5)
    first = draws()
    assert not torch.equal(*first)
    groups.destroy_layout()
    groups.initialize_layout(seed=5)
    assert torch.equal(*draws())
    groups.destroy_layout()
    groups.initialize_layout(tp=2, seed=5)
    assert torch.equal(draws()[0], first[0])  # a layout starts anew whatever ran before


@distributed(world_size=8)
def test_ranks_that_hold_the_same_experts(ranks: Ranks) -> None:
    """Tensor-parallel parts and copies of this rank's experts, and no rank with other experts."""
    groups.start(ranks)
    for tp, pp, ep, cp in (
        *((1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 4, 1), (2, 1, 2, 1), (2, 1, 4, 1), (2, 2, 2, 1), (1, 2, 2, 1)),
        *((1, 1, 1, 2), (2, 1, 2, 2), (2, 1, 4, 2)),
    ):
        collection = groups.initialize_layout(tp=tp, pp=pp, ep=ep, cp=cp)
        own = (collection.ep.rank(), collection.pp.rank())
        everyone = groups.gathered(own)
        expected = [rank for rank, other in enumerate(everyone) if other == own]
        found = torch.distributed.get_process_group_ranks(groups.expert_replica_group())
        assert sorted(found) == expected, (tp, pp, ep, cp, found, expected)
        groups.destroy_layout()


@distributed(world_size=4)
def test_gathered_has_the_order_of_ranks(ranks: Ranks) -> None:
    groups.start(ranks)
    collection = groups.initialize_layout(tp=2)
    mine = {"rank": ranks.rank}
    assert [one["rank"] for one in groups.gathered(mine)] == [0, 1, 2, 3]
    first = ranks.rank // 2 * 2
    assert [one["rank"] for one in groups.gathered(mine, group=collection.tp)] == [first, first + 1]
    groups.destroy_layout()


@distributed(world_size=1)
def test_finalize_leaves_nothing(ranks: Ranks) -> None:
    groups.finalize()  # before anything was started
    groups.initialize(Ranks())
    rerun_state_machine.get_rerun_state_machine()
    groups.finalize()
    groups.finalize()
    assert not torch.distributed.is_initialized()
    assert rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE is None


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"tp": 3}, r"tp\*pp = 3\*1 = 3 does not divide the world size 8; `mmscale plan` lists"),
        ({"tp": 2, "pp": 2, "ep": 4}, r"ep = 4 does not divide the data-parallel size 2 \(world size 8 / tp\*pp 4\)"),
        ({"tp": 2, "cp": 8}, r"tp\*pp\*cp = 2\*1\*8 = 16 does not divide the world size 8"),
        ({"vpp": 2}, r"parallel.vpp = 2 cuts a pipeline stage in chunks, but parallel.pp = 1"),
        ({"tp": 0}, r"parallel.tp = 0 is below 1"),
    ],
)
def test_layout_that_does_not_fit_is_refused_before_anyone_waits(layout: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        groups.initialize(Ranks(rank=3, world_size=8, local_rank=3, local_world_size=8), **layout)
    assert not torch.distributed.is_initialized()


def test_ranks_can_be_forked_after_groups_of_this_process() -> None:
    """What megatron-core keeps of finished groups would hang or end forked ranks that drop it."""
    rotary = RotaryEmbedding(kv_channels=4, rotary_percent=1.0, use_cpu_initialization=True)
    kept = RotaryEmbedding.forward.cache_info().maxsize
    collection = groups.initialize(RankEnv())
    for length in range(kept):
        rotary(2 + length, cp_group=collection.cp)
    del collection
    groups.finalize()

    def start_groups(ranks: RankEnv) -> None:
        collection = groups.initialize(ranks, tp=2)
        for length in range(kept):
            rotary(2 + length, cp_group=collection.cp)
        groups.finalize()

    run_ranks(start_groups, world_size=2, timeout_s=300)
