"""Checks that the training scripts are the same below their seam, or copies one script's lower part to the others.

    python scripts/sync_shared.py                               check: a diff and exit 1 on drift
    python scripts/sync_shared.py --from train_lora_sdxl.py     copy that script's lower part to all others

The seam is the line that begins with SEAM. Just above it stands an index of the lower part's sections, by line, which this
script keeps. Which copy is right is never guessed: --from says it.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
from pathlib import Path

SEAM = "# ==== From here on"
INDEX = "# By line: "


def split(path: Path) -> tuple[str, str]:
    """A script's text above the seam, without the index, and from the seam on. Errors: ValueError without one seam."""
    upper, *lower = re.split(rf"^(?={SEAM})", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if len(lower) != 1:
        raise ValueError(f"{path.name}: expected one line that begins with {SEAM!r}, found {len(lower)}")
    return upper.split(INDEX)[0], lower[0]


def joined(upper: str, lower: str) -> str:
    """A script's text: upper part, index of the lower part's sections by line, lower part."""
    titles = [(n, line[7:].rstrip(" -")) for n, line in enumerate(lower.splitlines()) if line.startswith("# ---- ")]
    index = ""
    for _ in range(2):  # the index counts its own lines
        start = upper.count("\n") + index.count("\n") + 1
        text = INDEX + " · ".join(f"{start + n} {title}" for n, title in titles)
        index = textwrap.fill(text, 118, subsequent_indent="# ", break_on_hyphens=False) + "\n\n"
    return upper + index + lower


def main(argv: list[str] | None = None) -> int:
    """Checks or copies; returns the exit code."""
    parser = argparse.ArgumentParser(description="Checks or copies what the training scripts share.")
    parser.add_argument("--from", dest="source", help="script whose lower part is copied to the others")
    parser.add_argument(
        "--root", type=Path, default=Path(__file__).resolve().parent.parent, help="folder of the scripts"
    )
    args = parser.parse_args(argv)
    paths = sorted(args.root.glob("train_*.py"))
    source = next((p for p in paths if p.name == Path(args.source or paths[0]).name), None) if paths else None
    if source is None:
        print(f"no {args.source or 'train_*.py'} in {args.root}", file=sys.stderr)
        return 2
    try:
        shared = split(source)[1]
        wanted = {path: joined(split(path)[0], shared) for path in paths}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    drifted = [path for path in paths if path.read_text(encoding="utf-8") != wanted[path]]
    for path in drifted:
        if args.source:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"{path.name} updated from {source.name}")
            continue
        theirs = path.read_text(encoding="utf-8")
        sys.stdout.writelines(
            difflib.unified_diff(wanted[path].splitlines(True), theirs.splitlines(True), f"as {source.name}", path.name)
        )
    if not drifted:
        print(f"{shared.count(chr(10))} lines, the same in {len(paths)} script{'s' * (len(paths) > 1)}")
    return int(bool(drifted) and not args.source)


if __name__ == "__main__":
    sys.exit(main())
