"""`mmscale ckpt`: what it prints about checkpoints, finds, compares and deletes."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import subprocess
from collections.abc import Iterator
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from mmscale.checkpoint import integrity, signing
from mmscale.checkpoint.integrity import MANIFEST, SIGNATURE
from mmscale.checkpoint.layout import INFO, Store
from mmscale.checkpoint.manager import CheckpointManager
from mmscale.cli import main
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from tests.support import run_ranks

TOPOLOGY = {"world_size": 2, "tp": 1, "pp": 1, "vpp": 1, "ep": 1, "cp": 1}


class State:
    """Some tensors with the names of a model's; every rank holds half of each."""

    def __init__(self, step: int) -> None:
        self.step = step

    def sharded(self, *, loading: bool) -> dict[str, Any]:
        import torch
        from megatron.core.dist_checkpointing import ShardedTensor

        def half(key: str, width: int, dtype: torch.dtype, value: float) -> Any:
            rank = torch.distributed.get_rank()
            tensor = torch.full((2, width), value, dtype=dtype)
            return ShardedTensor.from_rank_offsets(key, tensor, (0, rank, 2))

        return {
            "embedding": half("embedding.weight", 5, torch.bfloat16, 1.0),
            "text": half("decoder.layers.0.mlp.experts.text.w1", 3, torch.float32, float(self.step)),
            "image": half("decoder.layers.0.mlp.experts.image.w1", 2, torch.float32, 0.5),
            "moment": half("optimizer.state.exp_avg.embedding.weight", 5, torch.float32, self.step / 10),
            "progress": {"step": self.step},
        }

    def restore(self, loaded: dict[str, Any]) -> None:
        raise NotImplementedError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of two ranks."""
    run = tmp_path_factory.mktemp("runs") / "run"

    def save(ranks: RankEnv) -> None:
        groups.start(ranks)
        groups.initialize_layout()
        info = {"config_digest": "abc", "shape": {"vocab.modalities": [["text", 8], ["image", 8]]}}
        checkpoints = CheckpointManager(
            run, every=1, keep=9, attempt=1, info=info, on_event=lambda *_, **__: None, code_version="0.1.0+abc"
        )
        for step in (10, 20, 30):
            checkpoints.save(State(step))

    run_ranks(save, world_size=2)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def ckpt(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> Any:
    """The JSON that a command prints, or its two lines of error."""
    assert main(["ckpt", *map(str, arguments), "--json"]) == status
    captured = capsys.readouterr()
    if status and not captured.out:
        return captured.err
    return json.loads(captured.out)


def damage(run: Path, step: int) -> None:
    file = Store.of_run(run).path(step) / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def test_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Store.of_run(run).quarantine(20)
    result = ckpt(capsys, "list", run)
    assert [row["step"] for row in result["checkpoints"]] == [10, 30]
    assert result["bad"] == ["step_00000020.bad"]
    row = result["checkpoints"][0]
    assert (row["attempt"], row["topology"], row["code_version"]) == (1, TOPOLOGY, "0.1.0+abc")
    assert row["bytes"] == sum(f.stat().st_size for f in Store.of_run(run).path(10).rglob("*") if f.is_file())


def test_show(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = ckpt(capsys, "show", f"{run}@20")
    assert result["step"] == 20 and result["provenance"]["topology"] == TOPOLOGY
    assert result["parameters"] == {"total": 40, "text": 12, "image": 8, "shared": 20}
    tensors = {tensor["name"]: tensor for tensor in result["tensors"]}
    assert tensors["embedding.weight"] == {
        "name": "embedding.weight",
        "shape": [4, 5],
        "dtype": "bfloat16",
        "bytes": 40,
    }
    assert len(tensors) == 4
    assert ckpt(capsys, "show", run)["step"] == 30
    assert "no checkpoint of step 99" in ckpt(capsys, "show", f"{run}@99", status=4)
    (Store.of_run(run).path(30) / ".metadata").write_bytes(b"x")
    assert ".metadata has 1 bytes" in ckpt(capsys, "show", run, status=4)


def test_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ckpt(capsys, "verify", run)["whole"] is True
    damage(run, 20)
    result = ckpt(capsys, "verify", run, status=4)
    assert [row["whole"] for row in result["checkpoints"]] == [True, False, True]
    assert result["checkpoints"][1]["problems"] == ["__0_0.distcp has another content than what was written"]
    assert Store.of_run(run).steps() == [10, 20, 30]  # nothing is renamed
    assert ckpt(capsys, "verify", f"{run}@30")["whole"] is True
    (Store.of_run(run).path(30) / MANIFEST).unlink()
    assert ckpt(capsys, "verify", f"{run}@30", status=4)["checkpoints"][0]["problems"] == [f"{MANIFEST} is missing"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys `ours` and `theirs`, one with a passphrase, and a file of allowed signers that has ours."""
    folder = tmp_path_factory.mktemp("keys")
    if shutil.which("ssh-keygen") is None:
        pytest.skip("there is no ssh-keygen")
    for name, passphrase in (("ours", ""), ("theirs", ""), ("locked", "passphrase")):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", name, "-f", str(folder / name)]
        subprocess.run(command, check=True, timeout=300)
    signer = f'release@us namespaces="{signing.NAMESPACE}" {(folder / "ours.pub").read_text()}'
    (folder / "signers").write_text(signer)
    return folder


def test_sign_and_verify(run: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = ckpt(capsys, "sign", run, "--key", keys / "ours")
    assert [row["step"] for row in result["signed"]] == [10, 20, 30]
    assert ckpt(capsys, "verify", run)["whole"] is True  # the signature is no extra file
    result = ckpt(capsys, "verify", run, "--signers", keys / "signers")
    assert result["whole"] is True and {row["signer"] for row in result["checkpoints"]} == {"release@us"}
    assert ckpt(capsys, "list", run)["checkpoints"][0]["files"] > 3


@pytest.mark.parametrize("attack", ["unsigned", "another key", "another checkpoint's", "a manifest that fits", "bytes"])
def test_what_is_not_signed_is_not_taken(
    run: Path, keys: Path, attack: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Digests find accidents; whoever can write into the folder writes a manifest that fits, and no signature."""
    folder, other = Store.of_run(run).path(20), Store.of_run(run).path(10)
    ckpt(capsys, "sign", f"{run}@20", "--key", keys / ("theirs" if attack == "another key" else "ours"))
    ckpt(capsys, "sign", f"{run}@10", "--key", keys / "ours")
    said = "its signature does not fit"
    if attack == "unsigned":
        (folder / SIGNATURE).unlink()
        said = "it is not signed"
    elif attack == "another key":
        said = "no signer in"
    elif attack == "another checkpoint's":
        shutil.copyfile(other / SIGNATURE, folder / SIGNATURE)
    elif attack == "bytes":
        (folder / SIGNATURE).write_bytes(b"garbage")
        said = "no signer in"
    else:
        damage(run, 20)
        manifest = integrity.read_manifest(folder)
        files = integrity.digests(folder, manifest.files)
        (folder / MANIFEST).write_text(dataclasses.replace(manifest, files=files).text())
        assert ckpt(capsys, "verify", f"{run}@20")["whole"] is True  # so much for digests
    result = ckpt(capsys, "verify", f"{run}@20", "--signers", keys / "signers", status=4)
    (row,) = result["checkpoints"]
    assert said in row["problems"][-1] and row["signer"] == "" and not row["whole"]


def test_keys_that_cannot_sign(run: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no key" in ckpt(capsys, "sign", run, "--key", keys / "none", status=2)
    assert "cannot sign" in ckpt(capsys, "sign", run, "--key", keys / "locked", status=2)
    assert "allowed signers" in ckpt(capsys, "verify", run, "--signers", keys / "none", status=2)
    damage(run, 20)
    assert "step 20 of" in ckpt(capsys, "sign", run, "--key", keys / "ours", status=4)
    assert not list(run.rglob("*.sig"))


def test_diff(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = ckpt(capsys, "diff", run, f"{run}@30")
    assert same["equal"] is True and same["max_abs"] == 0.0 and len(same["tensors"]) == 4
    apart = ckpt(capsys, "diff", f"{run}@10", f"{run}@30")
    rows = {row["name"]: row for row in apart["tensors"]}
    text = rows["decoder.layers.0.mlp.experts.text.w1"]
    assert (text["max_abs"], text["max_rel"], text["equal"]) == (20.0, 2.0, False)
    assert rows["embedding.weight"]["equal"] is True
    assert (apart["equal"], apart["max_abs"]) == (False, 20.0)
    assert len(ckpt(capsys, "diff", f"{run}@10", f"{run}@30", "--weights")["tensors"]) == 3
    damage(run, 10)
    assert "is damaged" in ckpt(capsys, "diff", f"{run}@10", run, status=4)


def test_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run, 30)
    result = ckpt(capsys, "prune", run, "--keep", 1)
    assert result["deleted"] == [] and result["verified"] == [10, 20]  # two whole ones stay
    shutil.rmtree(Store.of_run(run).path(30))
    assert ckpt(capsys, "prune", run, "--keep", 2)["deleted"] == []
    damage(run, 20)
    assert "1 of 2 checkpoints" in ckpt(capsys, "prune", run, "--keep", 1, status=4)
    assert Store.of_run(run).steps() == [10, 20]


def test_prune_deletes_the_oldest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = ckpt(capsys, "prune", run, "--keep", 2)
    assert result["deleted"] == [10] and result["kept"] == [20, 30]


@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("command", [("show", "{run}@10"), ("diff", "{run}@10", "{run}"), ("verify", "{run}@10")])
def test_deleted_while_it_is_read(
    command: tuple[str, ...], after: int, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run deletes its oldest checkpoint when it saves: that is said, and is not called damage."""
    digest, read = integrity.digest, []

    def hashed(file: Path) -> integrity.FileRecord:
        if "00000010" in str(file):
            read.append(file)
        if len(read) == after and "00000010" in str(file) and file.exists():
            shutil.rmtree(file.parent)
        return digest(file)

    monkeypatch.setattr(integrity, "PAUSES_S", (0.0,))
    if after:
        monkeypatch.setattr(integrity, "digest", hashed)
    else:
        manifest = integrity.read_manifest
        monkeypatch.setattr(
            integrity, "read_manifest", lambda folder: (manifest(folder), shutil.rmtree(folder, ignore_errors=True))[0]
        )
    status = main(["ckpt", *(word.format(run=run) for word in command), "--json"])
    said = capsys.readouterr().err
    if status == 0:  # all was read before
        assert command[0] == "show" and after == 3
    else:
        assert status == 4 and "step_00000010 was deleted while it was read" in said and "damaged" not in said


def save_as(store: Store, step: int, content: Path) -> None:
    """What a run does when it saves, with the files of another checkpoint."""
    folder = store.temporary(step, 1)
    shutil.copytree(content, folder, ignore=shutil.ignore_patterns(MANIFEST))
    manifest = dataclasses.replace(integrity.read_manifest(content), step=step)
    store.commit(manifest)
    store.prune(3, verified=store.steps())


def keep_saving(run: Path, content: Path, ended: Event, problems: Queue[str]) -> None:
    store, step = Store.of_run(run), 30
    while not ended.wait(0.02):
        step += 1
        try:
            save_as(store, step, content)
        except Exception as error:
            problems.put(f"step {step}: {type(error).__name__}: {error}")
            return


@pytest.fixture
def busy(run: Path, made: Path) -> Iterator[Path]:
    """The folder of a run that saves and deletes all the time, which must not fail."""
    context = multiprocessing.get_context("fork")
    ended, problems = context.Event(), context.Queue()
    process = context.Process(target=keep_saving, args=(run, Store.of_run(made).path(30), ended, problems))
    process.start()
    yield run
    ended.set()
    process.join(60)
    assert problems.empty(), problems.get()
    assert process.exitcode == 0
    left = [entry.name for entry in Store.of_run(run).root.iterdir() if entry.name.endswith((".deleted", ".tmp"))]
    assert left == []


@pytest.mark.parametrize("command", ["list", "verify", "prune --keep 2", "show"])
def test_beside_a_run_that_saves(command: str, busy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They meet whole checkpoints, or say that one was deleted meanwhile."""
    name, *options = command.split()
    for _ in range(8):
        status = main(["ckpt", name, str(busy), *options])
        said = capsys.readouterr()
        assert status == 0 or "was deleted while it was read" in said.err, said


def test_prune_verifies_what_a_run_saves_meanwhile(
    run: Path, made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run replaces all its checkpoints while the first is hashed."""
    store, verify = Store.of_run(run), integrity.verify
    content = Store.of_run(made).path(30)

    def slow(folder: Path, **options: Any) -> list[str]:
        if store.steps()[-1] == 30:
            for step in (40, 50, 60):
                save_as(store, step, content)
        return verify(folder, **options)

    monkeypatch.setattr(integrity, "verify", slow)
    result = ckpt(capsys, "prune", run, "--keep", 2)
    assert (result["verified"], result["deleted"], result["kept"]) == ([50, 60], [40], [50, 60])


def test_average(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = ckpt(capsys, "average", f"{run}@10", f"{run}@20", f"{run}@30", tmp_path / "mean")
    assert (result["step"], result["contents"], result["tensors"]) == (30, "weights", 3)
    assert sum(result["coefficients"]) == pytest.approx(1.0)
    found = ckpt(capsys, "show", tmp_path / "mean", "--tensor", "text.w1")
    assert found["values"] == [[20.0] * 3] * 4 and found["std"] == 0.0
    assert ckpt(capsys, "show", tmp_path / "mean", "--tensor", "embedding.weight")["dtype"] == "bfloat16"
    ema = ckpt(capsys, "average", f"{run}@10", f"{run}@20", f"{run}@30", tmp_path / "ema", "--ema", 0.5)
    assert ema["coefficients"] == [0.25, 0.25, 0.5] and ema["origin"]["ema"] == 0.5
    assert ckpt(capsys, "show", tmp_path / "ema", "--tensor", "text.w1", "--slice", "3,0")["values"] == 22.5
    assert [parent["step"] for parent in ckpt(capsys, "show", tmp_path / "ema")["provenance"]["origin"]["parents"]] == [
        10,
        20,
        30,
    ]


def test_average_of_other_vocabularies(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Store.of_run(run).path(20)
    info = json.loads((folder / INFO).read_text())
    info["shape"]["vocab.modalities"] = [["text", 8], ["sound", 8]]
    (folder / INFO).write_text(json.dumps(info))
    files = integrity.digests(folder, integrity.sizes(folder))
    manifest = integrity.read_manifest(folder)
    (folder / MANIFEST).write_text(integrity.CheckpointManifest(**{**vars(manifest), "files": files}).text())
    said = ckpt(capsys, "average", f"{run}@10", f"{run}@20", tmp_path / "mean", status=4)
    assert "hold different models: vocab.modalities is" in said and "one vocabulary" in said
    damage(run, 30)
    assert "is damaged" in ckpt(capsys, "average", f"{run}@10", f"{run}@30", tmp_path / "mean", status=4)
    assert not Store.of_run(tmp_path / "mean").steps()


@pytest.mark.parametrize("command", ["list", "show", "verify"])
def test_a_folder_that_is_no_run(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = ckpt(capsys, command, tmp_path, status=4)
    assert "has no folder checkpoints/" in said and "fix: name a run folder" in said


@pytest.mark.parametrize("arguments", [("list",), ("show",), ("verify",), ("diff",), ("prune", "--keep", "2")])
def test_people_get_text(run: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    command, *options = arguments
    folders = [run, f"{run}@10"] if command == "diff" else [run]
    assert main(["ckpt", command, *map(str, folders), *options]) == 0
    out = capsys.readouterr().out
    expected = {
        "list": "2 ranks",
        "show": "12 text, 8 image, 20 shared",
        "verify": "step 30: intact",
        "diff": "2 of 4 tensors are equal bit by bit",
        "prune": "20, 30",
    }
    assert expected[command] in out


def test_a_checkpoint_that_is_deleted_while_it_is_read(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has deleted step 40 after its name was read: `list` leaves it out, others say so."""
    known = Store.steps
    monkeypatch.setattr(Store, "steps", lambda store: [*known(store), 40])
    assert [one["step"] for one in ckpt(capsys, "list", run)["checkpoints"]] == [10, 20, 30]
    with pytest.raises(integrity.DeletedError, match="was deleted while it was read"):
        integrity.refuse_world_writable(Store.of_run(run).path(40))
