"""Pre-training of mixed-modal language models (MoMa) on PyTorch and megatron-core.

Importing this package costs nothing and pulls in nothing: `mmscale launch`, `plan` and `status` start without torch.
"""

__version__ = "0.1.0"
