"""Archives: the same tensors back, partly too; damage is found; killed or out of room, nothing is taken for whole.

tensorstore works in no fork of a process that has used it: here it is used in forks only.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints_tools import copying, folders
from checkpoints_tools.sources import open_source
from checkpoints_tools.tensor_values import find, values
from mmscale.checkpoint import archive, integrity, rewrite, zarr_arrays
from mmscale.checkpoint.archive import ArchiveTensors
from mmscale.checkpoint.layout import INFO, Store
from mmscale.checkpoint.manager import CheckpointManager
from mmscale.checkpoint.tensors import TensorSource, open_tensors, origin_of
from mmscale.checkpoint.zarr_arrays import Grid
from mmscale.errors import CheckpointError
from mmscale.runtime import fail_points, groups
from mmscale.runtime.rank_env import RankEnv
from tests.support import run_ranks

W1 = "decoder.layers.3.mlp.experts.image.w1"
SMALL = Grid(chunk_bytes=1 << 13, shard_bytes=1 << 14)
SETTINGS = {0: {"betas": (0.9, 0.95)}, "step": 7, "scale": 0.1 + 0.2, "none": None}


class State:
    """Tensors of several types; every rank holds half of each."""

    def __init__(self, scale: int = 1) -> None:
        self.step = 7
        self.scale = scale

    def tensors(self) -> dict[str, Tensor]:
        made = torch.Generator().manual_seed(0)
        found = {
            "embedding.weight": torch.randn(64, 8, generator=made).bfloat16(),
            W1: torch.randn(4, 64 * self.scale, 2, 16, generator=made),
            "decoder.layers.3.mlp.experts.image.w2": torch.randn(4, 16, 64, generator=made),
            "odd/name %": torch.arange(10.0),
            "zeros.bias": torch.zeros(6, dtype=torch.float16),
        }
        return found | {f"optimizer.state.exp_avg.{W1}": found[W1] * 0.5}

    def sharded(self, *, loading: bool) -> dict[str, Any]:
        from megatron.core.dist_checkpointing import ShardedTensor

        rank = torch.distributed.get_rank()

        def half(name: str, tensor: Tensor) -> Any:
            return ShardedTensor.from_rank_offsets(name, tensor.chunk(2)[rank].contiguous(), (0, rank, 2))

        parts: dict[str, Any] = {name: half(name, tensor) for name, tensor in self.tensors().items()}
        return {**parts, "optimizer": SETTINGS, "progress": {"step": 7, "sequences": 70}}

    def restore(self, loaded: dict[str, Any]) -> None:
        raise NotImplementedError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, written by two ranks."""
    folder = tmp_path_factory.mktemp("runs") / "run"

    def save(ranks: RankEnv) -> None:
        groups.start(ranks)
        groups.initialize_layout()
        info = {"shape": {"vocab.modalities": [["text", 8]]}, "config": {"run": {"name": "old", "seed": 1}}}
        checkpoints = CheckpointManager(folder, every=1, keep=9, attempt=2, info=info, on_event=lambda *_, **__: None)
        checkpoints.save(State())

    run_ranks(save, world_size=2)
    return folder


def forked(function: Callable[[], Any], *, ended_by: signal.Signals | None = None) -> None:
    """Call it in a fork of this process, which ends well, or by a signal."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == (-ended_by if ended_by else 0), f"the fork ended with {status}; its traceback is above"


@pytest.fixture(scope="module")
def made(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of it with small chunks: one of w1's experts is a chunk, two are a shard."""
    out = tmp_path_factory.mktemp("archives") / "made"
    forked(lambda: archive.write(open_tensors(run), out, grid=SMALL, code_version="0.1+abc"))
    return out


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "archive"))


def assert_same(one: TensorSource, other: TensorSource) -> None:
    assert one.names() == other.names()
    for name in one.names():
        assert one.entry(name) == other.entry(name)
        assert torch.equal(one.read(name), other.read(name)), name
    assert one.common() == other.common() and one.objects() == other.objects()


def test_the_same_comes_back(run: Path, made: Path, tmp_path: Path) -> None:
    def check() -> None:
        source, kept = open_tensors(run), ArchiveTensors(made)
        wanted = State().tensors()
        assert kept.names() == sorted(wanted) and all(torch.equal(kept.read(name), wanted[name]) for name in wanted)
        assert_same(source, kept)
        assert kept.common()["optimizer"] == SETTINGS
        assert kept.info()["step"] == kept.step == 7 and kept.manifest().attempt == 2
        parent = kept.manifest().origin["parents"][0]  # type: ignore[index]
        assert (parent["path"], parent["step"]) == (str(source.path), 7)
        assert parent["manifest"] == integrity.text_digest(source.manifest().text())
        back = copying.restore(made, tmp_path / "restored")
        assert_same(source, open_tensors(tmp_path / "restored"))
        assert back["origin"]["parents"][0]["origin"] == kept.manifest().origin
        assert back["contents"] == "training" and not (Path(back["path"]) / "rng").exists()
        assert "name: restored" in (tmp_path / "restored" / "config.yaml").read_text()

    forked(check)


def test_other_readers_read_it(made: Path) -> None:
    """It is zarr v3; bfloat16, which zarr-python does not know, is there as bits with an attribute."""
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(str(made / "tensors"), mode="r")
    for name, tensor in State().tensors().items():
        array = group[archive.folder_of(name)]
        found = torch.from_numpy(array[:])
        assert torch.equal(found.view(getattr(torch, array.attrs.get("dtype", str(array.dtype)))), tensor), name
    assert {str(tensor.dtype) for tensor in State().tensors().values()} >= {"torch.bfloat16", "torch.float32"}
    assert group[W1].chunks == (1, 64, 2, 16) and group[W1].shards == (2, 64, 2, 16)


def test_what_was_set_aside_comes_back_if_it_is_whole(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    store = Store.of_run(copy)
    store.quarantine(7)

    def check() -> None:
        with pytest.raises(CheckpointError, match=r"no folder of step 8 was renamed to \.bad"):
            folders.restore_bad(copy, step=8)
        bad = store.root / "step_00000007.bad" / "common.pt"
        content = bad.read_bytes()
        bad.write_bytes(content[:-1] + b"x")
        assert folders.restore_bad(copy)["restored"] == [] and store.steps() == []
        bad.write_bytes(content)
        assert folders.restore_bad(copy, step=7) == {"run": str(copy), "restored": [7], "damaged": {}}
        assert store.newest() == 7 and store.quarantined() == []

    forked(check)


def test_archives_of_format_1_are_restored(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr_arrays, "_AS_BITS", {})  # bfloat16 as a type of its own, as format 1 had it
    monkeypatch.setattr(archive, "ARCHIVE_FORMAT", 1)

    def check() -> None:
        archive.write(open_tensors(run), tmp_path / "old", grid=SMALL)
        assert json.loads((tmp_path / "old/tensors/embedding.weight/zarr.json").read_text())["data_type"] == "bfloat16"
        monkeypatch.undo()
        copying.restore(tmp_path / "old", tmp_path / "restored")
        assert_same(open_tensors(run), open_tensors(tmp_path / "restored"))

    forked(check)


@pytest.mark.parametrize("name", sorted(zarr_arrays.DTYPES))
def test_every_type_comes_back_and_zarr_reads_it(tmp_path: Path, name: str) -> None:
    zarr = pytest.importorskip("zarr")
    dtype = getattr(torch, name)
    tensor = torch.tensor([[0, 1, 0], [1, 1, 0]]).to(dtype)

    def check() -> None:
        zarr_arrays.write(tmp_path / "one", tensor, grid=SMALL)
        assert torch.equal(zarr_arrays.read(tmp_path / "one").float(), tensor.float())
        array = zarr.open_array(str(tmp_path / "one"), mode="r")
        assert array.attrs.get("dtype", str(array.dtype)) == name
        assert torch.equal(torch.from_numpy(array[:]).view(dtype).float(), tensor.float())

    forked(check)


def test_weights_only(run: Path, tmp_path: Path) -> None:
    def check() -> None:
        assert copying.archive(run, 7, tmp_path / "out", weights=True)["contents"] == "weights"
        kept = ArchiveTensors(tmp_path / "out")
        assert kept.names() == open_tensors(run).names(weights=True) and len(kept.names()) == 5
        assert kept.common() == {"progress": {"step": 7, "sequences": 70}}
        assert copying.restore(tmp_path / "out", tmp_path / "run")["contents"] == "weights"

    forked(check)


def test_reshard_cuts_tensors_into_other_files(
    run: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite, "PIECE_BYTES", 5000)

    def check() -> None:
        source = open_tensors(run)
        rewrite.into_run(source, tmp_path / "run", origin=origin_of("reshard", [source]), files=2)
        assert_same(source, open_tensors(tmp_path / "run"))
        assert len(list((tmp_path / "run").rglob("*.distcp"))) == 2
        assert copying.reshard(made, None, tmp_path / "again", weights=True)["tensors"] == 5

    forked(check)


@pytest.mark.parametrize("kind", ["run", "archive"])
def test_a_box_is_read_without_the_rest(run: Path, copied: Path, tmp_path: Path, kind: str) -> None:
    """Of an archive: with every other chunk of the file damaged. Of a checkpoint: the file without the box is."""
    path = copied if kind == "archive" else Path(shutil.copytree(run, tmp_path / "run"))
    wanted = State().tensors()[W1]
    if kind == "archive":
        file = copied / "tensors" / W1 / "c" / "0" / "0" / "0" / "0"
        content = bytearray(file.read_bytes())
        chunk = 64 * 2 * 16 * 4 + 4  # with its crc32c; chunks may stand in any order
        second = content.index(wanted[1].numpy().tobytes())
        content[second + 100] ^= 1
        assert len(content) >= 2 * chunk
        file.write_bytes(content)
    else:
        (file,) = [f for f in path.rglob("__1_*.distcp") if wanted[2].numpy().tobytes() in f.read_bytes()]
        content = bytearray(file.read_bytes())
        content[-200] ^= 1
        file.write_bytes(content)

    def check() -> None:
        source = open_source(path)
        assert torch.equal(source.read(W1, [slice(0, 1), slice(3, 7), slice(0, 2), slice(0, 16)]), wanted[:1, 3:7])
        found = values(path, name="decoder.layers.3.experts.image.w1", box="0,3:7,1,2")
        assert found["values"] == wanted[0, 3:7, 1, 2].tolist() and found["name"] == W1
        bad = "1" if kind == "archive" else "3"
        with pytest.raises(CheckpointError, match="is damaged"):
            values(path, name=W1, box=bad)
        with pytest.raises(CheckpointError, match="is damaged"):
            source.read(W1)

    forked(check)


def test_every_flipped_bit_is_found(made: Path, copied: Path, tmp_path: Path) -> None:
    """In every file: by verify without torch's help, and by a restore before anything is committed."""
    files = [file for file in sorted(copied.rglob("*")) if file.is_file()]
    assert len(files) > 15
    for number, file in enumerate(files):
        content = file.read_bytes()
        position = (number * 7919) % len(content)
        file.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        assert not folders.verify(copied)["whole"], file
        if number % 3 == 0 and file.name != "zarr.json":  # that of the group nobody needs

            def restore() -> None:
                with pytest.raises(CheckpointError, match=r"damaged|not an archive"):
                    copying.restore(copied, tmp_path / "run")

            forked(restore)
            assert Store.of_run(tmp_path / "run").steps() == []
        file.write_bytes(content)
    assert folders.verify(copied)["whole"] and folders.verify(copied)["archive"]


def test_missing_shards_do_not_read_as_zeros(copied: Path) -> None:
    shard = f"tensors/{W1}/c/0/0/0/0"
    (copied / shard).unlink()

    def check() -> None:
        with pytest.raises(CheckpointError, match="0/0/0/0 is missing"):
            ArchiveTensors(copied)
        manifest = integrity.read_manifest(copied)  # not even if the manifest does not know it
        fewer = {name: record for name, record in manifest.files.items() if name != shard}
        (copied / integrity.MANIFEST).write_text(
            integrity.CheckpointManifest(**{**vars(manifest), "files": fewer}).text()
        )
        with pytest.raises(CheckpointError, match="0/0/0/0 is missing"):
            ArchiveTensors(copied).read(W1, [slice(2, 3), slice(0, 1), slice(0, 1), slice(0, 1)])

    forked(check)


def test_an_archive_of_another_version(copied: Path) -> None:
    for found, said in ((3, "archive of format 3, this version reads format 2 and older"), (None, "is not an archive")):
        info = json.loads((copied / INFO).read_text()) | {"archive": found}
        (copied / INFO).write_text(json.dumps(info))
        manifest = integrity.read_manifest(copied)
        files = integrity.digests(copied, integrity.sizes(copied))
        (copied / integrity.MANIFEST).write_text(
            integrity.CheckpointManifest(**{**vars(manifest), "files": files}).text()
        )
        with pytest.raises(CheckpointError, match=said):
            ArchiveTensors(copied)


ARCHIVED = ["begin", "tensor", "write", "hash", "manifest", "fsync", "rename"]
RESTORED = ["file", "write", "manifest", "fsync", "rename", "latest"]


def killed_at(stage: str, seen: str) -> None:
    if seen == stage:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("stage", ARCHIVED)
def test_killed_while_archiving(run: Path, tmp_path: Path, stage: str) -> None:
    """Nothing has the name until it is whole; the next one cleans up."""
    out = tmp_path / "out"
    at = functools.partial(killed_at, stage)
    with fail_points.handled(at):
        forked(lambda: archive.write(open_tensors(run), out, grid=SMALL), ended_by=signal.SIGKILL)
    if stage == "rename":
        assert integrity.verify(out) == []
        return
    assert [entry.name.startswith("out.tmp.") for entry in tmp_path.iterdir()] == [True]
    forked(lambda: archive.write(open_tensors(run), out, grid=SMALL))
    assert integrity.verify(out) == [] and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("stage", RESTORED)
def test_killed_while_restoring(made: Path, tmp_path: Path, stage: str) -> None:
    store = Store.of_run(tmp_path / "run")
    at = functools.partial(killed_at, stage)
    with fail_points.handled(at):
        forked(lambda: copying.restore(made, tmp_path / "run"), ended_by=signal.SIGKILL)
    if stage not in ("rename", "latest"):
        assert store.steps() == []
        forked(lambda: copying.restore(made, tmp_path / "run"))
    assert store.steps() == [7] and integrity.verify(store.path(7), step=7) == []


def test_no_room(run: Path, made: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: one line of cause, and nothing is left."""

    def check() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
        for action in (
            lambda: copying.archive(run, None, tmp_path / "out"),
            lambda: copying.restore(made, tmp_path / "run"),
        ):
            with pytest.raises(CheckpointError, match="cannot be written: File too large") as raised:
                action()
            assert "make room" in raised.value.remedy

    forked(check)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.tmp*"))
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == []


def test_nothing_is_written_over(run: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        copying.archive(run, None, made)
    with pytest.raises(CheckpointError, match="has checkpoints already"):
        copying.restore(made, run)
    with pytest.raises(CheckpointError, match="is no archive"):
        copying.restore(run, tmp_path / "run")
    with pytest.raises(CheckpointError, match="is an archive of step 7"):
        open_source(made, 8)


def test_names(made: Path) -> None:
    source = ArchiveTensors(made)
    assert find(source, "layers.3.experts.image.w2") == "decoder.layers.3.mlp.experts.image.w2"
    with pytest.raises(CheckpointError, match="has no tensor decoder") as raised:
        find(source, "decoder.layers.3.mlp.experts.image.w3")
    assert "did you mean" in raised.value.remedy and "decoder.layers.3.mlp.experts.image.w2" in raised.value.remedy
    for name in ("", "..", ".hidden", "../../x", "x" * 300):
        with pytest.raises(CheckpointError, match="cannot be the name of a folder"):
            archive.folder_of(name)
