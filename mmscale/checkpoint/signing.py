"""Signatures of checkpoints: MANIFEST.json.sig, made and checked by OpenSSH's ssh-keygen.

A manifest has the digest of every file, so its signature covers the checkpoint. Digests alone detect only accidents:
anyone who can write into the folder can write a matching manifest. Keys are never copied; no torch.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from mmscale.checkpoint.integrity import MANIFEST, SIGNATURE
from mmscale.errors import CheckpointError, UsageError
from mmscale.runtime.atomic_files import write_atomic

NAMESPACE = "mmscale-checkpoint"  # namespace of the signature; signatures made for another purpose are not accepted
_TIMEOUT_S = 60.0


def sign(folder: Path, key: Path) -> Path:
    """Sign the manifest of a checkpoint; an older signature is replaced.

    Args:
        folder: the checkpoint.
        key: private key of ssh, without a passphrase; or a public one whose private half ssh-agent has.

    Returns:
        The file with the signature.

    Raises:
        UsageError: the key cannot be used, or there is no ssh-keygen.
        CheckpointError: the signature cannot be written.
    """
    if not key.is_file():
        raise UsageError(f"there is no key {key}", remedy="name a key: ssh-keygen -t ed25519 -f KEY makes one")
    ended = _ssh_keygen("-Y", "sign", "-f", str(key), "-n", NAMESPACE, content=(folder / MANIFEST).read_bytes())
    if ended.returncode != 0:
        raise UsageError(
            f"{key} cannot sign: {_last(ended)}", remedy="name a key without a passphrase, or one that ssh-agent has"
        )
    file = folder / SIGNATURE
    try:
        write_atomic(file, ended.stdout)
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be written: {error.strerror}", remedy="make room there, or check its rights"
        ) from None
    return file


def signer(folder: Path, signers: Path) -> tuple[str, str]:
    """The signer of a checkpoint's manifest, and the problem with its signature; one of the two is "".

    Args:
        folder: the checkpoint; another function compares its files with the manifest.
        signers: file of allowed signers (ssh-keygen(1), ALLOWED SIGNERS).

    Raises:
        UsageError: there is no such file, or no ssh-keygen.
    """
    if not signers.is_file():
        raise UsageError(
            f"there is no file of allowed signers {signers}",
            remedy='write one line for each: `NAME namespaces="mmscale-checkpoint" ssh-ed25519 AAAA...`',
        )
    signature = folder / SIGNATURE
    if signature.is_symlink() or not signature.is_file():
        return "", "it is not signed"
    found = _ssh_keygen("-Y", "find-principals", "-s", str(signature), "-f", str(signers))
    names = found.stdout.decode(errors="replace").splitlines()
    if found.returncode != 0 or not names:
        return "", f"no signer in {signers} has signed it"
    checked = _ssh_keygen(
        *("-Y", "verify", "-f", str(signers), "-I", names[0], "-n", NAMESPACE, "-s", str(signature)),
        content=(folder / MANIFEST).read_bytes(),
    )
    if checked.returncode != 0:
        return "", f"its signature does not fit: {_last(checked)}"
    return names[0], ""


def _ssh_keygen(*arguments: str, content: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"SSH_ASKPASS_REQUIRE": "never"}
    try:
        return subprocess.run(
            ["ssh-keygen", *arguments],
            input=content,
            capture_output=True,
            env=environment,
            timeout=_TIMEOUT_S,
            check=False,
            start_new_session=True,  # without a terminal it cannot ask for a passphrase
        )
    except FileNotFoundError:
        raise UsageError("there is no ssh-keygen", remedy="install OpenSSH 8.1 or newer") from None
    except subprocess.TimeoutExpired:
        raise UsageError(f"ssh-keygen did not end within {_TIMEOUT_S:g} s", remedy="try it by hand") from None


def _last(ended: subprocess.CompletedProcess[bytes]) -> str:
    lines = ended.stderr.decode(errors="replace").strip().splitlines() or [f"status {ended.returncode}"]
    return lines[-1][:300]
