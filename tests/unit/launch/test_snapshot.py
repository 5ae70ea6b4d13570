"""The archive of the code that a launch leaves, and that its ranks import from."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from launch import snapshot
from mmscale.errors import LaunchError

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("snapshot") / "code.zip"
    snapshot.write(file)
    return file


def ran(archive: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = {"PYTHONPATH": str(archive), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | path | variables, capture_output=True, text=True
    )


def test_every_file_of_the_packages_is_in_it_but_benchmarks_and_the_local_cluster(archive: Path) -> None:
    names = {name for name in zipfile.ZipFile(archive).namelist() if not name.endswith(".pyc")}
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *snapshot.PACKAGES]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git checkout")
    wanted = {name for name in tracked.stdout.split() if (ROOT / name).exists()}
    left_out = {name for name in wanted if name.startswith(("mmscale/bench/", "slurm/local/"))}
    assert left_out
    assert wanted - left_out <= names
    assert not left_out & names


def test_python_imports_byte_code_from_it_and_shows_its_paths(archive: Path) -> None:
    script = (
        "import launch.policy as one, mmscale.errors as two; print(one.__file__, one.__cached__); "
        "print(one.decide.__code__.co_filename); import inspect; print(inspect.getsource(two.MmscaleError)[:5])"
    )
    where, shown, source = ran(archive, "-c", script).stdout.splitlines()
    assert where.split()[0] == f"{archive}/launch/policy.pyc"
    assert shown == f"{archive}/launch/policy.py"
    assert source == "class"


def test_another_version_of_python_takes_the_sources(archive: Path, tmp_path: Path) -> None:
    """As in a container: its byte code has another magic number."""
    other = tmp_path / "code.zip"
    with zipfile.ZipFile(archive) as read, zipfile.ZipFile(other, "w") as written:
        for name in read.namelist():
            content = read.read(name)
            written.writestr(name, b"\0\0\r\n" + content[4:] if name.endswith(".pyc") else content)
    ended = ran(other, "-c", "import launch.policy; print(launch.policy.__file__)")
    assert ended.stdout.strip() == f"{other}/launch/policy.py", ended.stderr


def test_data_of_the_packages_is_read_from_it(archive: Path) -> None:
    script = (
        "from importlib import resources; print((resources.files('mmscale.report') / 'assets/page.html').is_file())"
    )
    assert ran(archive, "-c", script).stdout.strip() == "True"


def test_a_module_that_does_not_parse_is_refused_at_the_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mmscale").mkdir()
    (tmp_path / "mmscale" / "__init__.py").write_text("def :\n")
    monkeypatch.setattr(snapshot.mmscale, "__file__", str(tmp_path / "mmscale" / "__init__.py"))
    with pytest.raises(LaunchError, match=r"__init__.py does not parse: invalid syntax"):
        snapshot.write(tmp_path / "code.zip", ["mmscale"])
    assert not (tmp_path / "code.zip").exists()
