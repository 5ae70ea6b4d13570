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
    assert plan["layers.*.mlp.experts.image.gate_up_proj"] == "packed_rowwise"
    assert "_plan" not in model.config.to_json_string()
    normalised = exported(MODELS["normalised experts, shared"]).config
    assert not any("experts" in name or "shared" in name for name in normalised.base_model_tp_plan)
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


@pytest.mark.parametrize("name", ["depth", "dense depth", "depth, post norm"])
def test_depth_layers_in_a_cache_of_one_width(name: str) -> None:
    """vLLM has one width for keys and values of all layers, `head_dim`, and joins the heads of its output."""
    config = MODELS[name]
    plain = exported(config)
    width = plain.config.head_dim
    assert width % 32 == 0 and width > plain.config.head_width == config.model.head_dim
    caches: dict[int, tuple[Any, Any]] = {}

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
        assert query.shape[-1] == key.shape[-1] == value.shape[-1] == width
        if module.layer_idx in caches:
            before = caches[module.layer_idx]
            key, value = torch.cat((before[0], key), dim=2), torch.cat((before[1], value), dim=2)
        caches[module.layer_idx] = (key, value)
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        out, _ = sdpa_attention_forward(module, query, key, value, causal[None, None], scaling=scaling, is_causal=False)
        return out.reshape(out.shape[1], -1), None

    AttentionInterface.register("vllm", attend)  # the name under which vLLM registers its own
    served = exported(config, attn_implementation="vllm")
    with torch.no_grad():
        want = plain.model(IDS)[0]
        got = []
        for first, end in ((0, 5), (5, 6), (6, 8)):
            positions = torch.arange(first, end)[None]
            got.append(served.model(IDS[:, first:end], position_ids=positions, use_cache=False)[0])
    assert torch.allclose(torch.cat(got, dim=1), want, atol=2e-5 * float(want.abs().max()))


def stages(config: Any, *, count: int = 2) -> list[Any]:
    """Base models that compute some of the layers, as vLLM takes a model apart; the other layers return their input."""

    class Missing(torch.nn.Module):
        def forward(self, *inputs: Any, **named: Any) -> Any:
            return inputs[0] if inputs else next(iter(named.values()))

    made = []
    for stage in range(count):
        model = exported(config).model
        layers = len(model.layers)
        for layer in range(layers):
            if layer * count // layers != stage:
                model.layers[layer] = Missing()
        if stage:
            model.embed_tokens = Missing()
        if stage < count - 1:
            model.norm = Missing()
        made.append(model)
    return made


@pytest.mark.parametrize("name", ["moe", "dense, post norm", "softmax"])
def test_later_stages_of_a_pipeline_get_no_ids(name: str) -> None:
    """As vLLM calls them. It refuses pipelines for models without a plan, whose layers depend on the modality."""
    config = MODELS[name]
    whole = exported(config)
    assert whole.supports_pp_plan and whole.model.supports_pp_plan
    assert [*whole.model.pp_plan] == ["embed_tokens", "layers", "norm"]
    common: dict[str, Any] = {"use_cache": False, "position_ids": torch.arange(8)[None], "return_dict": False}
    with torch.no_grad():
        first, last = stages(config)
        (hidden,) = first(input_ids=IDS, inputs_embeds=None, **common)
        (got,) = last(input_ids=None, inputs_embeds=hidden, **common)
        assert torch.equal(got, whole.model(IDS)[0])


@pytest.mark.parametrize("name", ["moma", "depth", "untied", "three modalities"])
def test_embeddings_need_the_modality(name: str) -> None:
    model = exported(MODELS[name])
    assert not model.supports_pp_plan and not model.model.supports_pp_plan
    embeddings = model.model.embed_tokens(IDS)
    for one in (model, model.model):
        with pytest.raises(ValueError, match="needs input_ids or modality beside inputs_embeds"):
            one(inputs_embeds=embeddings)
    with torch.no_grad():
        want = model(IDS).logits
        assert torch.equal(model(inputs_embeds=embeddings, modality=model.model.modality_of(IDS)).logits, want)
        assert torch.equal(model(IDS, inputs_embeds=embeddings).logits, want)
    start = {"inputs_embeds": embeddings[:, :5], "modality": model.model.modality_of(IDS[:, :5])}
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones(1, 5, dtype=torch.long)
    new = model.generate(**start, attention_mask=mask, **settings)
    assert new.tolist() == model.generate(IDS[:, :5], attention_mask=mask, **settings)[:, 5:].tolist()


def test_padding_without_ids() -> None:
    model = exported(MODELS["moe"])
    ids, mask = torch.tensor([[0, 0, *IDS[0].tolist()]]), torch.tensor([[0] * 2 + [1] * 8])
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits[:, 2:]
        got = model(inputs_embeds=model.model.embed_tokens(ids), attention_mask=mask).logits[:, 2:]
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", MODELS)
def test_whole_graphs(name: str) -> None:
    """The model says for which torch.compile(fullgraph=True) works, and for those it does."""
    model = exported(MODELS[name])
    sparse = bool(model.config.expert_groups or model.config.mod_layers)
    assert model._can_compile_fullgraph is not sparse
    if sparse:
        return
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        got = compiled(IDS, use_cache=False).logits
        assert torch.allclose(got, model(IDS, use_cache=False).logits, atol=1e-5)


def test_sharded_experts_are_not_trained() -> None:
    """A rank would get a part of the router's gradient, and nothing would add the parts."""
    model = exported(MODELS["moma"])
    group = model.model.layers[0].mlp.experts["text"]
    group.down_proj = torch.nn.Parameter(group.down_proj[:, ::2].detach())
    with pytest.raises(ValueError, match=r"sharded by tp_plan are for inference.*\n?.*torch.no_grad"):
        model(IDS)


PARALLEL = """
import sys, torch, torch.distributed as dist
from checkpoints_tools.huggingface.shipped.modeling_moma import MomaForCausalLM
ids = torch.tensor([[1, 6, 25, 7, 30, 9, 26, 8]])
model = MomaForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
layer = model.model.layers[0]
shards = [layer.self_attn.q_proj.weight]
if hasattr(layer.mlp, "experts"):
    group = next(iter(layer.mlp.experts.values()))
    shards += [group.gate_up_proj, group.down_proj]
with torch.no_grad():
    logits = model(ids).logits
new = model.generate(ids[:, :5], max_new_tokens=4, do_sample=False, eos_token_id=None)
if dist.get_rank() == 0:
    shapes = [tuple((one.to_local() if hasattr(one, "to_local") else one).shape) for one in shards]
    torch.save({"logits": logits, "new": new, "shapes": shapes}, sys.argv[2])
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "name", ["moma", "depth", "dense, post norm", "post norm, shared", "normalised experts, shared"]
)
def test_tensor_parallel_ranks(name: str, tmp_path: Path) -> None:
    """`tp_plan="auto"` on two ranks of the CPU."""
    model = exported(MODELS[name])
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "parallel.py").write_text(PARALLEL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(tmp_path / "parallel.py"), str(tmp_path / "hf"), str(tmp_path / "out.pt")]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))  # of another transformers
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        assert torch.allclose(found["logits"], model(IDS).logits, atol=1e-4)
    want = model.generate(IDS[:, :5], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert found["new"].tolist() == want.tolist()
    layer = model.model.layers[0]
    rows, columns = layer.self_attn.q_proj.weight.shape
    shapes = [(rows // 2, columns)]
    if model.config.expert_groups:
        group = next(iter(layer.mlp.experts.values()))
        (experts, hidden, both), inner = group.gate_up_proj.shape, group.inner
        parts = 1 if model.config.norm == "post_per_expert" else 2
        shapes += [(experts, hidden, both // parts), (experts, inner // parts, hidden)]
    assert found["shapes"] == shapes
