"""Names of files that every system and every console takes."""

from __future__ import annotations

import re

FORBIDDEN = re.compile(r'[<>:"|?*\\\x00-\x1f]')  # in names on Windows
DEVICES = re.compile(r"(?i)^(con|prn|aux|nul|com\d|lpt\d)(?=\.|$)")  # Windows', whatever the ending


def readable_name(name: str) -> str:
    """A file's name as text that can be printed and stored: bytes that are no UTF-8 become underscores."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("\ufffd", "_")


def portable_path(path: str) -> str:
    """A relative path that Windows can have too.

    It has no colons and the like, no device's name, no dot or space at the end of a name.
    """
    names = (FORBIDDEN.sub("_", name).rstrip(". ") for name in path.split("/"))
    return "/".join(DEVICES.sub(r"_\1", name) or "_" for name in names)


def is_inside(path: object) -> bool:
    """Whether a path, whoever has written it, can only be that of a file below the folder it is used in."""
    if not isinstance(path, str) or not path or not path.isprintable() or "\\" in path or ":" in path:
        return False
    return not path.startswith("/") and ".." not in path.split("/")
