"""The index of snapshots in memory belongs to one folder, whatever that is called."""

from __future__ import annotations

import shutil
from pathlib import Path

from mmscale.resilience.generations import INDEX, Generation, read_index, write_index


def test_a_copied_folder_names_no_snapshots_and_a_renamed_one_keeps_its_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    generation = Generation("name", 1, {"layout": 1}, ((0,),), ("mmscale-0",))
    write_index(run, [generation])
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    assert read_index(run) == [generation] and read_index(copy) == []
    run.rename(tmp_path / "renamed")
    copy.rename(run)
    assert read_index(tmp_path / "renamed") == [generation] and read_index(run) == []
    write_index(run, [])
    assert not (run / INDEX).exists()
