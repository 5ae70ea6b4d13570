"""Replaces the clock of one module, for tests.

`time` is one module for the whole process. Replacing `time.sleep` there would also replace it for subprocess, which
sleeps while it waits for a child, and for every other thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


def replace_time(monkeypatch: pytest.MonkeyPatch, module: ModuleType, **functions: Callable[..., Any]) -> None:
    """Replace functions of `time` for one module only, which must `import time` at its top."""
    assert module.time is time, f"{module.__name__} has no `import time` at its top"
    monkeypatch.setattr(module, "time", SimpleNamespace(**vars(time) | functions))
