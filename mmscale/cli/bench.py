# `mmscale bench NAME [CONFIG] [--option value ...]`: calls run() of mmscale/bench/NAME.py with the options it takes.
# A new benchmark needs one line here; its options are its function's arguments.
"""Benchmark commands."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import typer

from mmscale.cli.output import Json, emit, pairs
from mmscale.errors import UsageError

app = typer.Typer(help="Measure throughput.", no_args_is_help=True)
_LOOSE = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(
    "step",
    context_settings=_LOOSE,
    epilog="Example: mmscale bench step --hidden 512 --seq 1024 --layers 4 --repeats 20",
)
def step(context: typer.Context, as_json: Json = False) -> None:
    """Time training steps: [CONFIG [KEY=VALUE]...] and options of the benchmark as --name value."""
    _bench("step", context.args, as_json=as_json)


@app.command(
    "checkpoint",
    context_settings=_LOOSE,
    epilog="Example: mmscale bench checkpoint --gigabytes 1 --nproc 2 --repeats 5",
)
def checkpoint(context: typer.Context, as_json: Json = False) -> None:
    """Time saves beside megatron-core's and torch's own; loading, archive, memory. Options as --name value."""
    _bench("checkpoint", context.args, as_json=as_json)


@app.command("gpu", context_settings=_LOOSE, epilog="Example: mmscale bench gpu --part 1 --out gpu-1.json")
def gpu(context: typer.Context, as_json: Json = False) -> None:
    """Measure one GPU: experts, FP8, stacks of layers, and whether they are right. Options as --name value."""
    _bench("gpu", context.args, as_json=as_json)


@app.command(
    "experts",
    context_settings=_LOOSE,
    epilog="Example: mmscale bench experts --hidden 512 --ffn 1408 --experts 4 --rows 512",
)
def experts(context: typer.Context, as_json: Json = False) -> None:
    """Time the ways to compute experts (model.experts.compute) beside their floor. Options as --name value."""
    _bench("experts", context.args, as_json=as_json)


@app.command("footprint", context_settings=_LOOSE, epilog="Example: mmscale bench footprint configs/quickstart.yaml")
def footprint(context: typer.Context, as_json: Json = False) -> None:
    """Compare the memory of a real step, counted by tensors, with what `mmscale plan` says: CONFIG [KEY=VALUE]..."""
    _bench("footprint", context.args, as_json=as_json)


@app.command(
    "fp8-stability",
    context_settings=_LOOSE,
    epilog="Example: mmscale bench fp8-stability --steps 200 --seeds 2 --lrs 4e-3,1.6e-2,6.4e-2",
)
def fp8_stability(context: typer.Context, as_json: Json = False) -> None:
    """Train a toy in bf16 and emulated FP8 over learning rates and seeds; sharpness of the loss. Options as --name."""
    _bench("fp8-stability", context.args, as_json=as_json, home="mmscale.bench.fp8_stability")


@app.command("data", context_settings=_LOOSE, epilog="Example: mmscale bench data configs/quickstart.yaml --repeats 3")
def data(context: typer.Context, as_json: Json = False) -> None:
    """Compare packing schemes: [CONFIG [KEY=VALUE]...] and options of the benchmark as --name value."""
    _bench("data", context.args, as_json=as_json)


@app.command("convert", context_settings=_LOOSE, epilog="Example: mmscale bench convert --hidden 512 --repeats 5")
def convert(context: typer.Context, as_json: Json = False) -> None:
    """Time the export to Hugging Face beside a plain copy, and the exported model's generation beside a dense one."""
    _bench("convert", context.args, as_json=as_json, home="checkpoints_tools.bench_convert")


def _bench(name: str, arguments: Sequence[str], *, as_json: bool, home: str = "") -> None:
    module = importlib.import_module(home or f"mmscale.bench.{name}")
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
    """A number, true or false, a tuple of those written with commas, or text."""
    from mmscale.config.values import parse_integer

    if "," in text:
        return tuple(_value(part) for part in text.split(",") if part)
    return {"true": True, "false": False}.get(text, parse_integer(text))
