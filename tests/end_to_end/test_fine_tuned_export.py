"""An export that was fine-tuned and saved by transformers is still one; and runs of foreign models are exported."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
import torch

from mmscale.data.vocab import SPECIAL_TOKENS
from tests.end_to_end.running import assert_says, mmscale
from tests.end_to_end.test_evaluate_export import evaluated, ok
from tests.unit.checkpoints_tools.huggingface.test_hf_foreign import foreign


def fine_tuned(export: Path, out: Path) -> Path:
    """One step, saved as a trainer does it; padded with `</s>`, as many fine-tuning scripts have it."""
    from transformers import AutoModelForCausalLM, AutoProcessor

    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True).train()
    processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    ids = processor(text=["draw a seven", "this is"])["input_ids"]
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.config.pad_token_id = model.config.eos_token_id
    model.save_pretrained(out)
    assert_says(
        mmscale("sample", out, "--prompt", "a"), status=4, cause="no readable processor", remedy="save_pretrained"
    )
    processor.save_pretrained(out)
    return out


@pytest.mark.parametrize("name", ["tiny", pytest.param("dense", marks=pytest.mark.long)])
def test_a_fine_tuned_export_is_an_export(name: str, exported: Path, tmp_path: Path) -> None:
    hf = fine_tuned(exported / f"{name}-hf", tmp_path / "tuned")
    assert (hf / "experts_moma.py").is_file() == (name == "tiny") and not (hf / "mmscale.json").exists()
    before, after = (evaluated(folder, "--batches", "2") for folder in (exported / f"{name}-hf", hf))
    assert before["loss"] != after["loss"]
    assert (hf / "versions_moma.py").is_file()  # the processor needs it, and with it the code of every model
    said = json.loads(ok("convert", "from-hf", hf, tmp_path / "run", "--json"))
    assert said["verified"] == "shapes and values; there is no MANIFEST.json with digests"
    run = evaluated(tmp_path / "run", "--routing", "causal", "--batches", "2")
    assert run["loss"] == pytest.approx(after["loss"], rel=2e-6)
    drawn = ok("sample", hf, "--prompt", "draw a seven", "--max-tokens", "8", "--out", tmp_path / "drawn")
    assert "draw a seven" in drawn
    ok("convert", "to-hf", tmp_path / "run", tmp_path / "again")
    assert evaluated(tmp_path / "again", "--batches", "2")["loss"] == pytest.approx(after["loss"], rel=2e-6)


@pytest.mark.long
def test_fine_tuned_in_its_own_folder(exported: Path, tmp_path: Path) -> None:
    """The manifest that stands there is of the model before. A damaged file is still told from a new one."""
    from transformers import AutoModelForCausalLM

    hf = Path(shutil.copytree(exported / "dense-hf", tmp_path / "hf"))
    whole = bytearray((hf / "model.safetensors").read_bytes())
    whole[-5] ^= 1
    (hf / "model.safetensors").write_bytes(whole)
    for arguments in (("convert", "from-hf", hf, tmp_path / "run"), ("eval", hf)):
        ended = mmscale(*arguments)
        assert_says(ended, status=4, cause="damaged: model.safetensors has another content", remedy="export it again")
    assert not (tmp_path / "run").exists()
    model = AutoModelForCausalLM.from_pretrained(exported / "dense-hf")
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    model.save_pretrained(hf)
    said = json.loads(ok("convert", "from-hf", hf, tmp_path / "run", "--json"))
    assert "transformers saved the model again" in said["verified"]
    assert evaluated(hf, "--batches", "1")["loss"] != evaluated(exported / "dense-hf", "--batches", "1")["loss"]


def test_what_a_fine_tuning_may_not_change(exported: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported / "dense-hf")
    model.resize_token_embeddings(model.config.vocab_size + 1)
    model.save_pretrained(tmp_path / "tuned")
    ended = mmscale("convert", "from-hf", tmp_path / "tuned", tmp_path / "run")
    assert_says(ended, status=4, cause="tokens were added", remedy="without new tokens")
    assert not (tmp_path / "run").exists()


def test_everyone_may_read_an_export(exported: Path) -> None:
    for file in (exported / "tiny-hf").rglob("*"):
        assert stat.S_IMODE(file.stat().st_mode) & stat.S_IRGRP, file


@pytest.mark.long
def test_a_foreign_model_is_exported(digits: Path, tmp_path: Path) -> None:
    """Its run has no data set; `--data` names one, here with a tokenizer that fits the model's."""
    foreign(tmp_path / "hf", "qwen3", vocab_size=384 - len(SPECIAL_TOKENS), max_position_embeddings=64)
    shutil.copy(digits / "text_tokenizer" / "tokenizer.json", tmp_path / "hf")
    ok("convert", "from-hf", tmp_path / "hf", tmp_path / "run", "--image-codes", "128")
    ended = mmscale("convert", "to-hf", tmp_path / "run", tmp_path / "out")
    assert_says(ended, status=3, cause="has no data set", remedy="--data DIR")
    ok("convert", "to-hf", tmp_path / "run", tmp_path / "out", "--data", digits)
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert report["gate"]["passed"] and report["model"]["class"] == "Qwen3ForCausalLM"
