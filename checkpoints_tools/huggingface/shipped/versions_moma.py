"""The versions of transformers that this code was tested with, and a warning for other versions.

Shipped next to the weights. A new version may rename arguments of a model, as 5.24 did with the cache.
"""

OLDEST = "5.8.0"
NEWEST = "5.24.0"


def warn_if_untested() -> None:
    """Warn once per process if the installed transformers is older or newer than the tested versions.

    Releases that differ only in their last number count as the same.
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
