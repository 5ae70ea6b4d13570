"""`mmscale convert from-hf` verifies first: each kind of damage in each kind of folder, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints_tools.huggingface.export_settings import settings
from checkpoints_tools.huggingface.from_hf import import_
from checkpoints_tools.huggingface.model_config import model_config
from checkpoints_tools.huggingface.verify import check_digests, is_used
from checkpoints_tools.huggingface.weights import target_shapes
from mmscale.checkpoint import integrity
from mmscale.checkpoint.integrity import CheckpointManifest
from mmscale.errors import CheckpointError
from tests.unit.checkpoints_tools.huggingface.test_hf_foreign import foreign
from tests.unit.checkpoints_tools.huggingface.test_modeling_moma import MODELS, exported

WEIGHTS = "model.safetensors"
KNOWN = {"text_tokenizer": "a", "image_tokenizer": "b"}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_the_model(name: str) -> None:
    config, model = MODELS[name], exported(MODELS[name])
    state = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if config.model.tie_embeddings:
        del state["lm_head.weight"]
    thresholds = model.config.keeps_thresholds
    assert target_shapes(config, auxiliary_size=model.config.auxiliary_size, thresholds=thresholds) == state


# --- folders ----------------------------------------------------------------------------------------------------------


def with_manifest(folder: Path) -> None:
    (folder / integrity.MANIFEST).unlink(missing_ok=True)
    files = integrity.digests(folder, integrity.sizes(folder))
    manifest = CheckpointManifest(step=1, attempt=1, config_digest="", code_version="", topology={}, files=files)
    (folder / integrity.MANIFEST).write_text(manifest.text())


def export(folder: Path) -> None:
    """As `mmscale convert to-hf` writes it."""
    folder.mkdir()
    config = MODELS["depth"]
    state = exported(config).state_dict()
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    content = model_config(config, auxiliary_size=5, thresholds=True, routing="causal", tokens_per_image=4)
    (folder / "config.json").write_text(json.dumps(content | settings(config, KNOWN)))
    (folder / "README.md").write_text("a card")
    with_manifest(folder)


def saved_again(folder: Path) -> None:
    """As `save_pretrained` does it in place: other weights, its version in config.json, the manifest of before."""
    export(folder)
    change_tensors(folder, lambda state: state["model.norm.weight"].mul_(1.01))
    change_config(folder, transformers_version="5.24.0")


def copied(folder: Path) -> None:
    """Without the manifest, as `save_pretrained` does it in another folder."""
    saved_again(folder)
    (folder / integrity.MANIFEST).unlink()


def others(folder: Path) -> None:
    """A model of someone else."""
    foreign(folder, "qwen3", tie_word_embeddings=True)
    state: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
        file.unlink()
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink()


FOLDERS: dict[str, Callable[[Path], None]] = {made.__name__: made for made in (export, saved_again, copied, others)}


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hf") / request.param
    FOLDERS[request.param](made)
    return made


def test_whole_folders_are_imported(folder: Path, tmp_path: Path) -> None:
    said = import_(folder, tmp_path / "run")["verified"]
    wanted = {
        "export": "digests of 2 files",
        "saved_again": "transformers saved the model again",
        "copied": "there is no MANIFEST.json",
        "others": "there is no MANIFEST.json",
    }
    assert wanted[folder.name] in said
    assert said.startswith("shapes and values") == (folder.name != "export")


def test_exports_from_before_head_width_are_imported(tmp_path: Path) -> None:
    """Their head_dim is the width of a head, also with Mixture-of-Depths."""
    export(tmp_path / "hf")
    change_config(tmp_path / "hf", head_dim=MODELS["depth"].model.head_dim, head_width=None)
    with_manifest(tmp_path / "hf")
    assert import_(tmp_path / "hf", tmp_path / "run")["verified"] == "digests of 2 files"


def test_heads_of_another_width_are_refused(tmp_path: Path) -> None:
    export(tmp_path / "hf")
    change_config(tmp_path / "hf", head_width=MODELS["depth"].model.head_dim * 2)
    with_manifest(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="disagree about head_dim"):
        import_(tmp_path / "hf", tmp_path / "run")


# --- damage -----------------------------------------------------------------------------------------------------------


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_bytes(folder: Path, change: Callable[[bytes], bytes]) -> None:
    (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


Q = "model.layers.0.self_attn.q_proj.weight"


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, change)


def content(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: change_bytes(folder, change)


# Damage, and what is said of it without digests; None: nothing can tell.
DAMAGE: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "truncated": (content(lambda b: b[:-9]), "is damaged"),
    "cut in the header": (content(lambda b: b[:99]), "is damaged"),
    "empty": (content(lambda b: b""), "is damaged"),
    "too long": (content(lambda b: b + b"\0" * 8), "is damaged"),
    "header": (content(lambda b: b[:20] + b"\xff" + b[21:]), "is damaged"),
    "last tensors are zeros": (content(lambda b: b[:-2048] + b"\0" * 2048), "are zero"),
    "one bit of a weight": (content(lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:]), None),
    "NaN": (tensors(lambda s: s[Q].view(-1)[3:5].fill_(float("nan"))), "2 of .* values of .*q_proj.* are not finite"),
    "infinite": (tensors(lambda s: s["model.norm.weight"][:1].fill_(float("inf"))), "norm.weight are not finite"),
    "zeros": (tensors(lambda s: s[Q].zero_()), "all values of .*q_proj.weight are zero"),
    "another shape": (tensors(lambda s: s.update({Q: s[Q][:-2].clone()})), "q_proj.weight does not fit config.json"),
    "more rows": (
        tensors(lambda s: s.update({"model.embed_tokens.weight": s["model.embed_tokens.weight"].repeat(2, 1)})),
        "embed_tokens.weight does not fit config.json",
    ),
    "a tensor is lost": (tensors(lambda s: s.pop(Q)), "q_proj.weight is missing"),
    "a tensor too many": (tensors(lambda s: s.update(more=torch.ones(2))), "more is not known"),
    "a tensor of another layer": (
        tensors(lambda s: s.update({Q: s[Q.replace(".0.", ".1.")].clone()})),
        None,
    ),
    "an unused setting": (lambda folder: change_config(folder, initializer_range=0.5), None),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    damage, said = DAMAGE[name]
    hf = Path(shutil.copytree(folder, tmp_path / "hf"))
    damage(hf)
    if said is None and folder.name != "export":
        import_(hf, tmp_path / "run")
        return
    with pytest.raises(CheckpointError) as caught:
        import_(hf, tmp_path / "run")
    assert "another content than what was written" in caught.value.cause or caught.match(said or "")
    assert "again" in caught.value.remedy and not (tmp_path / "run").exists()


def test_any_byte_that_changes_is_found(tmp_path: Path) -> None:
    export(tmp_path / "hf")
    whole = (tmp_path / "hf" / WEIGHTS).read_bytes()
    for at in [*range(12), *np.random.default_rng(0).integers(0, len(whole), 50)]:
        (tmp_path / "hf" / WEIGHTS).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CheckpointError):
            import_(tmp_path / "hf", tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_the_manifest_is_verified_itself(tmp_path: Path) -> None:
    export(tmp_path / "hf")
    file = tmp_path / "hf" / integrity.MANIFEST
    file.write_text(file.read_text().replace('"size": ', '"size": 1', 1))
    with pytest.raises(CheckpointError, match=r"is damaged: MANIFEST\.json"):
        import_(tmp_path / "hf", tmp_path / "run")


def test_weights_that_training_left_at_zero(tmp_path: Path) -> None:
    """A digest says that they were exported so; a cut-off may be 0 anyhow. Infinite values are refused all the same."""
    export(tmp_path / "hf")
    thresholds = "model.layers.0.mlp.experts.text.threshold"
    change_tensors(tmp_path / "hf", lambda state: (state[Q].zero_(), state[thresholds].zero_()))
    with_manifest(tmp_path / "hf")
    import_(tmp_path / "hf", tmp_path / "run")
    change_tensors(tmp_path / "hf", lambda state: state[thresholds].fill_(float("nan")))
    with_manifest(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="are not finite"):
        import_(tmp_path / "hf", tmp_path / "again")


def test_a_folder_of_a_model_hub(tmp_path: Path) -> None:
    """Links into a cache, files of the hub's own, and a card that was edited there."""
    export(tmp_path / "blobs")
    hf = tmp_path / "models" / "snapshots" / "0a1b"
    hf.mkdir(parents=True)
    shutil.move(tmp_path / "blobs", tmp_path / "models" / "blobs")
    for file in (tmp_path / "models" / "blobs").iterdir():
        (hf / file.name).symlink_to(file)
    (hf / "README.md").unlink()
    (hf / "README.md").write_text("another card")
    (hf / ".gitattributes").write_text("")
    assert import_(hf, tmp_path / "run")["verified"] == "digests of 2 files"
    found = check_digests(hf, json.loads((hf / "config.json").read_text()), used=is_used)
    assert found.same == {WEIGHTS, "config.json"}
