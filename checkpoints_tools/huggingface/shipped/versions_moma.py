"""The versions of transformers that this code was tested with, and a warning where it meets another one.

Shipped beside the weights. A new version may rename what it passes to a model, as 5.24 did with the cache.
"""

OLDEST = "5.8.0"
NEWEST = "5.24.0"


def warn_if_untested() -> None:
    """Say once in a process that the transformers at hand is older or newer than the tested ones.

    Releases that differ in their last number only count as the same.
    """
    from packaging.version import Version
    from transformers import __version__
    from transformers.utils import logging

    oldest, here, newest = (Version(text).release[:2] for text in (OLDEST, __version__, NEWEST))
    if not oldest <= here <= newest:
        logging.get_logger(__name__).warning_once(
            f"This model's code was tested with transformers {_short(OLDEST)} to {_short(NEWEST)}, and this is "
            f"{__version__}. Install one of the tested versions, or check that `generate` gives the same text with "
            "use_cache=False."
        )


def _short(version: str) -> str:
    return ".".join(version.split(".")[:2])


__all__ = ["NEWEST", "OLDEST", "warn_if_untested"]
