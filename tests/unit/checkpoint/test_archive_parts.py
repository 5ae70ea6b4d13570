"""Parts of archives: memory that does not grow with the model, settings, and boxes of a grid."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmscale.checkpoint import archive, integrity, plain, publish, rewrite, zarr_arrays
from mmscale.checkpoint.archive import ArchiveTensors
from mmscale.checkpoint.tensors import TensorSource, open_tensors, origin_of
from mmscale.checkpoint.zarr_arrays import Grid
from mmscale.errors import CheckpointError
from tests.unit.checkpoint.test_archive import SMALL, forked


def test_what_is_being_written_is_not_swept(tmp_path: Path) -> None:
    with publish.folder(tmp_path / "out") as first, publish.folder(tmp_path / "out") as second:
        assert first.is_dir() and second.is_dir() and first != second
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """6 tensors of 24 MiB: archiving, restoring and resharding take less than two of them and buffers."""
    largest, number, buffers = 24 << 20, 6, 24 << 20

    class Many:
        path, step = tmp_path, 1

        def names(self, *, weights: bool = False) -> list[str]:
            return [f"w{index:02d}" for index in range(number)]

        def entry(self, name: str) -> Any:
            return archive.TensorEntry(name, (largest // 4096, 1024), torch.float32)

        def read(self, name: str, region: Any = None) -> Tensor:
            return torch.full((largest // 4096, 1024), float(name[1:]))

        def manifest(self) -> integrity.CheckpointManifest:
            return integrity.CheckpointManifest(1, 1, "", "", {}, {})

        def info(self) -> dict[str, Any]:
            return {}

        common = objects = info

    def peak_of(action: Callable[[], Any]) -> int:
        def status(field: str) -> int:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

        before = status("VmRSS:")
        Path("/proc/self/clear_refs").write_text("5")
        action()
        return status("VmHWM:") - before

    def check() -> None:
        grid = Grid(shard_bytes=2 << 20)
        zarr_arrays.write(tmp_path / "warm", torch.zeros(3), grid=grid)
        source: TensorSource = Many()
        peaks = {"archive": peak_of(lambda: archive.write(source, tmp_path / "out", grid=grid))}
        kept = ArchiveTensors(tmp_path / "out")
        origin = origin_of("restore", [kept])
        whole, rewrite.PIECE_BYTES = rewrite.PIECE_BYTES, 1 << 20  # in a fork
        peaks["restore"] = peak_of(lambda: rewrite.into_run(kept, tmp_path / "run", origin=origin))
        rewrite.PIECE_BYTES = whole
        one = open_tensors(tmp_path / "run")
        peaks["reshard"] = peak_of(lambda: rewrite.into_run(one, tmp_path / "again", origin=origin))
        print(peaks)
        assert max(peaks.values()) < 2 * largest + buffers <= number * largest / 2, peaks

    forked(check)


def test_settings_come_back_exactly() -> None:
    value = {"a": (1, [2.5, (None,)]), 3: b"\x00\xff", "t": torch.tensor([[1.5, -2.0]]).bfloat16(), "__tuple__": True}
    back = plain.decode(json.loads(json.dumps(plain.encode(value))))
    assert back.keys() == value.keys() and back["a"] == value["a"] and isinstance(back["a"][1][1], tuple)
    assert back[3] == value[3] and torch.equal(back["t"], value["t"]) and back["t"].dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="hold a object"):
        plain.encode({"x": object()})


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0, 4), (5, 7, 3), (3, 1000), (4, 64, 2, 16)])
def test_boxes_of_a_grid_cover_every_element_once(shape: tuple[int, ...]) -> None:
    covered = torch.zeros(shape, dtype=torch.int)
    for box in zarr_arrays.boxes(shape, SMALL.shard(shape, 4)):
        covered[box] += 1
    assert (covered == 1).all()
    for chunk, shard in zip(SMALL.chunk(shape, 4), SMALL.shard(shape, 4), strict=True):
        assert chunk >= 1 and shard % chunk == 0
