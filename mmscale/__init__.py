"""Pre-training of mixed-modal language models (MoMa) on PyTorch and megatron-core.

Importing this package imports nothing else, so `mmscale launch`, `plan` and `status` start without torch.
"""

from mmscale.runtime import megatron_import

megatron_import.install()  # adds a finder and imports nothing

__version__ = "0.1.0"
