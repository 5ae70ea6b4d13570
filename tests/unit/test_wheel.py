"""What is shipped: files of the packages, nothing that lies about beside them, no secret, no odd rights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from launch import snapshot

ROOT = Path(__file__).resolve().parents[2]
CANARY = "canary-3b9d77c1e4"
PACKAGES = ("mmscale", "launch", "slurm", "checkpoints_tools")
SUFFIXES = {".py", ".typed", ".json", ".sbatch", ".html", ".css", ".js", ".yaml", ".md"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built of a copy in which secrets lie about, by a process that has some in its environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for place in (source, source / "mmscale", source / "mmscale" / "data"):
        for name in (".env", "id_ed25519", "secret.txt", "credentials.yaml", "core.1234", ".netrc"):
            (place / name).write_text(CANARY)
    environment = os.environ | {"HF_TOKEN": CANARY, "PYPI_PASSWORD": CANARY, "PIP_NO_INDEX": "1"}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder), "."]
    ended = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=300)
    if ended.returncode != 0 and not os.environ.get("CI") and "setuptools" in ended.stderr:
        pytest.skip("setuptools is not installed")
    assert ended.returncode == 0, ended.stderr
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_files(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == set(PACKAGES)
    assert {Path(name).suffix for name in names} <= SUFFIXES
    sources = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    left_out = {name for name in sources if name.startswith(tuple(f"{folder}/" for folder in snapshot.LEFT_OUT))}
    assert len({Path(name).parent for name in left_out}) == len(snapshot.LEFT_OUT)
    assert {name for name in names if name.endswith(".py")} == sources - left_out, "equal to what a launch snapshots"
    presets = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mmscale" / "presets").rglob("*")
        if path.suffix in (".yaml", ".md")
    }
    assert presets and "mmscale/presets/quickstart/write_documents.py" in names
    assert {name for name in names if Path(name).suffix in (".yaml", ".md")} == presets


def test_benchmarks_need_a_checkout(installed: Path, tmp_path: Path) -> None:
    """Also their help works without one."""
    ended = subprocess.run([str(installed), "bench", "step"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [
        "error: the benchmarks are not part of the installed package",
        "  fix: run `mmscale bench` from a checkout of the repository, installed with `pip install -e .`",
    ]
    assert "fp8-stability" in run(installed, "bench", "--help", folder=tmp_path)


def test_no_secret_and_no_path_of_the_builder(wheel: zipfile.ZipFile) -> None:
    needles = [CANARY.encode(), str(Path.home()).encode() + b"/", str(ROOT).encode()]
    found = [name for name in wheel.namelist() for needle in needles if needle in wheel.read(name)]
    assert found == []
    assert not any(CANARY in name for name in wheel.namelist())


def test_rights(wheel: zipfile.ZipFile) -> None:
    """Not everybody may write, and nothing gets more rights than its caller has."""
    for entry in wheel.infolist():
        mode = entry.external_attr >> 16
        assert mode & 0o6002 == 0, (entry.filename, oct(mode))


@pytest.fixture(scope="module")
def installed(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command in a new environment that has the wheel, and the packages of this one but not this checkout."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python3*/site-packages")
    with zipfile.ZipFile(str(wheel.filename)) as files:
        files.extractall(packages)
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    command = folder / "bin" / "mmscale"
    # As pip writes it: processes that it starts import it, too.
    lines = ["from mmscale.cli import main", "if __name__ == '__main__':", "    raise SystemExit(main())"]
    command.write_text("\n".join([f"#!{folder}/bin/python", *lines, ""]))
    command.chmod(0o755)
    return command


def run(command: Path, *arguments: str, folder: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run(
        [str(command), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, (arguments, ended.stderr)
    return ended.stdout


@pytest.mark.long
def test_a_folder_of_its_own_without_the_clone(installed: Path, tmp_path: Path) -> None:
    """`init`, then the data set, a few steps and the batch script, where another package is called `launch`."""
    run(installed, "init", "own", "--preset", "own-data", folder=tmp_path)
    own = tmp_path / "own"
    lines = []
    for number in range(40):
        image = Image.new("RGB", (32, 32), (6 * number, 80, 255 - 6 * number))
        image.putpixel((number % 32, 16), (255, 255, 255))
        (own / "images").mkdir(exist_ok=True)
        image.save(own / "images" / f"{number}.png")
        parts = [{"type": "text", "text": f"colour {number}"}, {"type": "image", "path": f"images/{number}.png"}]
        lines.append(json.dumps({"id": str(number), "content": parts}))
    (own / "documents.jsonl").write_text("\n".join(lines) + "\n")
    small = ["train.steps=2", "optim.warmup=1", "train.eval_batches=1", "checkpoint.every=2", "log.tensorboard=false"]
    run(installed, "data", "prepare", "configs/own.yaml", "--out", "data/own", folder=own)
    run(installed, "train", "configs/own.yaml", *small, folder=own)
    assert "step_00000002" in run(installed, "ckpt", "list", "runs/own", "--json", folder=own)


@pytest.mark.long
def test_the_quickstart_without_the_clone(installed: Path, tmp_path: Path) -> None:
    """`init`, the program that it writes, and what is prepared by several processes."""
    run(installed, "init", "quickstart", "--preset", "quickstart", folder=tmp_path)
    folder = tmp_path / "quickstart"
    run(installed.parent / "python", "write_documents.py", "--out", "data/digits-documents", folder=folder)
    run(installed, "data", "prepare", "configs/quickstart.yaml", "--out", "data/digits", folder=folder)
    manifest = json.loads((folder / "data/digits/manifest.json").read_text())
    assert [task["name"] for task in manifest["tasks"]] == ["digit"]
    documents = {name: sum(part["documents"] for part in own["parts"]) for name, own in manifest["splits"].items()}
    assert documents == {"train": 14980, "validation": 598}
