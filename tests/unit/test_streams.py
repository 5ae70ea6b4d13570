"""`make test`, `make test-long` and `make matrices`: every test is in exactly one of them, and in one of its streams.

The streams' statuses and Ctrl-C are tried with a stand-in for pytest.
"""

from __future__ import annotations

import ast
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from tests import streams

ROOT = Path(__file__).parents[2]
INSTALLED = (".venv/.installed", ".venv/.installed-evals", ".venv/transformer-engine/.unpacked")
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/test_*.py"))
LATER = {"long", "exhaustive"}

# Files without a test in `make test`, and what tests their kind there.
NOTHING_SHORT = {
    "tests/distributed/test_archive_layouts.py": "test_archives restores and trains on; test_archive writes and reads",
    "tests/distributed/test_fp4_layouts.py": "test_fp8_layouts; test_fp4_formats",
    "tests/distributed/test_mpi.py": "test_rank_env reads the variables of MPI; test_groups",
    "tests/end_to_end/test_begun_runs.py": "test_upcycle; test_fuse",
    "tests/end_to_end/test_chat_page.py": "test_sft",
    "tests/end_to_end/test_chaos.py": "test_kills",
    "tests/end_to_end/test_comparison.py": "test_train; needs minutes",
    "tests/end_to_end/test_decoded_items.py": "test_guidance_moma; test_infilling decodes by a run and its export",
    "tests/end_to_end/test_ecosystem.py": "test_fine_tuned_export; needs packages from the index",
    "tests/end_to_end/test_gates.py": "test_convert",
    "tests/end_to_end/test_going_on_elsewhere.py": "test_going_on",
    "tests/end_to_end/test_grouped_runs.py": "test_grouped_saves; test_damage",
    "tests/end_to_end/test_launch_here.py": "test_local_job restarts real supervisors; test_kills; test_train",
    "tests/end_to_end/test_longer_sequences.py": "test_going_on changes the length; test_moma stretches positions",
    "tests/end_to_end/test_masked_neighbours.py": "test_masked_composites changes settings; test_infilling resumes",
    "tests/end_to_end/test_memory.py": "test_memory_tier",
    "tests/end_to_end/test_quickstart.py": "test_kills; test_prepare_accidents",
    "tests/end_to_end/test_resumed_versions.py": "test_train; needs an environment with other versions",
    "tests/end_to_end/test_retrieval_runs.py": "test_retrieval_layouts; test_composites resumes",
    "tests/end_to_end/test_s3_mirror.py": "test_mirrored_runs; needs a server of S3",
    "tests/slurm/test_containers.py": "test_launching; test_submit writes the commands",
    "tests/slurm/test_faults.py": "test_first_failures",
    "tests/slurm/test_interruptions.py": "test_launching requeues a job",
    "tests/slurm/test_outages.py": "test_successors; test_scheduler",
    "tests/slurm/test_preemptions.py": "test_successors preempts a job",
    "tests/slurm/test_prepare_array.py": "test_shares has the same shares without SLURM",
    "tests/slurm/test_prepare_gpus.py": "test_vq_on_gpus has the shares; test_job_arrays has what tasks ask for",
    "tests/slurm/test_slow_faults.py": "test_successors",
    "tests/slurm/test_soak.py": "test_successors",
    "tests/unit/checkpoint/test_fuzzed_indices.py": "test_tensor_index",
    "tests/unit/checkpoints_tools/huggingface/test_transformers_versions.py": "test_tested_versions; needs the index",
    "tests/unit/checkpoints_tools/huggingface/test_vllm.py": "test_conventions; needs vLLM",
    "tests/unit/data/documents/test_s3_documents.py": "test_remote_files; needs a server of S3",
}


def stand_in(folder: Path, statuses: dict[str, int], *, last: str = "") -> Path:
    """An interpreter that ends with a status chosen by the stream's cache."""
    cases = "".join(f"*cache_dir=.pytest_cache/*-{name}\\ *) status={code};; " for name, code in statuses.items())
    python = folder / "python"
    python.write_text(f'#!/bin/bash\ncase "$* " in {cases} *) status=99;; esac\n{last}\nexit $status\n')
    python.chmod(0o755)
    return python


@pytest.mark.parametrize("tier", streams.STREAMS)
@pytest.mark.parametrize(
    ("first", "second", "others", "status"),
    [
        (0, 0, 0, 0),
        (0, 5, 5, 0),  # no test chosen in some of them
        (5, 5, 0, 0),
        (5, 5, 5, 5),
        (1, 0, 0, 1),
        (0, 2, 5, 2),
        (5, 5, 1, 1),
        (5, 1, 5, 1),
        (0, 0, 3, 3),
    ],
)
def test_it_fails_if_a_stream_fails_or_none_has_tests(
    tier: str, first: int, second: int, others: int, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [stream.name for stream in streams.STREAMS[tier]]
    wanted = dict(zip(names, [first, second, *(others for _ in names[2:])], strict=True))
    python = stand_in(tmp_path, wanted, last='echo "$0 was here"')
    assert streams.run(tier, ["-x"], python=str(python), logs=tmp_path) == status
    said = capsys.readouterr().out
    assert said.count("was here") == len(names) - 1  # the first one prints by itself
    assert sorted(re.findall(r"^([\w-]+) .* s of CPU  exit status (\d+)$", said, re.MULTILINE)) == sorted(
        (name, str(code)) for name, code in wanted.items()
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_every_stream(number: signal.Signals, tmp_path: Path) -> None:
    names = [stream.name for stream in streams.STREAMS["test"]]
    # `wait` ends at once when a trapped signal arrives; behind a command in the foreground bash may lose SIGINT.
    heard = "trap 'touch heard-$$; kill $!; exit 2' INT TERM; sleep 300 & touch ready-$$; wait"
    python = stand_in(tmp_path, dict.fromkeys(names, 0), last=f"cd {tmp_path}; {heard}")
    code = f"import sys, pathlib; from tests import streams; sys.exit(streams.run('test', [], python={str(python)!r}, "
    code += f"logs=pathlib.Path({str(tmp_path)!r})))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("ready-*"))) < len(names):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, number)
    assert process.wait(timeout=120) == 2
    assert len(list(tmp_path.glob("heard-*"))) == len(names)


def _make(target: str) -> str:
    """The commands of a target, not run, as if everything were installed."""
    command = ["make", "-n", target, "PYTEST_ARGS=-x --pdb"]
    for file in INSTALLED:
        command += ["-o", file]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_and_ci_run_every_tier() -> None:
    everything = _make("test-all")
    for tier in streams.STREAMS:
        assert f"-m tests.streams {tier} -x --pdb" in everything
    assert re.search(r"-m pytest .*-m exhaustive", everything)
    assert "-m tests.streams test " in _make("test") and "tests.streams long" not in _make("test")
    assert "-m tests.streams long " in _make("test-long")
    steps = re.findall(r"^step make (\S+)", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert [step for step in steps if step in ("test", "test-long", "matrices")] == ["test", "test-long", "matrices"]


def test_every_test_is_in_one_tier() -> None:
    for long, exhaustive in itertools.product((False, True), repeat=2):
        marks = {"long": long, "exhaustive": exhaustive}
        tiers = [*streams.SELECTED.values(), "exhaustive"]  # `make matrices`
        assert sum(eval(tier, {}, marks) for tier in tiers) == 1, marks


def test_a_file_that_is_named_runs_its_long_tests() -> None:
    """Only the Makefile leaves them out: who names a file wants what is in it."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    assert options[options.index("-m") + 1] == "not exhaustive"


@pytest.mark.parametrize("tier", streams.STREAMS)
def test_every_file_is_in_one_stream(tier: str) -> None:
    taken = {stream.name: streams.arguments(stream, tier) for stream in streams.STREAMS[tier]}

    def within(file: str, paths: list[str]) -> bool:
        return any(file == path or file.startswith(f"{path}/") for path in paths)

    for arguments in taken.values():
        for path in arguments:
            assert (ROOT / path.removeprefix("--ignore=")).exists(), path
    for file in FILES:
        found = [
            name
            for name, arguments in taken.items()
            if within(file, [path for path in arguments if not path.startswith("--")])
            and not within(file, [path.removeprefix("--ignore=") for path in arguments if path.startswith("--")])
        ]
        assert len(found) == 1, (file, found)


def test_pytest_takes_the_arguments_of_a_stream(tmp_path: Path) -> None:
    """Its own list of files, of a small folder: the catch-all stream leaves out what the others run."""
    folders = {"new", *(path for stream in streams.STREAMS["test"] for path in stream.paths)}
    names = {folder: f"test_{folder.replace('/', '_')}" for folder in folders}
    for folder, name in names.items():
        (tmp_path / "tests" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / folder / f"{name}.py").write_text(
            "import pytest\n\ndef test_short(): pass\n\n@pytest.mark.long\ndef test_long(): pass\n"
        )
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n  long: x\n  exhaustive: x\naddopts = -m 'not exhaustive'\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", streams.SELECTED["test"]]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    found = [
        line
        for stream in streams.STREAMS["test"]
        for line in subprocess.run(
            [*command, *streams.arguments(stream, "test")],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        if "::" in line
    ]
    assert sorted(found) == sorted(f"tests/{folder}/{name}.py::test_short" for folder, name in names.items())


def _short(file: str) -> list[str]:
    """Names of a file's tests that have a row in `make test`, unless all rows of one are marked."""
    body = ast.parse((ROOT / file).read_text()).body
    assigned = [node for node in body if isinstance(node, ast.Assign)]
    later = {f"pytest.mark.{name}" for name in LATER}
    later |= {
        ast.unparse(node.targets[0]) for node in assigned if ast.unparse(node.value) in later
    }  # other names of them
    if "pytestmark" in later:
        return []

    def kept(node: ast.stmt) -> bool:
        marks = {ast.unparse(one) for one in getattr(node, "decorator_list", [])}
        return not marks & later

    classes = [node for node in body if isinstance(node, ast.ClassDef) and kept(node)]
    functions = [*body, *(node for one in classes for node in one.body)]
    return [
        node.name
        for node in functions
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and kept(node)
    ]


def test_every_file_has_a_test_in_make_test() -> None:
    """Or is listed here, with files that test its kind there."""
    empty = {file for file in FILES if not file.startswith("tests/gpu/") and not _short(file)}
    assert empty == set(NOTHING_SHORT)
    files = {Path(file).stem: file for file in FILES}
    for file, reason in NOTHING_SHORT.items():
        named = [name for name in re.findall(r"test_\w+", reason) if name in files]
        assert named and all(_short(files[name]) for name in named), file
