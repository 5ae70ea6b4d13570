"""The example that every command's `--help` gives, as it is written: run where nothing has to be trained, else parsed.

A shell expands the words. What commands compute is tested elsewhere.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from mmscale.cli import app, main
from mmscale.cli.bench import _BENCHMARKS
from mmscale.config.load import load
from tests.unit.report import test_compare, test_scaling
from tests.unit.test_cli import commands

CONFIGS = Path(__file__).parents[2] / "configs"
SETTING = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+=")
# Every other command's example is parsed only, for this reason.
NOT_RUN = {
    "doctor": "test_cli_commands.py does, for a folder that is here",
    "train": "trains",
    "verify-layout": "trains",
    "eval": "a trained run",
    "data fit-classifier": "two data sets; test_classifier.py fits one",
    "sample": "a trained run",
    "status": "goes on until it is interrupted",
    "logs": "goes on until it is interrupted",
    "stop": "a run of a cluster",
    "resume": "a run of a cluster",
    **{
        f"ckpt {name}": "a trained run"
        for name in ("list", "show", "verify", "sign", "diff", "prune", "archive", "restore")
    },
    **{f"ckpt {name}": "a trained run" for name in ("reshard", "average", "fuse", "upcycle", "restore-bad", "sign")},
    **{f"ckpt {name}": "an object store" for name in ("mirror", "fetch")},
    **{f"convert {name}": "a trained run" for name in ("to-hf", "from-hf", "to-lm-eval")},
    **{f"bench {benchmark.name}": "takes minutes, or a GPU" for benchmark in _BENCHMARKS},
}
ALL = [" ".join(command) for command in commands()]
PROGRAM: Any = typer.main.get_command(app)


def command_of(name: str) -> Any:
    found = PROGRAM
    for word in name.split():
        found = found.commands[word]
    return found


def words_of(name: str) -> list[str]:
    """The words of a command's example behind `mmscale`, as a shell hands them over in the present folder."""
    example = (command_of(name).epilog or "").removeprefix("Example: ")
    done = subprocess.run(["sh", "-c", f"printf '%s\\0' {example}"], capture_output=True, text=True, check=True)
    program, *words = done.stdout.split("\0")[:-1]
    assert program == "mmscale"
    assert words[: len(name.split())] == name.split()
    return words


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the repository's configurations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MMSCALE_DEBUG", raising=False)
    (tmp_path / "configs").symlink_to(CONFIGS)
    return tmp_path


def corpus(folder: Path) -> None:
    (folder / "corpus").mkdir()
    for part in range(2):
        lines = [
            json.dumps({"id": f"{part}-{n}", "content": [{"type": "text", "text": f"bus {n}"}]}) for n in range(30)
        ]
        (folder / "corpus" / f"part-{part}.jsonl").write_text("\n".join(lines) + "\n")


def digits(folder: Path) -> None:
    """Of the quickstart's vocabulary, without its pictures."""
    corpus(folder)
    command = ["data", "prepare", "configs/quickstart.yaml", "data.prepare.image.kind=levels", "--out", "data/digits"]
    assert main([*command, "data.prepare.tasks={}", "--documents", "corpus/*.jsonl", "--json"]) == 0


def weighed(folder: Path) -> None:
    """A corpus, a benchmark to compare it with, and a score."""
    corpus(folder)
    second = folder / "corpus/part-1.jsonl"
    second.write_text(second.read_text().replace("bus", "tram"))
    for name, part in (("corpus", 0), ("benchmark", 1)):
        command = ["data", "prepare", "configs/quickstart.yaml", "data.prepare.image.kind=levels", "--json"]
        command.append("data.prepare.tasks={}")
        assert main([*command, "--out", f"data/{name}", "--documents", f"corpus/part-{part}.jsonl"]) == 0
    assert main(["data", "score", "data/corpus", "--by", "rules", "--json"]) == 0


def compared(folder: Path, *models: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "dense": {},
        "moma": {"kind": "moma"},
        "4t4i": {"kind": "moma"},
        "moe8x": {"kind": "moe", "experts": {"counts": {"mixed": 8}}},
    }
    for name in models:
        speedups = dict.fromkeys(test_compare.SPEEDUPS, 2.0 if settings[name] else 1.0)
        test_compare.make_run(folder / "runs" / name, test_compare.config(**settings[name]), speedups=speedups)


def scaled(folder: Path) -> None:
    for name, modalities in {"text": ("text",), "image": ("image",), "both": ("text", "image")}.items():
        for width, layers in ((64, 2), (128, 4), (256, 8), (512, 8)):
            for count in (1e8, 1e9, 1e10):
                tokens = {modality: count / len(modalities) for modality in modalities}
                test_scaling.make_run(
                    folder / "runs" / f"{name}_{width}_{count:g}", test_scaling.config(width, layers), tokens
                )


# What the example finds in its folder, and files that it leaves; words that are added to save time.
RUN: dict[str, tuple[Callable[[Path], None] | None, tuple[str, ...], tuple[str, ...]]] = {
    "config check": (None, (), ()),
    "config explain": (None, (), ()),
    "plan": (None, (), ()),
    "baselines": (None, ("baselines/quickstart_dense.yaml", "baselines/quickstart_mod_4t4i.yaml"), ()),
    "launch": (digits, (), ()),
    "init": (None, ("digits/README.md", "digits/configs/quickstart.yaml", "digits/write_documents.py"), ()),
    "data prepare": (corpus, ("data/corpus/manifest.json",), ()),
    "data inspect": (digits, (), ()),
    "data verify": (digits, (), ()),
    "data dedup": (weighed, ("data/corpus/selection/selection.json",), ("--no-held-out",)),
    "data score": (weighed, ("data/corpus/scores/rules.npy",), ()),
    "data retrieve": (weighed, ("data/corpus/neighbours/neighbours.json",), ()),
    "data select": (weighed, ("data/corpus/selection/selection.json",), ()),
    "report": (lambda folder: compared(folder, "dense", "moma"), ("report.html",), ()),
    "compare": (lambda folder: compared(folder, "dense", "4t4i", "moe8x"), ("eta.png",), ()),
    "scaling fit": (scaled, ("scaling.png",), ("--bootstrap", "2")),
}


@pytest.mark.parametrize("name", RUN)
def test_example_runs(name: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, leaves, faster = RUN[name]
    if prepare is not None:
        prepare(workplace)
    capsys.readouterr()
    status = main([*words_of(name), *faster])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert captured.out or leaves
    for file in leaves:
        assert (workplace / file).stat().st_size > 0


def test_all_examples_are_run_or_have_a_reason() -> None:
    assert sorted([*RUN, *NOT_RUN]) == sorted(ALL)


@pytest.mark.parametrize("name", ALL)
def test_example_is_parsed(name: str, workplace: Path) -> None:
    """Options, numbers, choices; settings are those of a configuration, and its files are there."""
    words = words_of(name)[len(name.split()) :]
    command = command_of(name)
    command.make_context(name, list(words))
    if not name.startswith("bench"):  # which look at their options themselves
        with pytest.raises(typer.TyperException):
            command.make_context(name, [*words, "--no-such-option"])
    settings = [word for word in words if SETTING.match(word)]
    files = [word for word in words if word.startswith("configs/")]
    if settings or files:
        load(files[0] if files else CONFIGS / "quickstart.yaml", settings)


@pytest.mark.parametrize("benchmark", _BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_example_of_a_benchmark_has_its_arguments(benchmark: Any, workplace: Path, monkeypatch: Any) -> None:
    """The command as it is, of a benchmark that measures nothing."""
    module = importlib.import_module(benchmark.home or f"mmscale.bench.{benchmark.name}")
    run, given = module.run, {}

    @functools.wraps(run)
    def noted(*arguments: Any, **options: Any) -> dict[str, Any]:
        given.update(inspect.signature(run).bind(*arguments, **options).arguments)
        return {}

    monkeypatch.setattr(module, "run", noted)
    assert main([*words_of(f"bench {benchmark.name}"), "--json"]) == 0
    assert given
    for key, value in given.items():
        default = inspect.signature(run).parameters[key].default
        kinds = {type(default), int} if isinstance(default, float) else {type(default)}
        assert default is None or type(value) in kinds, key


def test_steps_of_the_quickstart_are_kept_by_it() -> None:
    """Its run has the last checkpoints only."""
    config = load(CONFIGS / "quickstart.yaml")
    every, keep, steps = config.checkpoint.every, config.checkpoint.keep, config.train.steps
    kept = {steps, *range(steps, 0, -every)[:keep]}
    named = re.findall(r"runs/quickstart@(\d+)", " ".join(command_of(name).epilog or "" for name in ALL))
    assert named and {int(step) for step in named} <= kept
