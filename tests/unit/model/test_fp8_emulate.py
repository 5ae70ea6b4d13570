"""Emulated FP8 in a product, a linear, experts and a model: which format where, which layers, which sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from mmscale.config import Config
from mmscale.config.precision.fp8 import high_precision
from mmscale.errors import ConfigError
from mmscale.model import fp8_formats as formats
from mmscale.model.fp8_emulate import Fp8Product, Fp8Rows
from mmscale.model.fp8_formats import E4M3, E5M2, Blocks
from mmscale.model.fp8_recipe import GRADIENT, ROWS, WEIGHT, Recipe
from mmscale.model.untied import Rows, product
from mmscale.tables.routings import Routing
from mmscale.train.steps.fp8_scales import DelayedScaling, scales_of
from tests.unit.model.comparison import relative, run_model
from tests.unit.model.reference import Batch, batch_of, moma_experts, random_documents, tiny

SIZES = {"hidden_size": 32, "ffn_hidden_size": 32, "num_attention_heads": 2, "seq_length": 32}
DEPTH = {"every": 2, "capacity": 0.5, "multiple": 2}
UNGATED = moma_experts(counts={"text": 2, "image": 1}, ungated=["image"])


def config(kind: str = "moma", *, precision: dict[str, Any] | None = None, **model: Any) -> Config:
    """A model whose sizes FP8 takes; tensorwise unless told otherwise."""
    made = tiny(kind, **{**SIZES, **model})
    settings = {"dtype": "fp32", "fp8": "tensorwise", "fp8_emulate": True} | (precision or {})
    return made.model_copy(update={"precision": made.precision.model_validate(settings)})


def batch(seed: int = 1) -> Batch:
    lengths = ([20, 12], [31])
    return batch_of([random_documents(rows, seed=seed + index) for index, rows in enumerate(lengths)], length=32)


def rounded(tensor: Tensor, dtype: torch.dtype, blocks: Blocks) -> Tensor:
    """What is left of a matrix [M, K] in FP8, fp64."""
    if blocks is Blocks.TENSOR:
        quantized = formats.quantize_tensor(tensor, formats.scale_of(formats.amax_of(tensor), dtype), dtype)
    else:
        quantized = formats.quantize_blocks(tensor, dtype, blocks)
    return quantized.dequantized().double()


def operands(seed: int = 0) -> list[Tensor]:
    """Rows [2, 64, 160], weight [2, 160, 32] and gradient [2, 64, 32], each with an outlier."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(2, *shape, generator=generator) for shape in ((64, 160), (160, 32), (64, 32))]
    for tensor in made:
        tensor[0, 3, 5] = 30.0
    return made


# Blocks of a weight [K, N] in the products that sum over K and over N; along rows and columns of the other operands.
ONE = (Blocks.TENSOR,) * 4
BLOCKS = {
    "tensorwise": ONE,
    "blockwise": (Blocks.TILE, Blocks.TILE, Blocks.ROW, Blocks.COLUMN),
    "mxfp8": (Blocks.MX_COLUMN, Blocks.MX_ROW, Blocks.MX_ROW, Blocks.MX_COLUMN),
}


@pytest.mark.parametrize("scaling", list(BLOCKS))
@pytest.mark.parametrize("gradient", [E5M2, E4M3])
def test_the_three_products_of_a_linear(
    process_groups: ProcessGroupCollection, scaling: Any, gradient: torch.dtype
) -> None:
    """Forward e4m3 x e4m3; backward the gradient in its own format; blocks along what is summed over."""
    rows, weight, grad = operands()
    rows.requires_grad_()
    weight.requires_grad_()
    product = Fp8Product(Recipe(scaling, gradient=gradient), process_groups, count=2)
    output = product(rows, weight)
    output.backward(grad)
    down, along, row, column = BLOCKS[scaling]
    for index in range(2):
        x, w, g = (tensor[index].detach() for tensor in (rows, weight, grad))
        wanted = (
            (output, rounded(x, E4M3, row) @ rounded(w, E4M3, down)),
            (rows.grad, rounded(g, gradient, row) @ rounded(w, E4M3, along).t()),
            (weight.grad, rounded(x, E4M3, column).t() @ rounded(g, gradient, column)),
        )
        for found, value in wanted:
            assert found is not None and relative(found[index], value) < 2e-6


def test_each_tensor_is_of_its_own_format(process_groups: ProcessGroupCollection) -> None:
    product = Fp8Product(Recipe("tensorwise"), process_groups, count=2)
    rows, weight, grad = operands()
    for tensor, role, dtype in ((rows, ROWS, E4M3), (weight, WEIGHT, E4M3), (grad, GRADIENT, E5M2)):
        assert product.quantize(tensor, role, Blocks.TENSOR, seen=False).codes.dtype == dtype


def test_experts_have_scales_of_their_own(process_groups: ProcessGroupCollection) -> None:
    """One expert's outlier leaves the other's rounding alone."""
    rows, weight, _ = operands()
    product = Fp8Product(Recipe("tensorwise"), process_groups, count=2)
    before = product(rows, weight)
    rows[0, 0, 0] = 1e4
    after = product(rows, weight)
    assert torch.equal(before[1], after[1]) and not torch.equal(before[0, 1:], after[0, 1:])


def test_delayed_products_use_what_earlier_steps_showed(process_groups: ProcessGroupCollection) -> None:
    """First step: scales of one. Later: from the history, for each tensor and expert, in training only."""
    rows, weight, grad = operands()
    rows.requires_grad_()
    product = Fp8Product(Recipe("delayed", history=3), process_groups, count=2)
    scales = product.scales
    assert scales is not None and torch.equal(scales.state[0], torch.ones(2, 5))
    observer = DelayedScaling([scales], process_groups)
    observer.begin([])
    product(rows, weight).backward(grad)
    amax = torch.stack([tensor.detach().abs().amax(dim=(1, 2)) for tensor in (rows, weight, grad)], dim=1)
    assert torch.equal(scales.seen[:, [ROWS, WEIGHT, GRADIENT]], amax)
    observer.finish(lr=0.0)
    wanted = torch.tensor([448.0, 448.0, 57344.0]) / amax
    assert torch.equal(scales.state[0][:, [ROWS, WEIGHT, GRADIENT]], wanted)
    assert torch.equal(scales.state[0][:, [2, 4]], torch.ones(2, 2)), "no product has these tensors in FP8"
    found = product.quantize(rows, ROWS, Blocks.TENSOR, seen=False)
    assert torch.equal(found.scale_inv.view(-1), wanted[:, 0].reciprocal())
    product.eval()
    before = scales.state.clone()
    product(10 * rows, weight)
    assert torch.equal(scales.state, before), "an evaluation leaves no trace"
    product.train()
    product(10 * rows, weight)
    assert not torch.equal(scales.state, before)
    observer.begin([])  # as after a step that was not taken
    assert torch.equal(scales.state, before)


def test_a_gradient_that_is_not_a_number_stays_so_and_spoils_no_scale(process_groups: ProcessGroupCollection) -> None:
    rows, weight, grad = operands()
    rows.requires_grad_()
    product = Fp8Product(Recipe("delayed", history=2), process_groups, count=2)
    grad[0, 0, 0] = float("nan")
    product(rows, weight).backward(grad)
    assert rows.grad is not None and rows.grad.isnan().any()
    assert product.scales is not None
    product.scales.update()
    assert torch.isfinite(product.scales.state[0]).all()


def test_results_come_in_the_format_of_the_operands(process_groups: ProcessGroupCollection) -> None:
    rows, weight, grad = (tensor.bfloat16().requires_grad_() for tensor in operands())
    output = Fp8Product(Recipe("blockwise"), process_groups, count=2)(rows, weight)
    output.backward(grad.detach())
    assert output.dtype == torch.bfloat16
    assert rows.grad is not None and weight.grad is not None
    assert (rows.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "cause"),
    [(8, 32, 32, "8 rows"), (32, 24, 32, "24 inputs"), (32, 32, 40, "40 outputs")],
)
@pytest.mark.parametrize(("scaling", "multiple"), [("tensorwise", 16), ("mxfp8", 32)])
def test_sizes_that_tensor_cores_do_not_take(
    process_groups: ProcessGroupCollection,
    rows: int,
    inner: int,
    columns: int,
    cause: str,
    scaling: Any,
    multiple: int,
) -> None:
    product = Fp8Product(Recipe(scaling), process_groups)
    with pytest.raises(ConfigError, match=f"{cause} are not a multiple of {multiple}") as raised:
        product(torch.ones(1, rows, inner), torch.ones(1, inner, columns))
    assert raised.value.remedy


def products_of(model: GPTModel) -> list[str]:
    return sorted(name for name, module in model.named_modules() if isinstance(module, Fp8Product))


ATTENTION = ("self_attention.linear_qkv.fp8", "self_attention.linear_proj.fp8")
EXPERTS = tuple(f"mlp.experts.{group}.compute.{part}" for group in ("text", "image") for part in ("first", "second"))


def test_attention_and_experts_are_fp8_and_nothing_else(build: Callable[..., GPTModel]) -> None:
    """Routers, norms, embedding and output layer stay in high precision; skipped layers whole."""
    model = build(config("moma", num_layers=4, precision={"fp8_skip_first": 1, "fp8_skip_last": 2}))
    assert products_of(model) == sorted(f"decoder.layers.1.{name}" for name in (*ATTENTION, *EXPERTS))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    dense = ("mlp.linear_fc1.fp8", "mlp.linear_fc2.fp8")
    model = build(config("dense"))
    assert products_of(model) == sorted(f"decoder.layers.{n}.{name}" for n in range(2) for name in (*ATTENTION, *dense))
    shared = build(config("moma", experts=tiny().model.experts.model_copy(update={"shared": 1})))
    assert "decoder.layers.0.mlp.shared.compute.first" in products_of(shared)
    assert products_of(build(config("moma", precision={"fp8": "off", "fp8_emulate": False}))) == []


def test_untied_linears_have_a_product_for_each_modality(build: Callable[..., GPTModel]) -> None:
    """And an ungated group's layer is one of the experts."""
    model = build(config("dense", untie=["attention", "ffn", "norms"], precision={"fp8": "delayed"}))
    linears = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    names = [f"decoder.layers.{n}.{name}.{own}" for n in range(2) for name in linears for own in ("text", "image")]
    assert sorted(scales.name for scales in scales_of([model])) == sorted(names)
    hybrid = build(config("moma", untie=["attention"], experts=UNGATED, precision={"fp8": "delayed"}))
    found = {scales.name: scales.place for scales in scales_of([hybrid])}
    assert found["decoder.layers.0.mlp.ungated.image.w1"] is None, "a dense parameter: every rank has it"
    assert found["decoder.layers.0.mlp.experts.text.w1"] is not None and len(found) == 2 * (4 + 2 + 2)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("scaling", list(BLOCKS))
def test_a_modality_is_rounded_by_its_own_rows(
    process_groups: ProcessGroupCollection, scaling: Any, on_device: bool
) -> None:
    """Any number of rows, none included, forward and backward; another modality's outlier changes nothing."""
    counts = [21, 0, 43]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    ends = torch.tensor(counts).cumsum(0).int()
    rows = Rows(order, order.argsort(), ends, None if on_device else counts)
    generator = torch.Generator().manual_seed(2)
    tokens, grad = torch.randn(64, 160, generator=generator), torch.randn(64, 32, generator=generator)
    tokens[order[0]] = 300.0
    tokens.requires_grad_()
    weights = [torch.randn(32, 160, generator=generator, requires_grad=True) for _ in counts]
    multiply = [Fp8Rows(Recipe(scaling), process_groups) for _ in counts]
    out = product(tokens, weights, rows, multiply=multiply)
    out.backward(grad)
    assert tokens.grad is not None and weights[1].grad is not None and not weights[1].grad.any()
    down, along, row, column = BLOCKS[scaling]
    for part, weight in zip(order.split(counts), weights, strict=True):
        if not len(part):
            continue
        x, w, g = tokens.detach()[part], weight.detach(), grad[part]
        for found, wanted in (
            (out[part], rounded(x, E4M3, row) @ rounded(w.t(), E4M3, down)),
            (tokens.grad[part], rounded(g, E5M2, row) @ rounded(w.t(), E4M3, along).t()),
            (weight.grad, rounded(g, E5M2, column).t() @ rounded(x, E4M3, column)),
        ):
            assert found is not None and relative(found, wanted) < 2e-6


def test_a_batch_of_text_leaves_the_scales_of_images(build: Callable[..., GPTModel]) -> None:
    """Weights are rounded with or without tokens; rows and gradients have an amax of zero, which changes no scale."""
    model = build(config("dense", untie=["attention", "ffn"], precision={"fp8": "delayed", "fp8_amax_history": 2}))
    scales = scales_of([model.train()])
    text = batch_of([random_documents((32,), seed=1, image=0.0)], length=32)
    run_model(model, text).square().sum().backward()
    for one in scales:
        roles = [ROWS, GRADIENT]
        assert bool(one.seen[:, roles].any()) is one.name.endswith(".text") and one.seen[:, WEIGHT].all(), one.name
        one.update()
        moved = one.state[0, :, roles] != 1.0
        assert bool(moved.all() if one.name.endswith(".text") else not moved.any()), one.name
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (not name.endswith(".image") or not parameter.grad.any()), name


RECIPES = [
    {"fp8": "tensorwise"},
    {"fp8": "blockwise"},
    {"fp8": "blockwise", "fp8_format": "e4m3"},
    {"fp8": "mxfp8"},
    {"fp8": "mxfp8", "fp8_format": "e4m3"},
]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "moma": ("moma", {}),
    "mot": ("dense", {"untie": ["attention", "ffn", "norms"]}),
    "mot_4t1i": ("moma", {"untie": ["attention", "norms"], "experts": UNGATED}),
    "moma_depth": ("moma", {"depth": DEPTH}),
    "token_choice": ("moma", {"experts": moma_experts(token_choice={"top_k": 1})}),
}


@pytest.mark.parametrize("precision", RECIPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_near_its_own_in_fp32(build: Callable[..., GPTModel], name: str, precision: dict[str, Any]) -> None:
    """Four roundings a layer of 3 bits each: percents of the logits, and a gradient that points the same way."""
    loss, cosine = _beside_fp32(build, name, precision)
    assert loss < 0.05 and 0.9 < cosine < 1.0


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_four_bits_learns_in_the_same_direction(build: Callable[..., GPTModel], name: str) -> None:
    """Roundings are four times as coarse: seen 10 % of the loss, and cosines of 0.58 (token choice) to 0.74."""
    loss, cosine = _beside_fp32(build, name, {"fp8": "nvfp4"})
    assert loss < 0.15 and 0.5 < cosine < 0.9


def _beside_fp32(build: Callable[..., GPTModel], name: str, precision: dict[str, Any]) -> tuple[float, float]:
    """The relative difference of the loss, which is not 0, and the cosine between the gradients."""
    kind, more = MODELS[name]
    exact = build(high_precision(config(kind, precision=precision, **more)))  # the same slots
    found = build(config(kind, precision=precision, **more))
    found.load_state_dict(exact.state_dict())  # the same names
    losses, gradients = [], []
    for model in (exact, found):
        logits = run_model(model, batch())
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch().ids.flatten())
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[0] != losses[1]
    one, other = gradients
    return abs(losses[1] / losses[0] - 1), float(torch.nn.functional.cosine_similarity(one, other, dim=0))


@pytest.mark.parametrize("precision", [{"fp8": "delayed"}, *RECIPES], ids=str)
@pytest.mark.parametrize("routing", [Routing.CAUSAL, Routing.THRESHOLD])
def test_causal_choices_fill_their_products(
    build: Callable[..., GPTModel], routing: Routing, precision: dict[str, Any]
) -> None:
    """Any number of tokens may be chosen one by one; products are filled up to what FP8 takes."""
    settings = config(
        "moma",
        experts=tiny().model.experts.model_copy(update={"threshold_decay": 0.9}),
        auxiliary={"mode": "joint"},
        depth=DEPTH,
        precision=precision,
    )
    model = build(settings).eval()
    assert torch.isfinite(run_model(model, batch(), routing=routing)).all()


@pytest.mark.parametrize("name", ["moma", "mot", "mot_4t1i"])
def test_recomputed_layers_have_the_same_gradients(build: Callable[..., GPTModel], name: str) -> None:
    def grads(recompute: str) -> Sequence[Tensor]:
        kind, more = MODELS[name]
        made = config(kind, **more)
        parallel = made.parallel.model_copy(update={"recompute": recompute})
        model = build(made.model_copy(update={"parallel": parallel})).train()
        run_model(model, batch()).square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for one, other in zip(grads("none"), grads("full"), strict=True):
        assert torch.equal(one, other)


def test_scales_are_no_part_of_the_weights(build: Callable[..., GPTModel]) -> None:
    """They stay fp32 when the model becomes bf16, and its state dict is that of any other precision."""
    plain = build(config("moma", precision={"fp8": "off", "fp8_emulate": False}))
    model = build(config("moma", precision={"fp8": "delayed", "fp8_amax_history": 4}))
    assert model.state_dict().keys() == plain.state_dict().keys()
    found = scales_of([model.bfloat16()])
    assert {scales.state.dtype for scales in found} == {torch.float32}
    names = [scales.name for scales in found]
    assert len(names) == len(set(names)) == 12
    assert "decoder.layers.1.mlp.experts.image.w2" in names and "decoder.layers.0.self_attention.linear_qkv" in names
