"""Whatever computes with a checkpoint asks the checkpoint for its settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.checkpoint.settings import allows_missing, config_of
from mmscale.checkpoint.shape import shape_of
from mmscale.config import changes
from mmscale.config.load import dump
from mmscale.errors import CheckpointError
from tests.unit.config.test_changes import config


def test_its_own_and_not_the_latest_attempt_s(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(config("model.rope_base=5e5")))
    own = config()
    assert config_of({"config": own.model_dump(mode="json")}, where=tmp_path, run=tmp_path) == own


def test_a_checkpoint_from_before_the_configuration_was_kept(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no configuration"):
        config_of({}, where=tmp_path)
    latest = config("model.hidden_size=64")
    (tmp_path / "config.yaml").write_text(dump(latest))
    assert config_of({"shape": shape_of(latest)}, where=tmp_path, run=tmp_path) == latest
    with pytest.raises(CheckpointError, match=r"another model: model.hidden_size was 32, is 64"):
        config_of({"shape": shape_of(config("model.kv_channels=16"))}, where=tmp_path, run=tmp_path)


def test_another_version_s(tmp_path: Path) -> None:
    saved = config().model_dump(mode="json") | {"no_such_section": {}}
    with pytest.raises(CheckpointError, match="no configuration of this version"):
        config_of({"config": saved}, where=tmp_path, run=tmp_path)


def test_settings_that_are_younger_than_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was trained as if they had the value of that time, whatever their default is today."""
    saved = config().model_dump(mode="json")
    del saved["model"]["experts"]["choice"]
    monkeypatch.setitem(changes._BEFORE, "model.experts.choice", "softmax")
    assert config_of({"config": saved}, where=tmp_path).model.experts.choice == "softmax"


@pytest.mark.parametrize("scaling", ["null", "{factor: 4}"])
def test_stretched_positions_from_before_there_was_yarn(scaling: str, tmp_path: Path) -> None:
    now = config(f"model.rope_scaling={scaling}")
    saved = now.model_dump(mode="json")
    for key in ("beta_fast", "beta_slow", "attention_factor", "truncate"):
        (saved["model"]["rope_scaling"] or {}).pop(key, None)
    assert config_of({"config": saved}, where=tmp_path).model.rope_scaling == now.model.rope_scaling
    assert changes.changes(saved, now) == []


def test_data_that_moved_is_found_where_the_latest_attempt_found_it(tmp_path: Path) -> None:
    there, gone = tmp_path / "there", tmp_path / "gone"
    there.mkdir()
    saved = {"config": config(f"data.path={gone}", "data.balance=false").model_dump(mode="json")}
    (tmp_path / "config.yaml").write_text(dump(config(f"data.path={there}")))
    found = config_of(saved, where=tmp_path, run=tmp_path)
    assert found.data.path == str(there) and not found.data.balance
    gone.mkdir()
    assert config_of(saved, where=tmp_path, run=tmp_path).data.path == str(gone)
    there.rmdir()
    gone.rmdir()
    assert config_of(saved, where=tmp_path, run=tmp_path).data.path == str(gone)


def test_who_permits_what_is_missing(tmp_path: Path) -> None:
    assert not allows_missing(tmp_path)
    (tmp_path / "config.yaml").write_text(dump(config("checkpoint.allow_missing=true")))
    assert allows_missing(tmp_path)
