"""Numbers and settings as text, as a person would write them; files as addresses of a page."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from urllib.parse import quote

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(count: int) -> str:
    """A number of bytes with its unit."""
    power = min(int(math.log(max(count, 1), 1024)), len(UNITS) - 1)
    amount = count / 1024**power
    digits = 0 if power == 0 or amount >= 100 else 1
    return f"{amount:.{digits}f} {UNITS[power]}"


def format_duration(seconds: float) -> str:
    """Seconds as seconds, minutes, or hours and minutes."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def format_whole_percent(value: float) -> str:
    """A share in percent, without digits behind the point."""
    return f"{100 * value:.0f}%" if math.isfinite(value) else str(value)


def format_setting(value: object) -> str:
    """A setting's value as a person would type it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(format_setting(entry) for entry in value)
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict) else str(value)


def is_same_setting(one: object, other: object) -> bool:
    """Whether two values are one setting: 1e-4 and 0.0001, [64] and 64."""
    one_is_list, other_is_list = (isinstance(value, list | tuple) for value in (one, other))
    if one_is_list and other_is_list:
        return len(one) == len(other) and all(map(is_same_setting, one, other))
    if one_is_list or other_is_list:
        one, other = only_entry(one), only_entry(other)
    if isinstance(one, bool) or isinstance(other, bool):
        return one == other
    try:
        return one == other or float(one) == float(other)
    except (TypeError, ValueError, OverflowError):
        return str(one) == str(other)


def only_entry(value: object) -> object:
    """The entry of a list with one entry; other values as they are."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def link(target: Path, page_folder: Path) -> str:
    """The address of a file or a folder as seen from the page's folder."""
    end = "/" if target.is_dir() else ""
    try:
        relative = os.path.relpath(target.resolve(), page_folder.resolve())
    except ValueError:  # another drive
        return target.resolve().as_uri() + end
    return "./" + quote(os.fsencode(Path(relative).as_posix())) + end
