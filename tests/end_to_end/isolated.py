# The gate of an export starts a fresh interpreter, which takes 3 s of CPU time to import torch and transformers. Here
# one interpreter imports them, and each gate runs in a fork of it. It imports nothing of mmscale, as the gate demands.
"""Programs of `gate.run_isolated` in forks of one isolated interpreter.

    python -I isolated.py NAME     # that interpreter, listening at an abstract socket; it ends with its parent

A program gets its own arguments, environment, working directory and folder of dynamic modules. Modules read some
variables (HF_HUB_OFFLINE) only when they are imported, and these are the same for every gate.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_server: subprocess.Popen[str] | None = None
_folder: tempfile.TemporaryDirectory[str] | None = None


def start() -> None:
    """Start the interpreter, unless this process has one."""
    global _server, _folder
    if _server is not None:
        return
    _folder = tempfile.TemporaryDirectory(prefix="mmscale-isolated-")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= _OFFLINE | {"HF_HOME": _folder.name}
    command = [sys.executable, "-I", __file__, _folder.name]
    _server = subprocess.Popen(command, env=environment, cwd=_folder.name, stdout=subprocess.PIPE, text=True)
    assert _server.stdout is not None and _server.stdout.readline() == "ready\n"


def use() -> None:
    """From now on, the gate of this process asks that interpreter, if one was started."""
    if _server is not None:
        from checkpoints_tools.huggingface import gate

        gate.run_isolated = run


def stop() -> None:
    """End the interpreter, if this process has one."""
    global _server, _folder
    if _server is None or _folder is None:
        return
    assert _server.stdout is not None
    _server.kill()
    _server.wait()
    _server.stdout.close()
    _folder.cleanup()
    _server = _folder = None


def run(command: Sequence[str], *, cwd: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """As `gate.run_isolated`."""
    assert _folder is not None
    with contextlib.ExitStack() as opened:
        out, err = (opened.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        call = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        call.connect(f"\0{_folder.name[-100:]}")
        asked = json.dumps({"command": list(command), "cwd": str(cwd), "environment": dict(environment)}).encode()
        descriptors = array.array("i", [out.fileno(), err.fileno()])
        call.sendmsg([asked], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        status = call.recv(16)  # nothing if it was killed
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return subprocess.CompletedProcess(list(command), int(status) if status else -9, *texts)


def _serve(name: str) -> None:
    import ctypes
    import gc

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    import torch
    from transformers import AutoModelForCausalLM, AutoProcessor  # noqa: F401  what programs import

    torch.set_num_threads(1)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"\0{name[-100:]}")
    listener.listen()
    gc.freeze()
    print("ready", flush=True)
    while True:
        call, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _be_program(call)
        call.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # earlier forks: their CPU time is counted
                pass


def _be_program(call: socket.socket) -> None:
    status = 1
    try:
        message, rights, _, _ = call.recvmsg(1 << 20, socket.CMSG_LEN(2 * array.array("i").itemsize))
        descriptors = array.array("i")
        for _, _, data in rights:
            descriptors.frombytes(data)
        for number, descriptor in zip((1, 2), descriptors, strict=True):
            os.dup2(descriptor, number)
        asked: dict[str, Any] = json.loads(message)
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["cwd"])
        from transformers import dynamic_module_utils

        dynamic_module_utils.HF_MODULES_CACHE = str(Path(asked["environment"]["HF_HOME"]) / "modules")
        sys.argv = asked["command"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        call.send(str(status).encode())
        os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1])
