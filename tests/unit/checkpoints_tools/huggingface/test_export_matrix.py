"""What users do with an export, for every kind of model and routing: generate, fine-tune, offload, save, resize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from checkpoints_tools.huggingface.shipped.configuration_moma import ROUTINGS
from checkpoints_tools.huggingface.shipped.modeling_moma import MomaForCausalLM
from mmscale.data.modalities.image_tokens import LevelsTokenizer
from tests.support import Ranks, run_ranks
from tests.unit.checkpoints_tools.huggingface.test_modeling_moma import MODELS, exported, generated
from tests.unit.checkpoints_tools.huggingface.test_processing_moma import processor_with
from tests.unit.model.reference import random_documents

KINDS = ("dense, post norm", "moe", "moma", "depth", "dense depth", "three modalities", "untied", "ungated")
ROUTED_ALIKE = ("dense, post norm", "untied")  # there is nothing to route
CELLS = [(kind, routing) for kind in KINDS for routing in ROUTINGS if kind not in ROUTED_ALIKE or routing == "causal"]
# At every change one kind meets every routing, and every kind meets one; `exhaustive` has the full product.
ROWS = [
    pytest.param(cell, marks=[] if cell[0] == "moma" or cell[1] == "causal" else pytest.mark.exhaustive)
    for cell in CELLS
]
IDS = torch.tensor(random_documents((12, 12), seed=5))


@pytest.fixture(params=ROWS, ids=[f"{kind}-{routing}" for kind, routing in CELLS])
def model(request: Any) -> MomaForCausalLM:
    kind, routing = request.param
    return exported(MODELS[kind], routing=routing)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **arguments: Any) -> Tensor:
    found: Tensor = model(ids, **arguments).logits
    return found


def test_generation(model: MomaForCausalLM) -> None:
    """Cached, uncached, in a left-padded batch; and with beams."""
    rows = [IDS[0, :9].tolist(), IDS[1, :4].tolist()]
    padded = torch.tensor([rows[0], [0] * 5 + rows[1]])
    mask = torch.tensor([[1] * 9, [0] * 5 + [1] * 4])
    uncached = [generated(model, torch.tensor([row]), use_cache=False)[0] for row in rows]
    assert [generated(model, torch.tensor([row]))[0] for row in rows] == uncached
    assert generated(model, padded, attention_mask=mask) == uncached
    beams = {"num_beams": 2, "max_new_tokens": 4}
    assert generated(model, IDS[:1, :6], **beams) == generated(model, IDS[:1, :6], use_cache=False, **beams)


def gradients(model: MomaForCausalLM) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_fine_tuning(model: MomaForCausalLM) -> None:
    """Every parameter that is not frozen has a gradient, as DDP demands; it is the same with checkpointed layers."""
    model.train()
    plain = gradients(model)
    assert not [name for name, gradient in plain.items() if gradient is None]
    decide = {name for name in model.state_dict() if "auxiliary" in name or "threshold" in name}
    assert plain.keys() == {name for name, _ in model.named_parameters()} == model.state_dict().keys() - decide
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        again = gradients(model)
        for name, gradient in plain.items():
            assert torch.allclose(gradient, again[name], atol=1e-6), name
        model.gradient_checkpointing_disable()


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_offload(where: str, model: MomaForCausalLM, tmp_path: Path) -> None:
    """accelerate keeps parameters elsewhere, and brings them for the time of a module's forward."""
    want, new = logits(model), generated(model, IDS[:1, :6])
    if where == "memory":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(logits(model), want) and generated(model, IDS[:1, :6]) == new


def test_saved_and_loaded(model: MomaForCausalLM, tmp_path: Path) -> None:
    model.config.mmscale = {"format": 1}
    want = logits(model)
    model.save_pretrained(tmp_path)
    again, report = MomaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and torch.equal(logits(again), want)
    assert again.config.mmscale == {"format": 1}
    assert gradients(again.train()).keys() == gradients(model.train()).keys()


def test_a_device_map_to_disk(tmp_path: Path) -> None:
    model = exported(MODELS["depth"])
    want = logits(model)
    model.save_pretrained(tmp_path / "hf")
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    again = MomaForCausalLM.from_pretrained(
        tmp_path / "hf", device_map=places | {"lm_head": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert torch.allclose(logits(again), want, atol=1e-6)


def _ddp(ranks: Ranks) -> None:
    torch.distributed.init_process_group("gloo", init_method=ranks.init_method, rank=ranks.rank, world_size=2)
    model = DistributedDataParallel(exported(MODELS["depth"]).train())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(3):
        own = IDS[ranks.rank : ranks.rank + 1].roll(step, dims=1)
        model(input_ids=own, labels=own).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    total = sum(float(parameter.detach().double().sum()) for parameter in model.parameters())
    found = [torch.zeros(1, dtype=torch.float64) for _ in range(2)]
    torch.distributed.all_gather(found, torch.tensor([total], dtype=torch.float64))
    assert torch.equal(found[0], found[1])


def test_fine_tuning_on_two_ranks() -> None:
    run_ranks(_ddp, world_size=2)


# --- the vocabulary ---------------------------------------------------------------------------------------------------


def test_another_padding_token_changes_nothing(model: MomaForCausalLM) -> None:
    """Users pad with `</s>`; the id that training padded with stays the one of no modality."""
    ids = IDS.clone()
    ids[:, 5] = 2
    want = logits(model, ids)
    model.config.pad_token_id = 2
    assert torch.equal(logits(model, ids), want)
    left = torch.cat([torch.full((2, 3), 2), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    got = logits(model, left, attention_mask=mask, position_ids=positions)[:, 3:]
    assert torch.allclose(got, want, atol=2e-5 * float(want.abs().max()))


def test_added_ids_are_text(model: MomaForCausalLM) -> None:
    """They stand behind the image tokens."""
    size, image, want = model.config.vocab_size, model.config.modalities[1][1], logits(model)
    model.resize_token_embeddings(size + 3)
    # A product with more columns is rounded differently on some processors.
    torch.testing.assert_close(logits(model)[..., :size], want, rtol=1e-5, atol=1e-5)
    assert model.model.modality_of(torch.tensor([0, 1, image - 1, image, size, size + 2])).tolist() == [
        -1,
        0,
        0,
        1,
        0,
        0,
    ]
    assert torch.isfinite(model(torch.tensor([[1, size, size + 2]])).logits).all()


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return processor_with(LevelsTokenizer(8, 1, 17), tmp_path_factory.mktemp("export"))


def test_every_id_has_a_name(processor: Any) -> None:
    """`resize_token_embeddings(len(tokenizer))` then changes nothing; with holes it cut the image tokens off."""
    tokenizer = processor.tokenizer
    rows = 300 + 17 + 7
    assert len(tokenizer) == rows
    names = tokenizer.convert_ids_to_tokens(range(rows))
    assert len(set(names)) == rows and names[300] == "<image_0>" and names[-1] == f"<unused_{rows - 1}>"
    assert tokenizer.add_tokens(["<tool>"]) == 1 and tokenizer.convert_tokens_to_ids("<tool>") == rows
