"""pytest -p tests.te_on_cpu.plugin_everywhere: torch itself reports a GPU, and gloo replaces NCCL."""

from typing import Any

from tests.te_on_cpu import install

install.install(everywhere=True)

import torch.distributed  # noqa: E402

_init_process_group = torch.distributed.init_process_group


def _over_gloo(backend: Any = None, *args: Any, device_id: Any = None, **options: Any) -> Any:
    return _init_process_group("gloo", *args, **options)


torch.distributed.init_process_group = _over_gloo
