"""The command line. The console script and `python -m mmscale` call `main`.

The `mmscale` command: the list of commands, and the mapping of errors to two lines and an exit status. Commands only
parse, call and print. Nothing here imports torch, so that every --help is fast.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import typer

from mmscale.cli import (
    baselines,
    bench,
    ckpt,
    compare,
    config,
    convert,
    data,
    data_neighbours,
    data_scores,
    data_weights,
    evaluate,
    init,
    launch,
    log_level,
    machine,
    report,
    sample,
    scaling,
    train,
)
from mmscale.cli.output import show_error
from mmscale.cli.shadowed import refuse_shadowed
from mmscale.errors import MmscaleError, UsageError, shell_command
from mmscale.runtime import quiet

__all__ = ["app", "main", "parser"]

_EXIT_BROKEN_PIPE = 141  # exit status of a program that SIGPIPE ended, as in a shell

app = typer.Typer(
    name="mmscale",
    help="Pre-training of mixed-modal language models (MoMa) on PyTorch and megatron-core.",
    epilog="Start with: mmscale doctor",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("doctor", epilog="Example: mmscale doctor --run-dir /scratch/runs")(machine.doctor)
app.command("init", epilog="Example: mmscale init digits --preset quickstart")(init.init)
app.add_typer(config.app, name="config")
data.app.command("dedup", epilog="Example: mmscale data dedup data/corpus --against data/benchmark --workers 8")(
    data_weights.dedup
)
data.app.command("score", epilog="Example: mmscale data score data/corpus --by rules")(data_scores.score)
data.app.command(
    "fit-classifier", epilog="Example: mmscale data fit-classifier good.safetensors --good data/books --bad data/web"
)(data_scores.fit_classifier)
data.app.command("select", epilog="Example: mmscale data select data/corpus --by rules --top 0.2 --temperature 0.5")(
    data_weights.select
)
data.app.command("retrieve", epilog="Example: mmscale data retrieve data/corpus --neighbours 8")(
    data_neighbours.retrieve
)
app.add_typer(data.app, name="data")
app.command("plan", epilog="Example: mmscale plan configs/moma_1b4_4t4i.yaml --gpus 64 --gpu-memory 80 --gpu h100")(
    machine.plan
)
app.command("train", epilog="Example: mmscale train configs/quickstart.yaml train.steps=100 --nproc 2")(train.train)
app.command("eval", epilog="Example: mmscale eval runs/quickstart@1200 --data data/digits")(evaluate.evaluate)
app.command("sample", epilog="Example: mmscale sample runs/quickstart --prompt 'draw a seven' --out drawings")(
    sample.sample
)
app.command(
    "verify-layout", epilog="Example: mmscale verify-layout configs/quickstart.yaml parallel.tp=2 precision.dtype=fp32"
)(train.verify_layout)
app.command("launch", epilog="Example: mmscale launch configs/quickstart.yaml --cluster test --nodes 2 --dry-run")(
    launch.launch
)
app.command("status", epilog="Example: mmscale status runs/quickstart --watch 5")(launch.status)
app.command("logs", epilog="Example: mmscale logs runs/quickstart --rank 1 --follow")(launch.logs)
app.command("stop", epilog="Example: mmscale stop runs/quickstart")(launch.stop)
app.command("resume", epilog="Example: mmscale resume runs/quickstart train.steps=2000")(launch.resume)
app.command("report", epilog="Example: mmscale report runs/dense runs/moma --out report.html")(report.report)
app.command("baselines", epilog="Example: mmscale baselines configs/quickstart.yaml --out baselines")(
    baselines.baselines
)
app.command("compare", epilog="Example: mmscale compare runs/dense runs/4t4i runs/moe8x --out eta.png")(compare.compare)
app.add_typer(scaling.app, name="scaling")
app.add_typer(ckpt.app, name="ckpt")
app.add_typer(convert.app, name="convert")
app.add_typer(bench.app, name="bench")


@app.callback(invoke_without_command=True)
def _root(
    level: log_level.Level = None,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if level is not None:
        log_level.apply(level)
    if version:
        from mmscale import __version__

        typer.echo(__version__)
        raise typer.Exit


@functools.cache
def parser() -> Callable[..., Any]:
    """What parses a command line and calls its command; made once, because reading all signatures takes 0.1 s."""
    return typer.main.get_command(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Command line without the program's name; None for that of the process.

    Returns:
        The exit status: 0, or that of the error. Exceptions other than MmscaleError are bugs and keep their traceback.
    """
    quiet.install()
    try:
        refuse_shadowed()
        line = list(sys.argv[1:] if arguments is None else arguments)
        status = parser()(line, prog_name="mmscale", standalone_mode=False)
        sys.stdout.flush()  # detects a reader that has closed the pipe
    except MmscaleError as error:
        if os.environ.get("MMSCALE_DEBUG") == "1":
            traceback.print_exc()
        show_error(error)
        return error.exit_status
    except typer.TyperException as error:  # typer's errors: unknown option, missing argument, value of the wrong type
        if error.format_message():  # a group without a command has printed its help
            show_error(_usage_error(error))
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except PermissionError as error:
        if os.environ.get("MMSCALE_DEBUG") == "1":
            traceback.print_exc()
        show_error(_not_permitted(error))
        return MmscaleError.exit_status
    except BrokenPipeError:
        # The interpreter flushes stdout again at exit, which would print an error for the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE
    return status if isinstance(status, int) else 0


def _not_permitted(error: PermissionError) -> MmscaleError:
    """The error for a folder of another user, usually a launch folder, which is closed to others."""
    place = error.filename or "a file"
    return MmscaleError(
        f"no permission to use {place}",
        remedy=f"ask its owner for {shell_command('-R', 'g+rX', place, program='chmod')}, or work on a copy",
    )


def _usage_error(error: typer.TyperException) -> UsageError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "mmscale"
    option = str(getattr(error, "option_name", "") or "")
    cause = error.format_message().rstrip(".")
    cause, _, meant = cause.partition(". Did you mean ")  # typer's wording for commands
    remedy = f"did you mean {meant}" if meant else f"`{command} --help` shows the usage"
    near = sorted(getattr(error, "possibilities", None) or [])
    if "." in option:
        remedy = f"settings are written without dashes: {option.lstrip('-')}=VALUE"
    elif near:
        cause = str(getattr(error, "message", cause))
        remedy = f"did you mean {' or '.join(near)}?"
    return UsageError(cause, remedy=remedy)
