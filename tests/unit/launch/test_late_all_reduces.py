"""All-reduces that do not end in time: who is blamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch import nodes
from launch.profile import Profile
from launch.record import Record


@pytest.mark.parametrize(("demanded", "cordon"), [({}, False), ({"all_reduce_between_gb_s": 20.0}, True)])
def test_nobody_is_cordoned_for_being_late_where_nothing_is_demanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demanded: dict[str, Any], cordon: bool
) -> None:
    """A step that does not end."""
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/bash\nexec /bin/sleep 100\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    monkeypatch.setattr(nodes, "_MEASURED_S", 0.2)
    monkeypatch.setattr(nodes, "_MEASURED_PER_NODE_S", 0.1)
    profile = Profile.model_validate({"nodes": 3, "tasks_per_node": 1, "preflight": demanded})
    record = Record(str(tmp_path), str(tmp_path), str(tmp_path), "test", {}, 3, 1, 0, 0)
    bad, measured = nodes.measure(record, profile, port=1, interrupted=lambda: False)
    assert sorted(bad) == ["n1", "n2", "n3"] and measured["all"] is None
    assert all("nothing within 0.5 s" in one.text and one.cordon is cordon for one in bad.values())
