"""A state as flat bytes and back; whatever is not an image is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from mmscale.resilience import state_image
from mmscale.resilience.snapshot_files import UnusableError

PLAIN = {"progress": {"step": 7, "rate": 0.1 + 0.2}, "none": None, "name": "ö"}


def tensors() -> dict[str, Tensor]:
    return {
        "fp32": torch.randn(3, 5),
        "bf16": torch.randn(7).to(torch.bfloat16),
        "fp8": torch.randn(9).to(torch.float8_e4m3fn),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flag": torch.tensor(True),
        "none": torch.empty(0, 4),
        "not contiguous": torch.arange(12).view(3, 4).t(),
    }


def packed(state: dict[str, Tensor]) -> Tensor:
    plan = state_image.make_plan(state, PLAIN)
    buffer = torch.full((plan.length,), 255, dtype=torch.uint8)
    plan.write(buffer, plan.views(buffer), state, PLAIN)
    return buffer


def test_what_goes_in_comes_out() -> None:
    state = tensors()
    found, plain = state_image.read(packed(state))
    assert plain == PLAIN and list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert found[name].contiguous().view(torch.uint8).tolist() == tensor.contiguous().view(torch.uint8).tolist()


def test_a_plan_fits_as_long_as_names_and_shapes_stay() -> None:
    state = tensors()
    plan = state_image.make_plan(state, PLAIN)
    assert plan.fits(state, {**PLAIN, "more": "x" * 1000})
    assert not plan.fits(state, {**PLAIN, "more": "x" * 100_000})
    assert not plan.fits({**state, "new": torch.zeros(1)}, PLAIN)
    assert not plan.fits({**state, "fp32": torch.zeros(5, 3)}, PLAIN)
    assert not plan.fits({**state, "fp32": torch.zeros(3, 5).double()}, PLAIN)


def edited(**values: object) -> Tensor:
    """An image whose first tensor is said to be something else."""
    buffer = packed({"a": torch.zeros(4)})
    size = int.from_bytes(buffer[8:16].numpy().tobytes(), "little")
    content = json.loads(buffer[24 : 24 + size].numpy().tobytes())
    entry = dict(zip(("name", "dtype", "shape", "offset", "bytes"), content["tensors"][0], strict=True)) | values
    text = json.dumps({"tensors": [list(entry.values())], "plain": {}}).encode().ljust(size)
    buffer[24 : 24 + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    buffer[8:16] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little")), dtype=torch.uint8)
    return buffer


@pytest.mark.parametrize(
    ("buffer", "said"),
    [
        (torch.zeros(10, dtype=torch.uint8), "not readable"),
        (torch.zeros(4096, dtype=torch.uint8), "no image"),
        (packed({"a": torch.zeros(4)})[:-64], "no image"),
        (edited(offset=1 << 40), "outside"),
        (edited(offset=-64), "outside"),
        (edited(offset=3), "outside"),
        (edited(shape=[5]), "do not fit together"),
        (edited(shape=[-1, -4]), "do not fit together"),
        (edited(dtype="object"), "not readable"),
        (edited(shape="x"), "not readable"),
    ],
)
def test_what_is_no_image_is_refused(buffer: Tensor, said: str) -> None:
    with pytest.raises(UnusableError, match=said):
        state_image.read(buffer)
