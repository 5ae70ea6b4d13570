"""Element types that the tensors of a checkpoint may have, by their names.

Digests (integrity.py) show whether a checkpoint is what a run wrote. This module checks that its types match its names:
megatron-core converts whatever it reads, so an int16 tensor under the name of a master weight would load without an
error and destroy the run. Types are names ("float32"), so nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mmscale.checkpoint import integrity
from mmscale.errors import CheckpointError

_SCALE = "_scale."  # occurs in the names of the scales of FP8 moments, between the moment and its parameter
_FP8 = "uint8"  # FP8 values are stored as the bits of E4M3, see train/optim/stored_moments.py


@dataclass(frozen=True)
class Kind:
    """One kind of tensor.

    Attributes:
        what: its name in messages.
        names: matches the beginning of the names of its tensors.
        dtypes: types that it may have.
    """

    what: str
    names: re.Pattern[str]
    dtypes: tuple[str, ...]


# The first matching kind applies. All optimizers, including the auxiliary routers', use the same names.
KINDS: tuple[Kind, ...] = (
    Kind("a master weight", re.compile(r"optimizer\.state\.param\."), ("float32",)),
    Kind("the scale of a moment", re.compile(r"optimizer\.state\.exp_avg(_sq)?_scale\."), ("float32",)),
    Kind("a moment of Adam", re.compile(r"optimizer\.state\.exp_avg(_sq)?\."), ("float32", "bfloat16", _FP8)),
    Kind("the state of an optimizer", re.compile(r"optimizer\."), ("float32",)),
    Kind("an FP8 scaling state", re.compile(r".*\.fp8_state$"), ("float32",)),
    Kind("a weight", re.compile(r""), ("float32", "bfloat16", "float16")),
)


def kind_of(name: str) -> Kind:
    """The kind of a tensor of this name."""
    return next(kind for kind in KINDS if kind.names.match(name))


def wrong_types(dtypes: Mapping[str, str], *, alone: bool = False) -> list[str]:
    """The tensors with wrong types, one line for each.

    Args:
        dtypes: type by name, e.g. "float32".
        alone: these are not all tensors of the checkpoint, so the scales of a moment need not be among them.
    """
    found = []
    for name, dtype in dtypes.items():
        kind = kind_of(name)
        if dtype not in kind.dtypes:
            found.append(f"{name} is {dtype}, but {kind.what} is {' or '.join(kind.dtypes)}")
        elif dtype == _FP8 and not alone and _scale_of(name) not in dtypes:
            found.append(f"{name} is {dtype} without its scales {_scale_of(name)}")
    return found


def _scale_of(moment: str) -> str:
    state, name, parameter = re.split(r"(exp_avg(?:_sq)?)\.", moment, maxsplit=1)
    return f"{state}{name}{_SCALE}{parameter}"


def require_types(dtypes: Mapping[str, str], *, where: object, alone: bool = False) -> None:
    """Refuse tensors whose type does not match their name.

    Args:
        dtypes: type by name.
        where: the checkpoint, for the message.
        alone: as for `wrong_types`.

    Raises:
        CheckpointError: names the first of them.
    """
    if problems := wrong_types(dtypes, alone=alone):
        raise CheckpointError(f"{where} cannot be used: {integrity.describe(problems)}", remedy=_remedy(problems))


def _remedy(problems: Iterable[str]) -> str:
    if all(line.startswith("optimizer.") for line in problems):
        return "choose another checkpoint, or copy its weights alone: `mmscale ckpt reshard RUN@STEP NEW --weights`"
    return "choose another checkpoint: RUN@STEP"
