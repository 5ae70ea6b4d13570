# pyxis is a plugin of slurmd that Debian does not have. This `srun` accepts its arguments and starts each task in the
# image (a folder) with mounts and chroot in a separate mount namespace. Root only; no enroot, no remapping of users.
"""`srun` with --container-image, --container-mounts and --container-workdir."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

_SYSTEM = ("/proc", "/dev", "/sys", "/tmp", "/run", "/etc")
_ERROR = "slurmstepd: error: pyxis: "


def install(folder: Path) -> None:
    """Write it into a folder that the caller must put on PATH before SLURM's own srun."""
    folder.mkdir()
    file = folder / "srun"
    file.write_text(f'#!/bin/bash\nexec {sys.executable} {__file__} srun {shutil.which("srun")} "$@"\n')
    file.chmod(0o755)


def srun(real: str, arguments: list[str]) -> None:
    place = next(number for number, text in enumerate(arguments) if not text.startswith("--"))
    mine = dict(text.split("=", 1) for text in arguments[:place] if text.startswith("--container-"))
    command = arguments[place:]
    if mine:
        names = ("--container-image", "--container-mounts", "--container-workdir")
        values = [mine.pop(name, "") for name in names]
        assert not mine, mine
        inside = ["unshare", "--mount", "--propagation", "private"]
        command = [*inside, sys.executable, __file__, "enter", *values, *command]
    os.execv(real, [real, *(text for text in arguments[:place] if not text.startswith("--container-")), *command])


def enter(image: str, mounts: str, workdir: str, command: list[str]) -> None:
    root = Path(image)
    if not root.is_dir():
        for line in ("container start failed with error code: 1", "printing enroot log file:"):
            print(f"{_ERROR}{line}", file=sys.stderr)
        print(f"{_ERROR}    [ERROR] No such file or directory: {image}", file=sys.stderr)
        print("slurmstepd: error: spank: required plugin spank_pyxis.so: task_init() failed", file=sys.stderr)
        sys.exit(1)
    for mount in (*(f"{path}:{path}" for path in _SYSTEM), *mounts.split(",")):
        source, target, *flags = mount.split(":")
        place = root / target.lstrip("/")
        if Path(source).is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        subprocess.run(["mount", "--rbind", source, place], check=True)
        if flags == ["ro"]:
            subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
    os.chroot(root)
    os.chdir(workdir)
    os.execvp(command[0], command)


if __name__ == "__main__":
    kind, *given = sys.argv[1:]
    if kind == "srun":
        srun(given[0], given[1:])
    else:
        enter(*given[:3], given[3:])
