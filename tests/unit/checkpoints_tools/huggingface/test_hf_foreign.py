"""Qwen3 and Llama models of others as a starting point: the trainer computes what transformers computes."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from checkpoints_tools.huggingface.from_hf import import_
from checkpoints_tools.huggingface.model_config import model_config
from checkpoints_tools.huggingface.weights import moves
from mmscale.checkpoint import rewrite
from mmscale.checkpoint.tensors import open_tensors
from mmscale.config import Config
from mmscale.config.load import load
from mmscale.data.modalities.text_tokens import TextTokenizer
from mmscale.data.stream.packed import pack_rows
from mmscale.errors import CheckpointError
from mmscale.runtime.rank_env import RankEnv
from tests.support import run_ranks

WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
}


def foreign(folder: Path, kind: str, **settings: Any) -> Any:
    """A random model of another's making, on disk."""
    classes = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }
    config_class, model_class = classes[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**(SHAPE | settings))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, max_shard_size="10kB")
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}


YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("llama", {}),
        ("llama", {"rope_parameters": LLAMA_3}),
        ("qwen3", {"rope_parameters": YARN}),
        ("llama", {"rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5, "truncate": False}}),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 50_000.0, "factor": 2.0}}),
    ],
)
def test_logits_are_theirs(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = foreign(tmp_path / "hf", kind, **settings)
    result = import_(tmp_path / "hf", tmp_path / "run", image_codes=11, seq_length=16)
    assert result["model"] == f"dense from {kind}" and "allow_missing" in result["next"]
    ids = [3, 7, 1, 30, 2, 9]
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0]

    def compare(ranks: RankEnv) -> None:
        from mmscale.inference.model import open_run

        with open_run(tmp_path / "run") as run:
            assert run.step == 0 and run.config.model.qk_norm == (kind == "qwen3")
            rows = [[np.array(ids) + 5]]
            batch, _ = pack_rows(rows, vocabulary=run.vocabulary, seq_length=16)
            got = run.logits(batch)[0, : len(ids), 5:37]
            exported(run.config, tmp_path / "run", ids, got)
        assert float((got - want).abs().max()) < 2e-5 * float(want.abs().max())

    run_ranks(compare, world_size=1)
    config = load(tmp_path / "run" / "config.yaml")
    assert [(m.name, m.size) for m in config.vocab.modalities] == [("text", 37), ("image", 11)]
    file = tmp_path / "run" / "text_tokenizer" / "tokenizer.json"
    assert str(file) in result["next"]
    text = TextTokenizer.load(file, size=37)
    assert text.encode("a z").tolist() == [3 + 5, 28 + 5]
    rows = open_tensors(tmp_path / "run").read("embedding.word_embeddings.weight")
    known = model.get_input_embeddings().weight.detach()
    assert torch.equal(rows[1], known[1]) and torch.equal(rows[2], known[2])  # <s> and </s> are theirs
    new = rows[37:48]
    assert float((new.mean(dim=0) - known.mean(dim=0)).abs().max()) < 0.1 and len(new.unique(dim=0)) == 11


def exported(config: Config, run: Path, ids: list[int], want: torch.Tensor) -> None:
    """The run as a model of transformers' own classes again: the same logits."""
    content = model_config(config, auxiliary_size=0, thresholds=False, routing="causal", tokens_per_image=0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content)).eval()
    source, state = open_tensors(run), {}
    for move in moves(config, auxiliary=False, thresholds=False):
        state |= dict(zip(move.targets, move.split(source.read(move.source)), strict=True))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    with torch.no_grad():
        got = model(torch.tensor([ids]) + 5).logits[0, :, 5:37]
    assert float((got - want).abs().max()) < 2e-5 * float(want.abs().max())


NO_NUMBERS: list[dict[str, Any]] = [
    {"hidden_size": None},
    {"num_attention_heads": "four"},
    {"num_attention_heads": 0},
    {"num_hidden_layers": 2.5},
    {"vocab_size": True},
    {"num_key_value_heads": "two"},
    {"head_dim": [16]},
    {"max_position_embeddings": "long"},
]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "are quantised"),
        ({"model_type": "mixtral"}, "type 'mixtral' cannot be imported"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 8.0}}, "rope_type is 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "lack original_max_position_embeddings"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters lack low_freq_factor"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": ["qwen3"]}, "cannot be imported"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 12345.6}}, "rope_base = 12345.6 is not a whole"),
        ({"rope_parameters": ["default"]}, "rope_parameters are ['default']"),
        *((number, f"no whole number above 0 for {next(iter(number))}") for number in NO_NUMBERS),
        ({"num_hidden_layers": 3}, "layers.2"),
        ({"intermediate_size": 40, "num_attention_heads": 3}, "num_attention_heads"),
        ({"vocab_size": 40}, "embed_tokens.weight does not fit config.json"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    foreign(tmp_path / "hf", "qwen3")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(CheckpointError) as caught:
        import_(tmp_path / "hf", tmp_path / "run")
    assert said in str(caught.value) and caught.value.remedy
    assert not (tmp_path / "run").exists()


def test_without_a_tokenizer(tmp_path: Path) -> None:
    foreign(tmp_path / "hf", "qwen3")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        import_(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_import_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the run's folder nor those above it; and of a folder that was there, what was in it."""

    def full(*arguments: Any, **settings: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    foreign(tmp_path / "hf", "qwen3")
    monkeypatch.setattr(rewrite, "_write", full)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    for run in (tmp_path / "new" / "deep" / "run", tmp_path / "there"):
        with pytest.raises(CheckpointError, match="No space left"):
            import_(tmp_path / "hf", run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "there"]
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["notes.txt"]


def test_an_output_layer_beside_a_tied_one_is_not_dropped(tmp_path: Path) -> None:
    """Some frameworks write both; where they differ, config.json or the file is wrong."""
    model = foreign(tmp_path / "hf", "qwen3", tie_word_embeddings=False)
    file = tmp_path / "hf" / "config.json"
    tied = json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True})
    file.write_text(tied)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is .*, but it is another") as caught:
        import_(tmp_path / "hf", tmp_path / "run")
    assert "tie_word_embeddings to false" in caught.value.remedy and not (tmp_path / "run").exists()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "hf", max_shard_size="10kB")
    file.write_text(tied)
    assert load(Path(import_(tmp_path / "hf", tmp_path / "run")["run"]) / "config.yaml").model.tie_embeddings


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"model_type": "llama"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin may run code"):
        import_(tmp_path, tmp_path / "run")
