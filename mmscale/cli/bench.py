"""Benchmark commands.

`mmscale bench NAME [CONFIG] [--option value ...]`: calls run() of mmscale/bench/NAME.py with its options. A new
benchmark needs one entry here; its options are the arguments of its function.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand

from mmscale.cli.output import Json, emit, pairs
from mmscale.errors import UsageError

app = typer.Typer(
    help="Measure speed, memory and numbers of parts of mmscale. `mmscale bench NAME --help` lists the options "
    "of a benchmark.",
    no_args_is_help=True,
)


class _Benchmark(NamedTuple):
    """A command of the group.

    Attributes:
        name: of the command.
        help: what it measures, and its arguments.
        example: its arguments in an example.
        home: module with `run` and, if the result is more than pairs, `render`; default: mmscale.bench.NAME.
    """

    name: str
    help: str
    example: str
    home: str = ""


_BENCHMARKS = (
    _Benchmark(
        "step",
        "Time training steps: [CONFIG [KEY=VALUE]...] and options of the benchmark as --name value.",
        "--hidden 512 --seq 1024 --layers 4 --repeats 20",
    ),
    _Benchmark(
        "calibrate",
        "Measure this machine in a minute for `mmscale plan --gpu FILE.json`; with --others 1 also compare predictions "
        "with steps. Options as --name value.",
        "--out measured.json",
    ),
    _Benchmark(
        "checkpoint",
        "Time saves beside megatron-core's and torch's own, and loading, archives and snapshots in memory. Options as "
        "--name value.",
        "--gigabytes 1 --nproc 2 --repeats 5",
    ),
    _Benchmark(
        "gpu",
        "Measure one GPU and check results: experts, FP8, stacks of layers. Options as --name value.",
        "--part 1 --out gpu-1.json",
    ),
    _Benchmark(
        "experts",
        "Time the implementations of experts (model.experts.compute) against a floor. Options as --name value.",
        "--hidden 512 --ffn 1408 --experts 4 --rows 512",
    ),
    _Benchmark(
        "footprint",
        "Compare a real step's memory, by tensors, with the prediction of `mmscale plan`: CONFIG [KEY=VALUE]... or "
        "--cases.",
        "configs/quickstart.yaml",
    ),
    _Benchmark(
        "fp8-stability",
        "Train a toy model in bf16 and in emulated FP8 with several learning rates and seeds, and compare losses and "
        "their sharpness. Options as --name value.",
        "--steps 200 --seeds 2 --lrs 4e-3,1.6e-2,6.4e-2",
        home="mmscale.bench.fp8_stability",
    ),
    _Benchmark(
        "optim",
        "Train with each optimizer in turns: held-out loss after equal steps, CPU time of a step and of its update. "
        "[CONFIG [KEY=VALUE]...] and options as --name value.",
        "--steps 200 --seeds 3 --data data/digits",
    ),
    _Benchmark(
        "data",
        "Compare packing schemes: [CONFIG [KEY=VALUE]...] and options of the benchmark as --name value.",
        "configs/quickstart.yaml --repeats 3",
    ),
    _Benchmark(
        "routing",
        "Count tokens that no expert takes, by capacity rule, scope and ranking, with random routers. Options as "
        "--name value.",
        "--micro-batch 4 --experts 4",
    ),
    _Benchmark(
        "context",
        "Count how evenly splits of sequences share work among context-parallel ranks. Options as --name value.",
        "--seq-length 32768 --sizes 4,8",
    ),
    _Benchmark(
        "convert",
        "Time the export to Hugging Face against a plain copy, and the exported model's generation against a dense "
        "one.",
        "--hidden 512 --repeats 5",
        home="mmscale.bench.conversion",
    ),
)


class BenchCommand(TyperCommand):
    """A command of the group; its help lists the benchmark's options, which are read from the source."""

    def options(self) -> dict[str, str]:
        """Meanings by option, e.g. `--repeats 5`, with the default value."""
        return documented_options(HOMES[str(self.name)])

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help with the options; torch is not imported."""
        short, options = self.help, self.options()
        if options:
            lines = "\n".join(f"{option}: {meaning}" for option, meaning in options.items())
            self.help = f"{short}\n\n\b\nOptions of the benchmark, with their defaults:\n{lines}"
        super().format_help(ctx, formatter)
        self.help = short


def documented_options(home: str) -> dict[str, str]:
    """Options of a benchmark, with their defaults, and their meanings, from the docstring of its function `run`.

    Args:
        home: its module; nothing is returned if it is missing, as in a wheel.
    """
    found = importlib.util.find_spec("mmscale.bench") and importlib.util.find_spec(home)
    if not found or not found.origin:
        return {}
    body = ast.parse(Path(found.origin).read_text()).body
    run = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == "run")
    arguments = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", ast.get_docstring(run) or "", flags=re.MULTILINE | re.DOTALL)
    meanings = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", arguments[1] if arguments else "", re.MULTILINE))
    given = zip(run.args.kwonlyargs, run.args.kw_defaults, strict=True)
    return {
        f"--{one.arg.replace('_', '-')} {_shown(default)}".rstrip(): " ".join(meanings.get(one.arg, "").split())
        for one, default in given
        if one.arg != "config"
    }


def _shown(default: ast.expr | None) -> str:
    """A default value as it would be written on the command line; empty: a switch, nothing, or a name."""
    if default is None:
        return ""
    try:
        value = ast.literal_eval(default)
    except ValueError:
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None or isinstance(value, bool) else str(value)


def _add(benchmark: _Benchmark) -> None:
    @app.command(
        benchmark.name,
        cls=BenchCommand,
        help=benchmark.help,
        epilog=f"Example: mmscale bench {benchmark.name} {benchmark.example}",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def command(context: typer.Context, as_json: Json = False) -> None:
        _bench(benchmark.name, HOMES[benchmark.name], context.args, as_json=as_json)


HOMES = {one.name: one.home or f"mmscale.bench.{one.name}" for one in _BENCHMARKS}
for _benchmark in _BENCHMARKS:
    _add(_benchmark)


def _bench(name: str, home: str, arguments: Sequence[str], *, as_json: bool) -> None:
    module = _module(home)
    values, options = split_options(name, arguments)
    known = {
        key: parameter
        for key, parameter in inspect.signature(module.run).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    unknown = [key for key in options if key not in known]
    loose = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(module.run).parameters.values())
    if unknown and not loose:
        takes = ", ".join(f"--{key.replace('_', '-')}" for key in known if key != "config")
        raise UsageError(f"bench {name}: no such option: --{unknown[0].replace('_', '-')}", remedy=f"it takes {takes}")
    if values:
        if "config" not in known:
            raise UsageError(f"bench {name} takes no configuration, but got {values[0]}", remedy="leave it out")
        from mmscale.config.load import load

        options["config"] = load(values[0], values[1:])
    result = module.run(**options)
    render: Callable[[Any], str] | None = getattr(module, "render", None)
    emit(result, as_json=as_json, text=lambda: typer.echo(render(result)) if render else pairs(result.items()))


def _module(home: str) -> ModuleType:
    """Import a benchmark.

    Raises:
        UsageError: this is an installed wheel, which has none.
    """
    try:
        return importlib.import_module(home)
    except ModuleNotFoundError as error:
        if error.name != "mmscale.bench":
            raise
        raise UsageError(
            "the benchmarks are not part of the installed package",
            remedy="run `mmscale bench` from a checkout of the repository, installed with `pip install -e .`",
        ) from None


def split_options(name: str, arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """`["c.yaml", "--repeats", "3", "--fast"]` -> (["c.yaml"], {"repeats": 3, "fast": True}).

    Raises:
        UsageError: an option is not written `--name`.
    """
    values: list[str] = []
    options: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            values.append(argument)
            continue
        if not argument.startswith("--") or len(argument) < 3:
            raise UsageError(f"bench {name}: {argument} is not an option", remedy="options are written --name value")
        key, equals, text = argument[2:].partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            text = rest.pop(0)
            equals = "="
        options[key.replace("-", "_")] = _value(text) if equals else True
    return values, options


def _value(text: str) -> Any:
    """A number, a boolean, a tuple of comma-separated values, or text."""
    from mmscale.config.values import parse_integer

    if "," in text:
        return tuple(_value(part) for part in text.split(",") if part)
    return {"true": True, "false": False}.get(text, parse_integer(text))
