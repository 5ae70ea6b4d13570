"""The environment of a job.

Selects the variables that a job gets from the submitting shell, and passes secrets. ranks.py adds those of ranks.

SLURM's default, the whole shell, would keep accidental values in the job and each of its restarts. A job gets the
variables listed here and in the profile. Names that look like secrets are withheld; `secrets` passes them.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.profile import SECRET, Profile
from mmscale.errors import LaunchError, UsageError

SECRETS = "secrets"  # folder in the launch folder, one file each
_KEPT = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_*", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH"),
    *("VIRTUAL_ENV", "CONDA_*", "SLURM_CONF", "MMSCALE_*", "OMP_NUM_THREADS", "GOMP_SPINCOUNT"),
    # Environment modules and Lmod: `module` is an exported function that reads these variables.
    *("BASH_ENV", "BASH_FUNC_*", "MODULE*", "LMOD_*", "__LMOD_*", "_ModuleTable*", "LOADEDMODULES", "_LMFILES_*"),
    # Network settings and cache folders.
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "XDG_CACHE_HOME", "HF_*", "WANDB_*"),
    *("NCCL_*", "GLOO_*", "UCX_*", "FI_*", "CUDA_HOME", "CUDA_PATH"),
)
_PASSWORD_IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]+@")
# Facts of the submitting process, which may itself be a rank of a job.
_OWN = ("MMSCALE_ATTEMPT_ID", "MMSCALE_LAUNCHER")


@dataclass(frozen=True)
class JobEnvironment:
    """The variables that a job gets from a shell.

    Attributes:
        variables: by name.
        withheld: names that are not passed because they look like secrets.
    """

    variables: dict[str, str]
    withheld: tuple[str, ...]


def environment_of_job(profile: Profile) -> JobEnvironment:
    """Select the variables of a shell, without the profile's own `environment`."""
    patterns = (*_KEPT, *profile.keep)
    wanted = {
        name: value
        for name, value in os.environ.items()
        if name not in _OWN and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    withheld = sorted(name for name, value in wanted.items() if SECRET.search(name) or _PASSWORD_IN_URL.search(value))
    return JobEnvironment({name: value for name, value in wanted.items() if name not in withheld}, tuple(withheld))


def comments(profile: Profile) -> list[str]:
    """Lines of the batch script that list the passed names, without values."""
    found = environment_of_job(profile)
    # An exported function is `BASH_FUNC_module%%`, which is not a valid variable name in a script.
    lines = [f"# From the submitting shell: {' '.join(sorted(map(_plain, found.variables)))}"]
    withheld = [_plain(name) for name in found.withheld if name not in profile.secrets]
    if withheld:
        lines.append(f"# Withheld, because they look like secrets (`secrets` of the profile): {' '.join(withheld)}")
    if profile.secrets:
        lines.append(f"# Secrets, which the job reads from files: {' '.join(sorted(profile.secrets))}")
    return lines


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_()]", "", re.sub(r"^BASH_FUNC_(.*)(%%|\(\))$", r"\1()", name))


@contextlib.contextmanager
def only(profile: Profile) -> Iterator[None]:
    """Run with only the variables that a job gets, while sbatch copies them."""
    before = dict(os.environ)
    kept = environment_of_job(profile).variables | {
        name: variable.value for name, variable in profile.environment.items()
    }
    os.environ.clear()
    os.environ.update(kept)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def check_secrets(profile: Profile) -> None:
    """Check, before anything is written, that all secrets exist.

    Raises:
        UsageError: one is missing; the message has its name and not its value.
    """
    for name in profile.secrets:
        _value(profile, name)


@contextlib.contextmanager
def shared(profile: Profile) -> Iterator[None]:
    """Make files of a launch and its job readable for the group with `share: group`, whatever the user's umask."""
    before = os.umask(0o077)
    os.umask(before & ~0o050 if profile.share == "group" else before)
    try:
        yield
    finally:
        os.umask(before)


def write_secrets(profile: Profile, folder: Path) -> None:
    """Write secrets from variables of this shell to files for the job; it reads secrets in files itself.

    Args:
        profile: of the cluster.
        folder: of the launch, which only its owner can open.
    """
    place = folder / SECRETS
    for name, secret in profile.secrets.items():
        if secret.env is None:
            continue
        place.mkdir(mode=0o700, exist_ok=True)
        file = os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w") as opened:
            opened.write(_value(profile, name))


def read_secrets(profile: Profile, folder: Path) -> dict[str, str]:
    """Secrets by name, in the job.

    Raises:
        LaunchError: one cannot be read.
    """
    found = {}
    for name, secret in profile.secrets.items():
        file = folder / SECRETS / name if secret.file is None else Path(secret.file).expanduser()
        try:
            found[name] = file.read_text().strip()
        except OSError as error:
            raise LaunchError(
                f"the secret {name} cannot be read from {file}: {error.strerror}",
                remedy="launch again where it is there (`mmscale resume`)",
            ) from None
    return found


def remove_secrets(folder: Path) -> None:
    """Remove secrets when the job has ended."""
    shutil.rmtree(folder / SECRETS, ignore_errors=True)


def _value(profile: Profile, name: str) -> str:
    secret = profile.secrets[name]
    if secret.env is not None:
        value = os.environ.get(secret.env, "").strip()
        missing = f"the variable {secret.env} of this shell is not set"
    else:
        file = Path(str(secret.file)).expanduser()
        try:
            value, missing = file.read_text().strip(), f"{file} is empty"
        except OSError as error:
            value, missing = "", f"{file}: {error.strerror}"
    if not value:
        raise UsageError(f"secrets.{name} of the profile: {missing}", remedy="set it, or take it out of the profile")
    return value
