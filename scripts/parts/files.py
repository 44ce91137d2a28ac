"""Files as every system takes them."""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

RESERVED = re.compile(r"(?i)^(con|prn|aux|nul|com\d|lpt\d)(?=\.|$)")  # Windows' devices, whatever the ending


def replace(part: Path, target: Path) -> None:
    """Gives a finished file its name. On Windows another program may hold one for a moment: it's tried again."""
    for _ in range(20):
        with contextlib.suppress(PermissionError):
            return os.replace(part, target)
        time.sleep(0.1)
    os.replace(part, target)


def portable(path: str) -> str:
    """A relative path that Windows can have too: no colons and the like, no device's name, no dot or space at an end."""
    parts = (re.sub(r'[<>:"|?*\\\x00-\x1f]', "_", part).rstrip(". ") for part in path.split("/"))
    return "/".join(RESERVED.sub(r"_\1", part) or "_" for part in parts)
