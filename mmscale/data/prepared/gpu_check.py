"""Whether GPUs can be used for a preparation: only neural image tokenizers compute on them."""

from __future__ import annotations

from mmscale.config import Config
from mmscale.errors import ConfigError

_USES = ("vq",)  # kinds of image tokenizers; k-means needs integers, whose sums are the same on every CPU


def check_gpus(config: Config, gpus: int, *, here: bool) -> None:
    """Refuse GPUs that would be idle, or do not exist.

    Args:
        config: `data.prepare` is used.
        gpus: of a machine; 0 is always right.
        here: on this machine, not on a node of a cluster.

    Raises:
        ConfigError: the image tokenizer computes on CPUs, or this machine has fewer GPUs.
    """
    prepare = config.data.prepare
    if not gpus or prepare is None:
        return
    if prepare.source == "megatron" or prepare.image.kind not in _USES:
        raise ConfigError(
            f"data.prepare: --gpus is for image tokenizers of kind {', '.join(_USES)}, and image.kind is "
            f"{prepare.image.kind}, which computes on the CPU",
            remedy="leave --gpus out",
        )
    if not here:
        return
    from mmscale.runtime.device import count  # imports torch, which other preparations do not need

    if (found := count()) < gpus:
        raise ConfigError(
            f"data.prepare: --gpus {gpus}, and this machine has {found}",
            remedy="leave --gpus out, or use nodes that have GPUs: --cluster NAME --tasks N",
        )
