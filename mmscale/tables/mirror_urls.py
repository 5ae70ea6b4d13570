"""URLs of mirrors: the kind of store that a URL names, and why it is refused. Used by the setting and by commands."""

from __future__ import annotations

import re

from mmscale.errors import ConfigError

FILES = ("file", "local")  # protocols of this host's file systems
_URL = re.compile(r"^([a-z][a-z0-9+.-]*)://[^?#]+$")


def problem_of(url: str, *, what: str) -> ConfigError | None:
    """Why a URL cannot be that of a folder in a mirror; None: it can.

    Args:
        url: to check; it is not shown if it holds credentials.
        what: the origin of the URL for the message, e.g. the name of a setting.
    """
    place = url.partition("://")[2]
    if "@" in place.partition("/")[0]:
        return ConfigError(
            f"{what} holds credentials, and URLs are written into records",
            remedy="leave them out of the URL: they come from the environment or from the provider's own files",
        )
    found = _URL.match(url)
    if found is None:
        return ConfigError(
            f"{what} = {url!r} is no URL of a folder",
            remedy="write s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or file:///FOLDER",
        )
    if found[1] in FILES and not place.startswith("/"):
        return ConfigError(
            f"{what} = {url!r}: a folder in the file system is named from the root", remedy=f"write file:///{place}"
        )
    return None


def protocol_of(url: str) -> str:
    """The part of a URL that names the kind of store, e.g. s3.

    Raises:
        ConfigError: it cannot be the URL of a mirror.
    """
    problem = problem_of(url, what="the mirror's URL")
    if problem is not None:
        raise problem
    return url.partition("://")[0]
