"""A secret in the environment of a run is in nothing that the run leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.running import mmscale

CANARY = "canary-7d1f0e5a9c"
NAMES = (
    *("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "PGPASSWORD"),
    *("SLURM_JWT", "MMSCALE_ANYTHING", "MY_COMPANY_PASSWORD", "no_proxy"),
)


def holding(root: Path, needle: bytes) -> list[str]:
    """Files below a folder whose name or content holds it."""
    return [
        str(path.relative_to(root))
        for path in root.rglob("*")
        if needle.decode() in path.name or (path.is_file() and needle in path.read_bytes())
    ]


def test_no_artefact_holds_a_secret(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs, configurations, environment record, checkpoints, archives, reports: grepped as bytes, all of them."""
    for name in NAMES:
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    settings = [f"run.dir={tmp_path}", "train.steps=6", "checkpoint.every=2", "log.tensorboard=true"]
    run = tmp_path / "tiny"
    said = []
    commands: list[tuple[int, int, list[str | Path]]] = [  # exit status, ranks, arguments
        (0, 2, ["train", config, *settings]),
        (0, 1, ["ckpt", "archive", run, tmp_path / "made.zarr"]),
        (0, 1, ["report", run, "--out", tmp_path / "curves.png"]),
        (0, 1, ["ckpt", "show", run, "--json"]),
        (2, 1, ["train", config, *settings, "optim.lr=-1"]),
        (3, 1, ["eval", run, "--data", tmp_path / "nothing"]),
        (0, 1, ["doctor", "--json"]),
    ]
    for status, ranks, arguments in commands:
        ended = mmscale(*arguments, nproc=ranks)
        assert ended.status == status, (arguments, ended)
        said.append(ended.out + ended.err + ended.others)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and all(
        any(path.name == name for path in files)
        for name in ("environment.json", "metrics.jsonl", "events.jsonl", "config.yaml", "MANIFEST.json")
    )
    assert holding(tmp_path, CANARY.encode()) == []
    assert not any(CANARY in text for text in said)
    assert [path for path in files if path.stat().st_mode & 0o6113] == []  # nothing runs, and only its owner writes
    (tmp_path / "leak").write_bytes(b"\0" + CANARY.encode())  # the search finds what is there
    assert holding(tmp_path, CANARY.encode()) == ["leak"]
