"""Names of files, directories and addresses as a stranger may read them.

What lives here: taking out what says where a machine keeps things, and secrets in addresses. What must not: files.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from urllib.parse import urlsplit, urlunsplit

HUB_PREFIX = "hub:"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def public(place: str) -> str:
    """A place without its machine: of an absolute or home path its last part, of an address no login and no query."""
    if "://" in place:
        return _public_address(place)
    if place.startswith(HUB_PREFIX):
        return place
    path = PurePosixPath(place.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or place.startswith(("~", "$")) or re.match(r"[A-Za-z]:", place):
        return path.name or "unnamed"
    return str(path)


def _public_address(place: str) -> str:
    try:
        parts = urlsplit(place)
    except ValueError:  # brackets without a partner
        return "an address"
    if parts.scheme in ("file", "local") or "::" in place or not parts.netloc:
        return PurePosixPath(parts.path).name or "unnamed"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def hub_name(place: str) -> str | None:
    """The dataset of `hub:[ORG/]NAME[/CONFIG][:SPLIT]`; None for other places.

    Two parts are taken for ORG/NAME, as they are where text is read; those that are NAME/CONFIG cannot be told apart.
    """
    if not place.startswith(HUB_PREFIX):
        return None
    name = "/".join(place.removeprefix(HUB_PREFIX).partition(":")[0].split("/")[:2])
    return name if is_hub_name(name) else None


def is_hub_name(name: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    return bool(_HUB_NAME.fullmatch(name)) and ".." not in name and "--" not in name and not name.endswith(".git")
