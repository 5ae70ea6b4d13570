# The `mmscale` command: which commands exist, and how an error becomes two lines and an exit status.
# No logic: commands parse, call and print. Nothing here imports torch, so that every --help is there at once.
"""The command line. `main` is what the console script and `python -m mmscale` call."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import typer

from mmscale.cli import (
    baselines,
    bench,
    ckpt,
    compare,
    config,
    convert,
    data,
    launch,
    machine,
    report,
    sample,
    scaling,
    train,
)
from mmscale.cli.output import show_error
from mmscale.errors import MmscaleError, UsageError
from mmscale.runtime import quiet

__all__ = ["app", "main"]

_EXIT_BROKEN_PIPE = 141  # what a shell reports for a program that SIGPIPE ended

app = typer.Typer(
    name="mmscale",
    help="Pre-training of mixed-modal language models (MoMa) on PyTorch and megatron-core.",
    epilog="Start with: mmscale doctor",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("doctor", epilog="Example: mmscale doctor --run-dir /scratch/runs")(machine.doctor)
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.command("plan", epilog="Example: mmscale plan configs/moma_1b4_4t4i.yaml --gpus 64 --gpu-memory 80 --gpu h100")(
    machine.plan
)
app.command("train", epilog="Example: mmscale train configs/quickstart.yaml train.steps=100 --nproc 2")(train.train)
app.command("eval", epilog="Example: mmscale eval runs/quickstart@1200 --data data/digits")(train.evaluate)
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
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from mmscale import __version__

        typer.echo(__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Command line without the program's name; that of the process if None.

    Returns:
        The exit status: 0, or that of the error. Whatever is no MmscaleError is a bug and keeps its traceback.
    """
    quiet.install()
    try:
        status = app(list(sys.argv[1:] if arguments is None else arguments), prog_name="mmscale", standalone_mode=False)
        sys.stdout.flush()  # here a reader that has gone is still caught
    except MmscaleError as error:
        if os.environ.get("MMSCALE_DEBUG") == "1":
            traceback.print_exc()
        show_error(error)
        return error.exit_status
    except typer.TyperException as error:  # typer's own: unknown option, missing argument, value of the wrong type
        if error.format_message():  # a group without a command has printed its help and has nothing to add
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
        # The interpreter flushes stdout once more at exit, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE
    return status if isinstance(status, int) else 0


def _not_permitted(error: PermissionError) -> MmscaleError:
    """Another user's folder, usually: launch folders are closed to others."""
    place = error.filename or "a file"
    return MmscaleError(
        f"no permission to use {place}", remedy=f"ask its owner for `chmod -R g+rX {place}`, or work on a copy"
    )


def _usage_error(error: typer.TyperException) -> UsageError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "mmscale"
    option = str(getattr(error, "option_name", "") or "")
    cause = error.format_message().rstrip(".")
    cause, _, meant = cause.partition(". Did you mean ")  # how typer puts it for commands
    remedy = f"did you mean {meant}" if meant else f"`{command} --help` shows what there is"
    near = sorted(getattr(error, "possibilities", None) or [])
    if "." in option:
        remedy = f"settings are written without dashes: {option.lstrip('-')}=VALUE"
    elif near:
        cause = str(getattr(error, "message", cause))
        remedy = f"did you mean {' or '.join(near)}?"
    return UsageError(cause, remedy=remedy)
