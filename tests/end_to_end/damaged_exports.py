"""Exports in a process of their own, whose temporary folder is damaged after a stage."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmscale.errors import MmscaleError


def forked(function: Callable[[], Any]) -> tuple[int, str]:
    """Exit status of a function in a process of its own, and what an error said."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except MmscaleError as error:
            os.write(writing, str(error).encode())
            status = error.exit_status
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def damaging(stage: str, damage: Callable[[Path], None], run: Path, out: Path) -> Callable[[], Any]:
    """An export whose temporary folder is damaged after a stage."""
    from checkpoints_tools.huggingface.to_hf import export

    def on_stage(reached: str) -> None:
        if reached == stage:
            (folder,) = out.parent.glob(f"{out.name}.tmp.*")
            damage(folder)

    return lambda: export(run, None, out, on_stage=on_stage)


def rewrite_weights(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def spoil(state: dict[str, Any]) -> None:
    name = "model.layers.1.mlp.experts.text."
    state[f"{name}down_proj"] = state[f"{name}down_proj"].roll(1, 0)  # each expert has another one's
    del state[f"{name}auxiliary.hidden"]  # transformers would make a new one and go on


def forget_the_cache(folder: Path) -> None:
    """The model ignores the cache under the name that generate() gives it, and takes it under the other one."""
    file = folder / "modeling_moma.py"
    code, argument = file.read_text(), "**{CACHE: one_cache(cache, past_key_values)}"
    assert code.count(argument) == 1
    file.write_text(code.replace(argument, "**{CACHE: past_key_values}"))
