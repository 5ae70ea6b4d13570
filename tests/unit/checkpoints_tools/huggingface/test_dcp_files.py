"""Dense models that torchtitan and Megatron-LM have saved as a starting point, in checkpoints of their own layout.

torchtitan's is written by torch.distributed.checkpoint under torchtitan's names; Megatron-LM's by megatron-core's
GPTModel and dist_checkpointing, which Megatron-LM saves with.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from checkpoints_tools.huggingface.dcp_files import DcpFiles
from checkpoints_tools.huggingface.from_hf import import_
from mmscale.checkpoint import strict_pickle
from mmscale.checkpoint.tensors import open_tensors
from mmscale.errors import CheckpointError
from mmscale.runtime.rank_env import RankEnv
from tests.support import run_ranks
from tests.unit.checkpoints_tools.huggingface.test_hf_foreign import NO_NUMBERS, SHAPE, foreign

NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}


def torchtitan(state: dict[str, Tensor], *, kind: str) -> dict[str, Tensor]:
    """A model's tensors as torchtitan has them; Llama's heads rotate neighbouring channels there."""
    found = {}
    for name, value in state.items():
        for theirs, named in NAMES.items():
            name = name.replace(theirs, named)
        if kind == "llama" and name.endswith(("wq.weight", "wk.weight")):
            halves = value.view(-1, 2, SHAPE["head_dim"] // 2, value.shape[1])
            value = halves.transpose(1, 2).reshape(value.shape)
        found[name.removeprefix("model.")] = value.contiguous()
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_checkpoint_of_torchtitan(kind: str, tmp_path: Path) -> None:
    """The same run, bit by bit, as from the model's Hugging Face folder; optimizer and counters are left."""
    model = foreign(tmp_path / "hf", kind, tie_word_embeddings=False)
    state: dict[str, Any] = torchtitan(model.state_dict(), kind=kind)
    state |= {"optimizer.state.norm.weight.exp_avg": torch.ones(32), "train_state": {"step": 7}}
    dcp.save(state, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tmp_path / "hf" / name, tmp_path / "dcp" / name)
    want = import_(tmp_path / "hf", tmp_path / "one", image_codes=11, seq_length=16)
    done = import_(tmp_path / "dcp", tmp_path / "two", image_codes=11, seq_length=16)
    assert done["model"] == f"dense from {kind}, saved by torchtitan" and done["tensors"] == want["tensors"]
    one, two = open_tensors(tmp_path / "one"), open_tensors(tmp_path / "two")
    assert one.names() == two.names()
    for name in one.names():
        assert torch.equal(one.read(name), two.read(name)), name


def megatron(folder: Path, *, stacked: bool) -> dict[str, Tensor]:
    """A GPTModel of megatron-core, saved as Megatron-LM saves it: its tensors under their names in a run."""
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from mmscale.runtime import groups

    collection = groups.initialize(RankEnv())
    config = TransformerConfig(
        num_layers=SHAPE["num_hidden_layers"],
        hidden_size=SHAPE["hidden_size"],
        ffn_hidden_size=SHAPE["intermediate_size"],
        num_attention_heads=SHAPE["num_attention_heads"],
        num_query_groups=SHAPE["num_key_value_heads"],
        kv_channels=SHAPE["head_dim"],
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        hetereogenous_dist_checkpoint=not stacked,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=40,  # padded
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        pg_collection=collection,
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    folder.mkdir()
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": not stacked})
    dist_checkpointing.save(dict(state), str(folder))
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("stacked", [True, False])
def test_a_checkpoint_of_megatron(stacked: bool, tmp_path: Path) -> None:
    """Layers in one tensor with a leading axis, as Megatron-LM writes equal layers, and by themselves."""
    foreign(tmp_path / "hf", "qwen2", tie_word_embeddings=False)

    def write_and_compare(ranks: RankEnv) -> None:
        want = megatron(tmp_path / "dcp", stacked=stacked)
        names = set(pickle.loads((tmp_path / "dcp" / ".metadata").read_bytes()).state_dict_metadata)
        assert ("decoder.layers.mlp.linear_fc2.weight" in names) == stacked
        for name in ("config.json", "tokenizer.json"):
            shutil.copy(tmp_path / "hf" / name, tmp_path / "dcp" / name)
        done = import_(tmp_path / "dcp", tmp_path / "run", image_codes=11, seq_length=16)
        assert done["model"] == "dense from qwen2, saved by Megatron-LM"
        got = open_tensors(tmp_path / "run")
        assert set(got.names()) == set(want)
        for name, value in want.items():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                assert torch.equal(got.read(name)[5:37], value[:32]), name
            else:
                assert torch.equal(got.read(name), value), name

    run_ranks(write_and_compare, world_size=1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        *((number, f"no whole number above 0 for {next(iter(number))}") for number in NO_NUMBERS),
        ({"num_hidden_layers": 1}, "holds 2 layers, config.json says 1"),
        ({"num_hidden_layers": 3}, "layers.2"),
        ({"num_attention_heads": 8}, "does not fit"),
        ({"intermediate_size": 40}, "does not fit"),
        ({"tie_word_embeddings": True}, "lm_head.weight is"),
    ],
)
def test_another_models_configuration_is_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = foreign(tmp_path / "hf", "llama", tie_word_embeddings=False)
    dcp.save(torchtitan(model.state_dict(), kind="llama"), checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    shutil.copy(tmp_path / "hf" / "tokenizer.json", tmp_path / "dcp")
    content = json.loads((tmp_path / "hf" / "config.json").read_text()) | settings
    (tmp_path / "dcp" / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        import_(tmp_path / "dcp", tmp_path / "run")
    assert said in str(caught.value) and not (tmp_path / "run").exists()


ATTENTION, FED = "decoder.layers.self_attention.", "decoder.layers.mlp."
WIDTHS = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "intermediate_size")
EXTRA = {
    "torchtitan": {
        "llama": [
            "layers.0.attention.wq.bias",
            "layers.1.attention.wo.bias",
            "layers.0.attention.q_norm.weight",
            "layers.0.attention.sinks",
            "layers.0.feed_forward.w1.bias",
            "layers.0.moe.experts.w1",
            "layers.0.attention_norm.bias",
            "layers.0.self_attn.q_proj.weight",
            "norm.bias",
            "output.bias",
            "tok_embeddings.scale",
            "vision_encoder.conv.weight",
        ],
        "qwen3": ["layers.0.attention.wk.bias", "layers.1.moe.router.gate.weight"],
    },
    "Megatron-LM": {
        "qwen2": [
            ATTENTION + "linear_proj.bias",
            ATTENTION + "q_layernorm.weight",
            ATTENTION + "linear_qkv.layer_norm_bias",
            FED + "linear_fc1.bias",
            FED + "router.weight",
            "decoder.layers.input_layernorm.bias",
            "decoder.layers.0.mlp.linear_fc2.weight",
            "decoder.final_layernorm.bias",
            "embedding.position_embeddings.weight",
            "output_layer.bias",
            "mtp.layers.0.eh_proj.weight",
        ],
        "llama": [ATTENTION + "linear_qkv.bias", ATTENTION + "k_layernorm.weight"],
        "qwen3": [ATTENTION + "linear_qkv.bias"],
    },
}
BESIDE = {
    "optimizer.state.layers.0.attention.wq.bias.exp_avg": torch.ones(2),
    "chained_0.optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.bias": torch.ones(2),
    "optimizer.distributed.dp_group_idx_0.param": torch.ones(2),
    "lr_scheduler.base": torch.ones(1),
    "train_state": torch.ones(1),
    "dataloader.dp_rank_0": torch.ones(1),
    "rng_state": torch.ones(1),
}


def in_stacks(kind: str) -> dict[str, Tensor]:
    """The tensors that Megatron-LM's models of a kind have: layers in one tensor; values do not matter."""
    heads, groups, width, hidden, inner = (SHAPE[name] for name in WIDTHS)
    fused, layers = (heads + 2 * groups) * width, SHAPE["num_hidden_layers"]
    shapes = {
        "embedding.word_embeddings.weight": (40, hidden),
        ATTENTION + "linear_qkv.weight": (layers, fused, hidden),
        ATTENTION + "linear_proj.weight": (layers, hidden, heads * width),
        FED + "linear_fc1.weight": (layers, 2 * inner, hidden),
        FED + "linear_fc2.weight": (layers, hidden, inner),
        "decoder.layers.input_layernorm.weight": (layers, hidden),
        "decoder.layers.pre_mlp_layernorm.weight": (layers, hidden),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (40, hidden),
    }
    if kind == "qwen2":
        shapes[ATTENTION + "linear_qkv.bias"] = (layers, fused)
    if kind == "qwen3":
        shapes |= {f"{ATTENTION}{one}_layernorm.weight": (layers, width) for one in "qk"}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(("program", "kind"), [(program, kind) for program in EXTRA for kind in EXTRA[program]])
def test_no_weight_is_dropped(program: str, kind: str, prefix: str, tmp_path: Path) -> None:
    """A tensor that the model has no place for is refused by name; what training keeps beside the model is not."""
    model = foreign(tmp_path / "hf", kind, tie_word_embeddings=False)
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    state = torchtitan(model.state_dict(), kind=kind) if program == "torchtitan" else in_stacks(kind)
    known = {prefix + name: value for name, value in state.items()} | BESIDE
    dcp.save(known, checkpoint_id=str(tmp_path / "known"), no_dist=True)
    files = DcpFiles(tmp_path / "known", content)
    assert files.program == program and files.names() == set(model.state_dict())
    for number, name in enumerate(EXTRA[program][kind]):
        folder = tmp_path / f"extra_{number}"
        dcp.save(known | {prefix + name: torch.ones(2, 4)}, checkpoint_id=str(folder), no_dist=True)
        with pytest.raises(CheckpointError) as caught:
            DcpFiles(folder, content)
        assert caught.value.cause.endswith(f"does not have: {prefix + name}") and "config.json" in caught.value.remedy


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_layers_in_one_tensor_are_read_by_themselves(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To verify and to write, each stored element is read once: not for every layer, nor for every part of a fusion."""
    foreign(tmp_path / "hf", kind, tie_word_embeddings=False)
    state = in_stacks(kind)
    dcp.save(state, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tmp_path / "hf" / name, tmp_path / "dcp" / name)
    read: Counter[str] = Counter()
    plain = FileSystemReader.read_data

    def counted(reader: FileSystemReader, plan: LoadPlan, planner: LoadPlanner) -> Any:
        for item in plan.items:
            read[item.storage_index.fqn] += item.lengths.numel()
        return plain(reader, plan, planner)

    monkeypatch.setattr(FileSystemReader, "read_data", counted)
    import_(tmp_path / "dcp", tmp_path / "run")
    assert read == {name: 2 * value.numel() for name, value in state.items()}
    run = open_tensors(tmp_path / "run")
    for name, value in state.items():
        for layer in range(len(value)) if name.startswith("decoder.layers.") else ():
            here = name.replace("layers.", f"layers.{layer}.")
            if here in run.names():  # norms may have other names
                assert torch.equal(run.read(here), value[layer]), here


def test_tensors_of_another_program_are_refused(tmp_path: Path) -> None:
    foreign(tmp_path / "hf", "llama")
    dcp.save({"net.0.weight": torch.ones(3)}, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tmp_path / "hf" / name, tmp_path / "dcp" / name)
    with pytest.raises(CheckpointError, match="neither torchtitan nor Megatron-LM"):
        import_(tmp_path / "dcp", tmp_path / "run")


def test_paths_in_an_index_are_dropped() -> None:
    """torch's writer notes its folder; a strict reader makes no path of it, and calls nothing with anything else."""
    assert strict_pickle.load(pickle.dumps(Path("somewhere/else"))) is None
    evil = b"cpathlib\nPosixPath\n(ccollections\nOrderedDict\ntR."
    with pytest.raises(pickle.UnpicklingError, match="a call of"):
        strict_pickle.load(evil)
