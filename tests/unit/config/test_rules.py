"""Every rule between settings: one configuration that breaks it, and what the user is told."""

from __future__ import annotations

from typing import Any

import pytest
from changed import changed

from mmscale.config import Config
from mmscale.config.rules import check, violations
from mmscale.errors import ConfigError

BASE: dict[str, Any] = {
    "vocab": {"modalities": [{"name": "text", "size": 100}, {"name": "image", "size": 61}]},
    "model": {
        "kind": "moma",
        "num_layers": 8,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "seq_length": 64,
        "experts": {"counts": {"text": 4, "image": 4}},
    },
}


def config(**changes: Any) -> Config:
    """BASE with dotted keys replaced; dots are written as double underscores."""
    return changed(BASE, changes)


DENSE = {"model__kind": "dense", "model__experts": {}}
RING = {"parallel__cp": 2, "parallel__cp_attention": "ring", "data__document_multiple": 4}

BROKEN = [
    # vocabulary
    ({"vocab__modalities": []}, "vocab.modalities is empty"),
    ({"objective__cm3_rate": 0.5}, "objective.cm3_rate = 0.5 needs tokens for holes"),
    ({"vocab__modalities": [{"name": "a", "size": 9}] * 2}, "vocab.modalities: names repeat: a, a"),
    ({"vocab__modalities": [{"name": "type", "size": 9}]}, "'type' cannot be part of a parameter's name"),
    ({"vocab__modalities": [{"name": "a.b", "size": 9}]}, "'a.b' cannot be part of a parameter's name"),
    (
        {"vocab__modalities": [{"name": "text", "size": 4}, {"name": "image", "size": 9}]},
        "text has 4 ids, fewer than the 5 special tokens",
    ),
    (
        {"train__modality_weights": {"audio": 1}},
        "train.modality_weights: audio is not in vocab.modalities (text, image)",
    ),
    ({"train__modality_weights": {"text": 0, "image": 0}}, "every modality has weight 0"),
    (
        {"train__loss_weights": {"temperature": 0.5}, "train__loss": "mine:Loss"},
        "train.loss_weights is set, but the plug-in train.loss = mine:Loss computes its own loss",
    ),
    ({"data__prepare": {"documents": ["a"], "canaries": {"copies": [2, 2]}}}, "data.prepare.canaries.copies has no"),
    (
        {"data__prepare": {"source": "megatron", "documents": ["x.idx"], "canaries": {}}},
        "data.prepare.canaries is set, but the documents of a Megatron corpus are linked as they are",
    ),
    # shapes
    ({"model__num_attention_heads": 6}, "model.hidden_size = 64 is not divisible by model.num_attention_heads = 6"),
    ({"model__kv_channels": 7}, "the head width 7 is odd"),
    ({"model__num_query_groups": 3}, "model.num_attention_heads = 4 is not divisible by model.num_query_groups = 3"),
    ({"model__rope_base": 12345.6}, "model.rope_base = 12345.6 is not a whole number"),
    ({"model__rope_scaling": {"high_freq_factor": 1.0}}, "high_freq_factor = 1 is not above low_freq_factor = 1"),
    (
        {"model__rope_scaling": {"rope_type": "yarn", "beta_fast": 1.0}},
        "model.rope_scaling.beta_fast = 1 is not above beta_slow = 1",
    ),
    ({"model__rope_scaling": {"rope_type": "yarn"}, "model__rope_base": 1.0}, "model.rope_base = 1 with YaRN"),
    # mirrors
    ({"checkpoint__mirror": "s3://key:hidden@bucket/x"}, "checkpoint.mirror holds credentials"),
    ({"checkpoint__mirror": "bucket/x"}, "checkpoint.mirror = 'bucket/x' is no URL of a folder"),
    ({"checkpoint__mirror": "file://x"}, "checkpoint.mirror = 'file://x': a folder in the file system is named from"),
    # tensor parallelism
    ({"parallel__tp": 8}, "model.num_attention_heads = 4 is not divisible by parallel.tp = 8"),
    (
        {
            "parallel__tp": 4,
            "model__num_attention_heads": 12,
            "model__kv_channels": 16,
            "model__num_query_groups": 3,
        },
        "model.num_query_groups = 3 is not divisible by parallel.tp = 4",
    ),
    (
        {"parallel__tp": 2, "model__ffn_hidden_size": 97},
        "model.ffn_hidden_size = 97 is not divisible by parallel.tp = 2",
    ),
    (
        {"parallel__tp": 2, "model__experts__shared": 1, "model__experts__shared_ffn_hidden_size": 33},
        "the width of all shared experts together = 33 is not divisible by parallel.tp = 2",
    ),
    ({"parallel__tp": 4, "vocab__pad_multiple": 5}, "vocab.pad_multiple = 5 pads to 165 rows"),
    ({"parallel__tp": 4, "model__seq_length": 66}, "above tp = 1 sequence parallelism splits every sequence"),
    ({"parallel__pp": 2, "parallel__pp_layers": [1, 1, 2]}, "parallel.pp_layers has 3 numbers that sum to 4"),
    ({"parallel__pp": 2, "parallel__pp_layers": [1, 2]}, "parallel.pp_layers has 2 numbers that sum to 3"),
    # experts
    ({"model__kind": "dense"}, "model.experts.counts is set, but model.kind = dense has no experts"),
    ({**DENSE, "model__experts__shared": 1}, "model.experts.shared is set, but model.kind = dense"),
    ({**DENSE, "model__experts__noise": "gumbel"}, "model.experts.noise is set, but model.kind = dense"),
    (
        {"data__path": None, "data__blend": [{"path": "a", "weight": 0}, {"path": "b", "weight": 0}]},
        "every source has weight 0",
    ),
    ({**DENSE, "model__experts__capacity": "actual"}, "model.experts.capacity is set, but model.kind = dense"),
    ({**DENSE, "model__experts__choice": "softmax"}, "model.experts.choice is set, but model.kind = dense"),
    ({**DENSE, "model__experts__token_choice": {}}, "model.experts.token_choice is set, but model.kind = dense"),
    (
        {"model__experts__token_choice": {"top_k": 5}},
        "model.experts.token_choice.top_k = 5, but the group text has only 4 experts",
    ),
    *(
        (
            {"model__experts__token_choice": {}, f"model__experts__{key}": value},
            f"model.experts.{key} = {value} is a setting of expert choice, but model.experts.token_choice is set",
        )
        for key, value in (("choice", "softmax"), ("capacity", "actual"), ("capacity_factor", 2.0), ("noise", "gumbel"))
    ),
    (
        {"model__experts__token_choice": {}, "model__experts__cuda_graph": True},
        "model.experts.cuda_graph with model.experts.token_choice",
    ),
    (
        {"model__experts__token_choice": {}, "model__experts__threshold_decay": 0.9},
        "model.experts.threshold_decay is set, but without Mixture-of-Depths token choice is causal",
    ),
    (
        {"model__experts__token_choice": {}, "model__auxiliary__mode": "joint"},
        "model.auxiliary.mode = joint is set, but without Mixture-of-Depths token choice is causal",
    ),
    ({"optim__freeze": ["speech"]}, "optim.freeze: speech is neither a modality (text, image) nor a part of one"),
    ({"optim__freeze": ["text.embedding"]}, "optim.freeze: text.embedding is neither a modality"),
    ({"optim__freeze": ["text.attention"]}, "optim.freeze: text.attention: the model has no such weights"),
    ({**DENSE, "optim__freeze": ["text"]}, "optim.freeze: text: the model has no such weights"),
    ({"auxiliary__optim__freeze": ["text"]}, "auxiliary.optim.freeze is set"),
    (
        {"optim__freeze": ["text"], "optim__optimizer": "muon"},
        "optim.freeze with optim.optimizer = muon: frozen weights were tested with AdamW only",
    ),
    ({"model__kind": "moe"}, "model.experts.counts has 2 groups, model.kind = moe wants exactly one"),
    ({"model__kind": "moe", "model__experts": {}}, "model.experts.counts has 0 groups"),
    ({"model__experts__counts": {"text": 4}}, "one group for each of vocab.modalities: text, image"),
    ({"model__experts__counts": {}}, "model.experts.counts names nothing"),
    ({"parallel__ep": 16}, "model.experts.counts has 8 experts altogether, fewer than parallel.ep = 16"),
    ({"model__experts__share": {"text": 1.0}}, "model.experts.share names text, vocab.modalities has text, image"),
    ({"model__experts__share": {"text": 0.5, "image": 0.6}}, "model.experts.share sums to 1.1, not to 1"),
    ({"model__experts__capacity_multiple": 128}, "capacity_multiple = 128 is more than the 64 tokens"),
    (
        {"model__experts__capacity_factor": 9, "model__experts__share": {"text": 0.5, "image": 0.5}},
        "capacity_factor 9 * share 0.5 / 4 experts of text = 1.125: each expert would take more tokens than there are",
    ),
    # depth
    (
        {"model__depth": {"multiple": 6}, "parallel__tp": 4},
        "model.depth.multiple = 6 is not divisible by parallel.tp = 4",
    ),
    ({"model__depth": {"multiple": 65}}, "model.depth.multiple = 65 is more than model.seq_length = 64"),
    # layout
    (
        {"parallel__cp": 2},
        "parallel.cp = 2 with data.document_multiple = 1: every document is cut into 2 * cp = 4 equal pieces",
    ),
    (
        {"parallel__cp": 4, "data__document_multiple": 8, "parallel__tp": 4, "model__seq_length": 72},
        "model.seq_length = 72 is not divisible by 2 * parallel.cp * parallel.tp = 32",
    ),
    (
        {"parallel__cp": 4, "data__document_multiple": 8, "model__depth": {"multiple": 4, "capacity": 0.05}},
        "model.depth selects 4 tokens of a sequence, which are split into 2 * parallel.cp * parallel.tp = 8 parts",
    ),
    (
        {"parallel__cp": 2, "data__document_multiple": 4, "parallel__ep": 3},
        "parallel.cp = 2 with parallel.ep = 3: neither divides the other",
    ),
    (
        {**RING, "model__depth": {"multiple": 8}},
        "parallel.cp_attention = ring with model.depth: the ring cuts every document into 2 * parallel.cp pieces",
    ),
    ({**RING, "model__backend": "torch"}, "ring with model.backend = torch: the ring is Transformer-Engine's"),
    ({**RING, "precision__fp8": "blockwise", "precision__fp8_emulate": True}, "ring with precision.fp8_emulate"),
    ({**RING, **DENSE, "model__untie": ["ffn"]}, "parallel.cp_attention = ring with model.untie"),
    ({**RING, "precision__dtype": "fp32"}, "Transformer-Engine's attention takes bf16"),
    ({"data__document_multiple": 48}, "model.seq_length = 64 is not divisible by data.document_multiple = 48"),
    ({**DENSE, "parallel__ep": 2}, "parallel.ep = 2, but model.kind = dense has no experts to spread"),
    ({"parallel__vpp": 2}, "parallel.vpp = 2 with parallel.pp = 1: interleaving needs two stages"),
    ({"parallel__vpp": 1, "parallel__pp": 2}, "parallel.vpp = 1 with parallel.pp = 2: interleaving needs"),
    ({"parallel__pp": 3}, "model.num_layers = 8 is not divisible by parallel.pp * vpp = 3 * 1 = 3"),
    (
        {"parallel__pp": 4, "parallel__vpp": 4},
        "model.num_layers = 8 is not divisible by parallel.pp * vpp = 4 * 4 = 16",
    ),
    ({"parallel__pp": 2, "parallel__overlap_p2p": True}, "parallel.overlap_p2p needs interleaving"),
    (
        {"parallel__pp": 4, "parallel__vpp": 2, "parallel__overlap_p2p": True, "parallel__batch_p2p": True},
        "parallel.overlap_p2p and parallel.batch_p2p exclude each other",
    ),
    (
        {"parallel__pp": 2, "parallel__vpp": 2, "parallel__overlap_p2p": False},
        "parallel.batch_p2p with parallel.pp = 2 and vpp mixes up the two directions",
    ),
    # how experts are computed, and what overlaps
    (
        {"parallel__overlap_param_gather": True, "parallel__overlap_grad_reduce": False},
        "parallel.overlap_param_gather needs parallel.overlap_grad_reduce",
    ),
    ({"parallel__overlap_experts": True}, "with parallel.ep = 1 no tokens are exchanged"),
    ({"parallel__overlap_tensor": True}, "with parallel.tp = 1 there are no tensor-parallel messages"),
    (
        {"parallel__overlap_tensor": True, "parallel__tp": 2, "model__backend": "torch"},
        "parallel.overlap_tensor with model.backend = torch: the user buffers are",
    ),
    (
        {"parallel__overlap_tensor": True, "parallel__tp": 2, "precision__dtype": "fp32"},
        "parallel.overlap_tensor with precision.dtype = fp32: user buffers hold bf16 or FP8",
    ),
    (
        {"parallel__overlap_tensor": True, "parallel__tp": 2, "precision__fp8": "blockwise"},
        "parallel.overlap_tensor with precision.fp8 = blockwise: user buffers carry no scales of blocks",
    ),
    (
        {
            "parallel__overlap_tensor": True,
            "parallel__tp": 2,
            "precision__fp8": "blockwise",
            "precision__fp8_emulate": True,
        },
        "parallel.overlap_tensor with precision.fp8_emulate: emulation runs in torch",
    ),
    (
        {"parallel__overlap_tensor": True, "parallel__tp": 2, "model__depth": {"multiple": 8}},
        "parallel.overlap_tensor with model.depth: user buffers have one shape",
    ),
    (
        {"model__experts__compute": "grouped_mm", "model__ffn_hidden_size": 60, "parallel__tp": 2},
        "model.experts.compute = grouped_mm: model.ffn_hidden_size / parallel.tp = 30 is not a multiple of",
    ),
    ({**DENSE, "model__experts__cuda_graph": True}, "model.kind = dense has no experts"),
    (
        {"model__experts__cuda_graph": True, "model__experts__capacity": "actual"},
        "these capacities change with every micro-batch",
    ),
    ({"model__experts__cuda_graph": True, "parallel__pp": 2}, "a pipeline stage has several in flight"),
    ({"model__experts__cuda_graph": True, "parallel__recompute": "full"}, "recomputing layers would save no memory"),
    (
        {
            "model__experts__cuda_graph": True,
            "parallel__recompute": "selective",
            "parallel__recompute_modules": ["mlp"],
        },
        "recomputing experts would save no memory",
    ),
    ({"parallel__recompute": "selective", "parallel__recompute_modules": []}, "nothing would be recomputed"),
    ({"parallel__loss_chunk": 8, "train__loss": "a.b:Loss"}, "a plug-in gets the logits of all tokens"),
    ({"model__experts__cuda_graph": True, "model__experts__compute": "te"}, "a captured graph would repeat"),
    (
        {"model__experts__cuda_graph": True, "precision__fp8": "tensorwise"},
        "precision.fp8 = tensorwise, for which Transformer-Engine computes the experts",
    ),
    # batches and schedule
    (
        {"train__micro_batch_size": 3, "train__global_batch_size": 8},
        "train.global_batch_size = 8 is not divisible by train.micro_batch_size = 3",
    ),
    ({"optim__warmup": 11, "train__steps": 10}, "optim.warmup = 11 steps is more than train.steps = 10"),
    (
        {"auxiliary__optim__warmup": 11, "auxiliary__steps": 10},
        "auxiliary.optim.warmup = 11 steps is more than auxiliary.steps = 10",
    ),
    (
        {"auxiliary__global_batch_size": 3, "auxiliary__micro_batch_size": 2},
        "auxiliary: the global batch of 3 sequences",
    ),
    ({"sft__global_batch_size": 3, "sft__micro_batch_size": 2}, "sft: the global batch of 3 sequences"),
    ({"sft__path": "a", "sft__blend": [{"path": "b"}]}, "sft.path and sft.blend are both set"),
    ({"sft__optim__warmup": 11, "sft__steps": 10}, "sft.optim.warmup = 11 steps is more than sft.steps = 10"),
    (
        {"sft__optim__moments": "te_fp8", "precision__dtype": "bf16", "resilience__memory_every": 1},
        "sft.optim.moments = te_fp8 with resilience.memory_every",
    ),
    (
        {"vocab__reserved": True, "vocab__modalities": [{"name": "text", "size": 26}, {"name": "image", "size": 8}]},
        "text has 26 ids, fewer than the 27 special tokens",
    ),
    ({"model__auxiliary__mode": "stage"}, "is set by"),
    ({"model__experts__threshold_decay": 1.0}, "threshold_decay = 1 keeps"),
    ({"model__dropout": 1.0}, "model.dropout = 1 drops every output"),
    ({"optim__restart": 1000}, "optim.restart = 1000 is not below train.steps = 1000"),
    ({"optim__restart": 990, "optim__warmup": 20}, "optim.warmup = 20 steps is more than the 10"),
    ({"optim__min_lr": 1.0}, "optim.min_lr = 1 is above optim.lr = 0.0001"),
    (
        {"optim__schedule": "wsd", "optim__warmup": 6, "optim__decay": 6, "train__steps": 10},
        "optim.warmup + optim.decay = 6 + 6 steps is more than train.steps = 10",
    ),
    ({"optim__beta2": 1.0}, "optim.beta2 = 1 never decays"),
    ({"optim__moments": "bf16", "optim__beta2": 0.999}, "optim.moments = bf16 with optim.beta2 = 0.999"),
    ({"auxiliary__optim__moments": "te_fp8", "precision__dtype": "fp32"}, "auxiliary.optim.moments = te_fp8 is for"),
    (
        {"auxiliary__optim__muon__steps": 4},
        "auxiliary.optim.muon is set: auxiliary routers are routers, which Muon leaves to AdamW",
    ),
    (
        {"auxiliary__optim__optimizer": "muon"},
        "auxiliary.optim.optimizer = muon: auxiliary routers are routers, which Muon leaves to AdamW",
    ),
    (
        {"optim__optimizer": "muon", "optim__moments": "te_bf16", "precision__dtype": "bf16"},
        "optim.moments = te_bf16 with optim.optimizer = muon",
    ),
    ({"optim__moments": "te_bf16", "resilience__memory_every": 1}, "te_bf16 with resilience.memory_every"),
    (
        {"auxiliary__optim__moments": "te_fp8", "resilience__memory_every": 1, "model__auxiliary__mode": "joint"},
        "auxiliary.optim.moments = te_fp8 with resilience.memory_every",
    ),
    ({"resilience__anomaly__window": 7}, "resilience.anomaly.window = 7 steps are too few"),
    ({"resilience__memory_group": 1}, "resilience.memory_group = 1 leaves no other rank to keep a rank's parity"),
    (
        {"checkpoint__keep_best": "eval/los", "train__eval_every": 5},
        "checkpoint.keep_best = eval/los is nothing that this run measures",
    ),
    (
        {"train__stop_when": {"metric": "eval/causal/loss"}, "train__eval_every": 5},
        "train.stop_when.metric = eval/causal/loss is nothing that this run measures",
    ),
    ({"train__stop_when": {}}, "train.stop_when.metric is set, but train.eval_every is 0"),
    # data
    ({"data__path": "a", "data__blend": [{"path": "b"}]}, "data.path and data.blend are both set"),
    ({"data__prepare": {"source": "megatron"}}, "data.prepare.documents is empty, but data.prepare.source = megatron"),
    ({"data__prepare": {}}, "data.prepare.documents is empty, but data.prepare.source = documents"),
    (
        {"data__prepare": {"source": "digits", "documents": ["a"], "image": {"size": 8}}},
        "data.prepare.source = digits reads no documents",
    ),
    (
        {"data__prepare": {"documents": ["a"], "held_out": 1, "image": {"size": 8}}},
        "data.prepare.held_out = 1 leaves nothing to train on",
    ),
    (
        {"data__prepare": {"documents": ["a"], "image": {"size": 10, "patch": 4}}},
        "data.prepare.image.size = 10 is not divisible by data.prepare.image.patch = 4",
    ),
    (
        {"data__prepare": {"documents": ["a"], "image": {"size": 8, "residual": 100_000}}},
        "data.prepare.image.residual = 100000 leaves none of the",
    ),
    (
        {"data__prepare": {"documents": ["a"], "image": {"size": 8, "residual": 4, "path": "a"}}},
        "data.prepare.image.residual and path are both set",
    ),
    (
        {"data__prepare": {"documents": ["a"], "image": {"size": 32, "patch": 4, "residual": 4}}},
        "is less than the 130 tokens of one image",
    ),
    (
        {
            "data__prepare": {"documents": ["a"], "image": {"kind": "levels", "size": 4, "channels": 1}},
            "vocab__modalities": [{"name": "text", "size": 100}, {"name": "image", "size": 257}],
        },
        "image has 257 ids, data.prepare.image.kind = levels needs one for each of 2 to 256 grey levels",
    ),
    (
        {"data__prepare": {"documents": ["a"], "image": {"kind": "vq"}}},
        "data.prepare.image.path is missing, kind = vq needs the folder of its model",
    ),
    (
        {"data__prepare": {"documents": ["a"], "image": {"size": 64, "patch": 8}}},
        "model.seq_length = 64 is less than the 66 tokens of one image",
    ),
    (
        {"data__prepare": {"documents": ["a"], "max_document_tokens": 9, "image": {"size": 24, "patch": 8}}},
        "data.prepare.max_document_tokens = 9 is less than the 11 tokens of one image",
    ),
]


@pytest.mark.parametrize(("changes", "cause"), BROKEN, ids=[cause[:40] for _, cause in BROKEN])
def test_broken(changes: dict[str, Any], cause: str) -> None:
    found = violations(config(**changes))
    assert [problem.remedy for problem in found if cause in problem.cause], found
    assert all(problem.remedy and "\n" not in problem.cause for problem in found)
    with pytest.raises(ConfigError):
        check(config(**changes))


def test_all_violations_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        check(config(parallel__cp=2, optim__min_lr=1.0, train__global_batch_size=3), world_size=4)
    first, *others = caught.value.cause.splitlines()
    assert "parallel.cp" in first
    assert len(others) == 2
    assert all(line.startswith("also: ") for line in others)
