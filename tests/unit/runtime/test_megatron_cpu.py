"""The CPU adaptor: each patch is needed, each works, and torch itself stays as it is."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.runtime import megatron_cpu, megatron_proxy

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the adaptor is a no-op where CUDA exists")

# Both programs print {patch: still needed, ...}; they differ in install(). The second one imports megatron-core before
# install(), the order in which `torch.compile` is bound already.
REPORT = """
import inspect, json, sys, warnings
warnings.simplefilter("ignore")
from mmscale.runtime import megatron_cpu as adaptor, megatron_proxy as proxy
import torch
{setup}
needed = {{patch.name: patch.still_needed() for patch in adaptor.PATCHES}}
missing = [place for *place, text in proxy.TOUCH_POINTS if text not in inspect.getsource(adaptor._function(*place))]
print(json.dumps({{"needed": needed, "missing": missing, "extra": {extra}}}))
"""


def _run(*, setup: str = "", extra: str = "None") -> dict[str, Any]:
    program = REPORT.format(setup=setup, extra=extra)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def without() -> dict[str, Any]:
    # On a "machine with CUDA" install() must do nothing: the report then shows megatron-core as it is.
    pretend = "from mmscale.runtime import megatron_import; megatron_import.uninstall(); "
    pretend += "real = torch.cuda.is_available; torch.cuda.is_available = lambda: True; adaptor.install(); "
    return _run(
        setup=pretend + "imported = 'megatron.core' in sys.modules; torch.cuda.is_available = real", extra="imported"
    )


@pytest.fixture(scope="module")
def with_adaptor() -> dict[str, Any]:
    return _run(setup="import megatron.core; adaptor.install()")


@pytest.mark.parametrize("patch", megatron_cpu.PATCHES, ids=lambda patch: patch.name)
def test_patch_is_still_needed(patch: megatron_cpu.Patch, without: dict[str, Any]) -> None:
    assert without["needed"][patch.name], f"megatron-core no longer has this fault: remove the patch ({patch.where})"


@pytest.mark.parametrize("patch", megatron_cpu.PATCHES, ids=lambda patch: patch.name)
def test_patch_works_even_after_megatron_was_imported(patch: megatron_cpu.Patch, with_adaptor: dict[str, Any]) -> None:
    assert not with_adaptor["needed"][patch.name]


def test_touch_points_are_where_the_table_says(without: dict[str, Any]) -> None:
    assert without["missing"] == [], "megatron-core no longer mentions CUDA there: remove the line from TOUCH_POINTS"


def test_no_op_where_cuda_exists(without: dict[str, Any]) -> None:
    assert without["extra"] is False


def test_torch_itself_is_untouched() -> None:
    compile_before = torch.compile
    megatron_cpu.install()
    assert torch.compile is compile_before
    assert not torch.cuda.is_available()
    assert torch.ones(1).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda|nvidia"):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda|nvidia"):
        torch.ones(1).cuda()
    with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda|nvidia"):
        torch.cuda.current_device()


def test_install_twice_changes_nothing() -> None:
    megatron_cpu.install()
    method = torch.Tensor.cuda
    megatron_cpu.install()
    assert torch.Tensor.cuda is method


def test_rebind_reaches_a_module_imported_late() -> None:
    megatron_cpu.install()
    module = sys.modules["megatron.core.timers"]
    proxy = module.torch
    module.torch = torch  # type: ignore[attr-defined]  # as it looks right after an import
    megatron_cpu.rebind()
    assert module.torch is proxy
    assert module.torch.cuda.current_device() == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 1), "cpu", None])
def test_factories_make_host_tensors(device: Any) -> None:
    proxy = megatron_proxy.HostTorch()
    assert proxy.zeros(2, device=device).device.type == "cpu"
    assert proxy.tensor([1.0], device=device).device.type == "cpu"


def test_factories_leave_other_devices_alone() -> None:
    assert megatron_proxy.HostTorch().empty(2, device="meta").device.type == "meta"


def test_proxy_passes_everything_else_through() -> None:
    proxy = megatron_proxy.HostTorch()
    assert proxy.nn is torch.nn
    assert proxy.Tensor is torch.Tensor
    assert proxy.cuda.FloatTensor is torch.cuda.FloatTensor
    assert proxy.cuda.is_available() is False


def test_random_state_of_the_tracker_is_restored() -> None:
    megatron_cpu.install()
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("own", 7)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with tracker.fork("own"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with tracker.fork("own"):
        assert not torch.equal(torch.rand(3), first)  # the tracker went on from where it stood


def test_names_in_code_constants_are_replaced_at_any_depth() -> None:
    constants = ("torch.cuda.FloatTensor", ("torch.cuda.HalfTensor", ("torch.cuda.BFloat16Tensor",)), "cuda", 3)
    assert megatron_cpu._host_constants(constants) == (
        "torch.FloatTensor",
        ("torch.HalfTensor", ("torch.BFloat16Tensor",)),
        "cuda",
        3,
    )


def test_transformer_engine_is_hidden_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It may be installed all the same, as on a GPU machine whose devices are hidden."""
    (tmp_path / "transformer_engine.py").write_text("raise RuntimeError('cudnn shared object not found')")
    monkeypatch.syspath_prepend(tmp_path)
    megatron_cpu.install()
    with pytest.raises(ImportError):
        importlib.import_module("transformer_engine")
    from megatron.core.extensions.transformer_engine import HAVE_TE

    assert not HAVE_TE
