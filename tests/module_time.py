"""A clock of one module's own, for tests.

`time` is one module for the whole process. Whoever replaces `time.sleep` replaces it for subprocess as well, which
sleeps between its looks at a child, and for every other thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


def replace_time(monkeypatch: pytest.MonkeyPatch, module: ModuleType, **functions: Callable[..., Any]) -> None:
    """Replace functions of `time` as they are seen by one module, which must `import time` at its top."""
    assert module.time is time, f"{module.__name__} has no `import time` at its top"
    monkeypatch.setattr(module, "time", SimpleNamespace(**vars(time) | functions))
