# docs/tutorial.md: the commands of the page run, in its order, on a few generated icons; not those of Debian and SLURM.
"""The tutorial, walked."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import checkpoints_tools.huggingface.evaluate_export  # noqa: F401  what forked commands would import one by one
from tests.end_to_end.running import ROOT, mmscale

PAGE = ROOT / "docs" / "tutorial.md"
# The page's packages are replaced by pictures of this test, and its SLURM commands are those of tests/slurm.
ELSEWHERE = ("apt-get download ", "dpkg -x ", 'eval "$(python slurm/local/cluster.py up', "python slurm/local/")
ON_SLURM = ("launch", "status runs/job", "stop runs/job", "resume runs/job")
SMALL = {"train.steps=600": "train.steps=6", "train.steps=900": "train.steps=9", "optim.restart=600": "optim.restart=6"}
SMALL |= {"optim.warmup=20": "optim.warmup=1", "--budget 20m": "--budget 20s"}
SMALL |= {"train.eval_every=50": "train.eval_every=3"}
NAMES = [f"{colour} {shape}" for colour in ("red", "green", "blue", "grey") for shape in ("box", "bar", "dot", "key")]


def blocks() -> list[tuple[str, str]]:
    """Language and content of every block of code."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


def theme(folder: Path, seed: int) -> None:
    """Pictures where the package of a theme has them; two sizes, and one that the script leaves out."""
    rng = np.random.default_rng(seed)
    for number in range(4 * len(NAMES)):
        name = f"{NAMES[number % len(NAMES)]} {number // len(NAMES)}".replace(" ", "-")
        colour = rng.integers(0, 255, 3)
        for edge in (16, 22, 32):
            pixels = np.full((edge, edge, 3), 255, np.uint8)
            pixels[edge // 4 : -edge // 4, number % 8 : -edge // 4] = colour
            file = folder / f"{edge}x{edge}/places/{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(pixels).save(file)
    (folder / "32x32/places/folder.png").write_bytes(file.read_bytes())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number, name in enumerate(("Tango", "gnome")):
        theme(tmp_path / f"debian/usr/share/icons/{name}", number)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(command: str) -> str:
    """The command for a small part of the data: fewer steps, and as many settings otherwise."""
    for large, less in SMALL.items():
        command = command.replace(large, less)
    if command.startswith("mmscale train"):
        extra = ["train.eval_every=3", "auxiliary.steps=4", "auxiliary.checkpoint_every=4", "checkpoint.every=3"]
        extra += ["optim.warmup=1", "auxiliary.optim.warmup=1"]
        extra += (
            [] if "train.steps=" in command else ["train.steps=4" if "run.name=both" in command else "train.steps=9"]
        )
        command = " ".join([command, *extra, "log.every=1"])
    return command.replace("mmscale sample", "mmscale sample --count 1")


def run(line: str) -> str:
    """One command; what it printed."""
    words = shlex.split(small(line))
    if words[0] == "python":
        ended = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, (line, ended.stderr)
        return ended.stdout
    assert words[0] == "mmscale", line
    done = mmscale(*words[1:], timeout_s=600)
    assert done.status == 0, (line, done)
    return done.out + done.err


@pytest.mark.long
def test_every_command_of_the_page(place: Path) -> None:
    said: dict[str, str] = {}
    programs = []
    for language, content in blocks():
        if language == "python":
            programs.append(content)
        elif language == "json":
            json.loads(content)
        for line in content.splitlines() if not language else ():
            on_slurm = line.startswith(tuple(f"mmscale {word}" for word in ON_SLURM))
            if not line.startswith(ELSEWHERE) and not on_slurm:
                said[line] = run(line)
    assert len(said) > 20
    task = {line: text for line, text in said.items() if "--task" in line}
    assert all(re.search(r"accuracy/which .* of \d+ \(95 % interval", text) for text in task.values()), task
    trained = [text for line, text in said.items() if "train.tasks" in line]  # the run, and its stage
    assert len(trained) == 2 and all("task which: " in text and " accuracy/which " in text for text in trained)
    assert not any("this stage does not" in text for text in said.values())
    (drawn,) = (text for line, text in said.items() if "--guidance auto" in line)
    assert re.search(r"guidance [\d.]+ fits \d+ held-out items best", drawn), drawn
    (both,) = (text for line, text in said.items() if "run.name=both" in line)
    assert "data/icons 66.7%" in both and "data/gnome 33.3%" in both
    assert (place / "report.html").is_file() and (place / "drawn/samples.png").is_file()
    manifests = [json.loads((place / f"data/{name}/manifest.json").read_text()) for name in ("icons", "gnome")]
    assert manifests[0]["tokenizers"] == manifests[1]["tokenizers"]
    (program,) = programs
    assert len(program.strip().splitlines()) <= 10
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert list(place.glob("drawing-*.png"))


def test_groups_keep_the_held_out_names_out(place: Path) -> None:
    """What the page promises of its script: no name on both sides, and the same split in both themes."""
    splits: dict[str, set[str]] = {}
    for name, out in (("Tango", "icons"), ("gnome", "gnome")):
        run(f"python examples/icons/write_documents.py debian/usr/share/icons/{name} {out}")
        for line in (place / out / "documents.jsonl").read_text().splitlines():
            record = json.loads(line)
            splits.setdefault(record["group"], set()).add(record["split"])
            assert "-16.png" not in line
    assert all(len(found) == 1 for found in splits.values())
    assert {"train", "validation"} == set.union(*splits.values())
