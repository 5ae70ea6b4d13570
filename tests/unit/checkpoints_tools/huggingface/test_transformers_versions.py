"""Exports in other versions of transformers than the pinned one: the oldest supported one, and those around a break.

Each version is installed once into a folder of its own that stands first on the path; only `make test-all` does it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from checkpoints_tools.huggingface import shipped
from checkpoints_tools.huggingface.model_config import CODE, model_config
from checkpoints_tools.huggingface.shipped.versions_moma import NEWEST, OLDEST
from tests.end_to_end.running import ROOT
from tests.unit.checkpoints_tools.huggingface.test_modeling_moma import MODELS, exported

# What a version needs besides itself: 5.8 asks for older packages than the pinned ones.
VERSIONS: dict[str, tuple[str, ...]] = {
    OLDEST: ("tokenizers==0.22.2", "huggingface_hub==1.33.0", "httpx", "httpcore"),
    "5.23.0": (),  # the last one to call the cache past_key_values
    NEWEST: (),  # calls it cache
}
TESTS = (
    "test_forward_arguments.py",
    "test_guidance_moma.py",
    "test_likelihood_moma.py",
    "test_modeling_moma.py",
    "test_processing_moma.py",
)
GENERATE = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
ids = torch.tensor([[0, 0, 1, 6, 25], [1, 6, 25, 7, 30]])
mask = (ids != 0).long()
found = [model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **way).tolist()
         for way in ({}, {"use_cache": False}, {"cache_implementation": "static"})]
print(json.dumps({"version": transformers.__version__, "found": found, "missing": list(report["missing_keys"])}))
"""


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The environment in which each version is the one that is imported."""
    found = {}
    for version, more in VERSIONS.items():
        if version == transformers.__version__:
            continue
        folder = tmp_path_factory.mktemp("transformers") / version
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        ended = subprocess.run([*pip, f"transformers=={version}", *more], capture_output=True, text=True)
        if ended.returncode != 0:
            assert "CI" not in os.environ, ended.stderr
            pytest.skip(f"transformers {version} cannot be installed: {ended.stderr.strip().splitlines()[-1]}")
        path = os.pathsep.join([str(folder), str(ROOT)])
        found[version] = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize("version", VERSIONS)
def test_the_shipped_files(version: str, installed: dict[str, dict[str, str]]) -> None:
    """The tests of the shipped files themselves, with another transformers."""
    if version not in installed:
        pytest.skip("this version is the pinned one, with which everything else runs")
    files = [str(Path(__file__).with_name(name)) for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    ended = subprocess.run(command, env=installed[version], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-5000:]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["moma", "depth", "dense, post norm"])
@pytest.mark.parametrize("version", VERSIONS)
def test_code_from_the_folder(version: str, name: str, installed: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """A folder of weights and code, loaded in a fresh process, generates alike in all ways and versions."""
    config = MODELS[name]
    model = exported(config)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = model_config(config, auxiliary_size=0, thresholds=False, routing="causal", tokens_per_image=4)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": content["auto_map"]}))
    for code in CODE:
        shutil.copy(Path(shipped.__file__).with_name(code), tmp_path)
    environment = installed.get(version, dict(os.environ)) | {"HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", GENERATE, str(tmp_path)]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = json.loads(ended.stdout.splitlines()[-1])
    assert said["version"] == version and said["missing"] == []
    assert said["found"][0] == said["found"][1] == said["found"][2]
    assert "tested with transformers" not in ended.stderr
