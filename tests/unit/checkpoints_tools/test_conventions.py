"""What transformers, accelerate and vLLM's transformers backend expect of a model's code."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from checkpoints_tools.huggingface.model_config import model_config
from checkpoints_tools.huggingface.shipped.modeling_moma import MomaAttention
from tests.end_to_end.running import ROOT
from tests.unit.checkpoints_tools.huggingface.test_modeling_moma import MODELS, exported

IDS = torch.tensor([[1, 6, 25, 7, 30, 9, 26, 8]])


def test_what_is_declared() -> None:
    content = model_config(MODELS["moma"], auxiliary_size=5, thresholds=True, routing="causal", tokens_per_image=4)
    assert content["auto_map"]["AutoModel"] == "modeling_moma.MomaModel"  # vLLM loads this one
    model = exported(MODELS["moma"])
    assert model.supports_gradient_checkpointing and model._supports_attention_backend
    assert model._no_split_modules == {"MomaDecoderLayer"} or list(model._no_split_modules) == ["MomaDecoderLayer"]
    plan = model.config.base_model_tp_plan
    assert plan["layers.*.self_attn.q_proj"] == "colwise" and plan["layers.*.self_attn.o_proj"] == "rowwise"


def test_an_attention_function_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's backend does it: its own function for every layer, told the layer by number, and no cache."""
    called: list[tuple[int, Any]] = []

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        called.append((module.layer_idx, kwargs["attention_instances"][module.layer_idx]))
        assert module.is_causal and kwargs["scaling"] == module.scaling
        return sdpa_attention_forward(module, query, key, value, mask, is_causal=True, scaling=kwargs["scaling"])

    AttentionInterface.register("recorded", attend)
    config = MODELS["moma"]
    plain, own = exported(config), exported(config, attn_implementation="recorded")
    instances = {layer: f"layer {layer}" for layer in range(config.model.num_layers)}
    with torch.no_grad():
        got = own.model(
            input_ids=IDS,
            inputs_embeds=None,
            use_cache=False,
            position_ids=torch.arange(8)[None],
            attention_instances=instances,
            return_dict=False,
        )
        assert torch.allclose(got[0], plain.model(IDS)[0], atol=1e-5)
    assert called == list(instances.items())


def test_the_attention_call_can_be_found_in_the_source() -> None:
    """vLLM 0.32 reads the source: one call of what a line took from ALL_ATTENTION_FUNCTIONS, scaled by an attribute."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(MomaAttention.forward)))
    names = {
        ast.unparse(node.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and "ALL_ATTENTION_FUNCTIONS." in ast.unparse(node.value or ast.Pass())
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]
    (call,) = calls
    (scaling,) = [word.value for word in call.keywords if word.arg == "scaling"]
    assert ast.unparse(scaling) == "self.scaling"
    assert isinstance(exported(MODELS["moma"]).model.layers[0].self_attn.scaling, float)


def test_depth_layers_are_refused_in_vllm() -> None:
    AttentionInterface.register("vllm", sdpa_attention_forward)  # the name under which vLLM registers its own
    model = exported(MODELS["depth"], attn_implementation="vllm")
    with pytest.raises(ValueError, match="wider keys of Mixture-of-Depths"):
        model(IDS, use_cache=False)


PARALLEL = """
import sys, torch, torch.distributed as dist
from checkpoints_tools.huggingface.shipped.modeling_moma import MomaForCausalLM
ids = torch.tensor([[1, 6, 25, 7, 30, 9, 26, 8]])
model = MomaForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
heads = model.model.layers[0].self_attn.q_proj.weight
with torch.no_grad():
    logits = model(ids).logits
new = model.generate(ids[:, :5], max_new_tokens=4, do_sample=False, eos_token_id=None)
if dist.get_rank() == 0:
    local = heads.to_local() if hasattr(heads, "to_local") else heads
    torch.save({"logits": logits, "new": new, "rows": local.shape[0]}, sys.argv[2])
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["moma", "depth", "dense, post norm"])
def test_tensor_parallel_ranks(name: str, tmp_path: Path) -> None:
    """`tp_plan="auto"` on two ranks of the CPU."""
    model = exported(MODELS[name])
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "parallel.py").write_text(PARALLEL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(tmp_path / "parallel.py"), str(tmp_path / "hf"), str(tmp_path / "out.pt")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        assert torch.allclose(found["logits"], model(IDS).logits, atol=1e-4)
    want = model.generate(IDS[:, :5], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert found["new"].tolist() == want.tolist()
    assert found["rows"] * 2 == model.model.layers[0].self_attn.q_proj.weight.shape[0]
