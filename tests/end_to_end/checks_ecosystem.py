"""What other libraries do with real exports: peft, transformers' Trainer, torchao, accelerate.

test_ecosystem.py runs this file with pytest where the libraries stand first on the path. Folders come from the
environment: EXPORTS has `tiny-hf` and `dense-hf`; fine-tuned models go to TUNED, for the way back into a run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoProcessor, Trainer, TrainingArguments

EXPORTS, TUNED = Path(os.environ["EXPORTS"]), Path(os.environ["TUNED"])
NAMES = ("tiny", "dense")
TEXTS = ["<image> this is a seven", "draw a seven <image>", "this is", "draw a zero"]


def opened(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


@pytest.fixture(params=NAMES)
def name(request: Any) -> str:
    return str(request.param)


@pytest.fixture
def processor(name: str) -> Any:
    return AutoProcessor.from_pretrained(EXPORTS / f"{name}-hf", trust_remote_code=True)


@pytest.fixture
def batch(processor: Any) -> dict[str, Tensor]:
    """Texts and images, so that experts of both have something to learn."""
    first, second = np.random.default_rng(0).integers(0, 255, (2, 8, 8), dtype=np.uint8)
    found: dict[str, Tensor] = dict(processor(text=TEXTS, images=[[first], [second], [], []]))
    return found


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """At tokens; what stands at padding means nothing."""
    found: Tensor = model(**batch).logits.float()[batch["attention_mask"].bool()]
    return found


def new_tokens(model: Any, batch: dict[str, Tensor], **settings: Any) -> Tensor:
    found: Tensor = model.generate(**batch, max_new_tokens=6, max_length=None, do_sample=False, **settings)
    return found[:, batch["input_ids"].shape[1] :]


def fitted(model: Any, batch: dict[str, Tensor], out: Path, **settings: Any) -> list[float]:
    """Losses of a few steps of transformers' Trainer."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], labels, strict=True)
    ]
    asked = TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        seed=1,
        **settings,
    )
    trainer = Trainer(model=model, args=asked, train_dataset=rows)
    trainer.train()
    return [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]


# --- transformers' Trainer --------------------------------------------------------------------------------------------


def test_trainer(name: str, batch: dict[str, Tensor], processor: Any, tmp_path: Path) -> None:
    """With and without gradient checkpointing the same losses, and a folder that is loaded like an export."""
    found = []
    for checkpointing in (False, True):
        model = opened(EXPORTS / f"{name}-hf")
        losses = fitted(model, batch, tmp_path / "trainer", gradient_checkpointing=checkpointing)
        assert len(losses) == 4 and losses[-1] < losses[0]
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    model.eval()
    out = TUNED / f"trainer-{name}"
    model.save_pretrained(out)
    processor.save_pretrained(out)
    again = opened(out)
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert torch.equal(new_tokens(again, batch), new_tokens(again, batch, use_cache=False))


# --- peft -------------------------------------------------------------------------------------------------------------


def adapters(name: str, model: nn.Module) -> dict[str, Any]:
    """LoRA on attention and dense layers by their modules, on experts by their parameters."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    if name == "dense":
        return {"target_modules": [*modules, "gate_proj", "up_proj", "down_proj"]}
    experts = [name for name, _ in model.named_parameters() if name.endswith((".gate_up_proj", ".down_proj"))]
    return {"target_modules": modules, "target_parameters": experts}


def test_lora(name: str, batch: dict[str, Tensor], processor: Any, tmp_path: Path) -> None:
    """Train adapters, save and load them, merge them; the merged model is saved for the way back."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base = opened(EXPORTS / f"{name}-hf")
    before, names = logits(base, batch), set(base.state_dict())
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, **adapters(name, base)))
    assert torch.equal(logits(model, batch), before)
    losses = fitted(model, batch, tmp_path / "trainer")
    assert losses[-1] < losses[0]
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"lora_A", "lora_B"} == {part for key in trained for part in key.split(".") if part.startswith("lora")}
    assert not [key for key, parameter in model.named_parameters() if key in trained and not parameter.any()]
    after = logits(model.eval(), batch)
    assert not torch.allclose(after, before, atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(opened(EXPORTS / f"{name}-hf"), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, batch), after)
    merged = model.merge_and_unload()
    assert set(merged.state_dict()) == names
    assert torch.allclose(logits(merged, batch), after, atol=1e-4)
    out = TUNED / f"lora-{name}"
    merged.save_pretrained(out)
    processor.save_pretrained(out)
    assert torch.equal(logits(opened(out), batch), logits(merged, batch))


# --- quantisation -----------------------------------------------------------------------------------------------------


def test_torchao_int8(name: str, batch: dict[str, Tensor]) -> None:
    """Linear layers in int8; experts, routers, embeddings and thresholds keep their type."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = opened(EXPORTS / f"{name}-hf")
    want = logits(model, batch)
    kept = {key: tensor.clone() for key, tensor in model.state_dict().items() if "_proj.weight" not in key}
    quantize_(model.model, Int8WeightOnlyConfig())  # without the output layer
    linear = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    assert linear and all(type(module.weight).__name__ == "Int8Tensor" for module in linear)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in kept.items())
    error = float((logits(model, batch) - want).abs().max() / want.abs().max())
    assert 0 < error < 0.05, error
    assert torch.equal(new_tokens(model, batch), new_tokens(model, batch, use_cache=False))


def test_quantised_while_loading(name: str, batch: dict[str, Tensor]) -> None:
    """transformers quantises layer by layer as it loads; such a folder cannot come back into a run."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = opened(EXPORTS / f"{name}-hf", quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), device_map="cpu")
    want = logits(opened(EXPORTS / f"{name}-hf"), batch)
    assert float((logits(model, batch) - want).abs().max() / want.abs().max()) < 0.05
    model.save_pretrained(TUNED / f"int8-{name}")
    again = opened(TUNED / f"int8-{name}", device_map="cpu")
    assert torch.allclose(logits(again, batch), logits(model, batch), atol=1e-5)


# --- accelerate -------------------------------------------------------------------------------------------------------


def test_device_map_to_disk(name: str, batch: dict[str, Tensor], tmp_path: Path) -> None:
    """As `device_map="auto"` does it with little memory: the folder's layers stay in files."""
    want = opened(EXPORTS / f"{name}-hf")
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = opened(EXPORTS / f"{name}-hf", device_map=places | {"lm_head": "cpu"}, offload_folder=tmp_path / "offload")
    assert torch.allclose(logits(model, batch), logits(want, batch), atol=1e-6)
    assert torch.equal(new_tokens(model, batch), new_tokens(want, batch))
