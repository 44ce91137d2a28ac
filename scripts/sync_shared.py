"""Checks that the shared blocks of the training scripts are the same, or copies them from one script to the others.

    python scripts/sync_shared.py                               check: a diff and exit 1 on drift
    python scripts/sync_shared.py --from train_lora_sdxl.py     copy that script's blocks to all others

A block stands between `# >>> shared: NAME` and `# <<< shared: NAME` at column 0. Every script must have the same blocks
in the same order, byte for byte. Which copy is right is never guessed: --from says it.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from pathlib import Path

MARKER = re.compile(r"^# (>>>|<<<) shared: (\S.*?)\s*$")
LOOSE = re.compile(r"^\s*#\s*(>>>|<<<)\s*shared")


def parse(path: Path) -> tuple[list[str], dict[str, tuple[int, int]], list[str]]:
    """Lines of a script, {block: (first, last) line inside it}, and its structural problems."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    blocks: dict[str, tuple[int, int]] = {}
    problems, name, start = [], None, 0
    for number, line in enumerate(lines):
        found = MARKER.match(line)
        if not found:
            if LOOSE.match(line):
                problems.append(f"{path.name}:{number + 1}: malformed marker: {line.strip()}")
            continue
        kind, marked = found.groups()
        if kind == ">>>":
            if name is not None:
                problems.append(f"{path.name}:{number + 1}: {marked!r} begins inside {name!r}")
            if marked in blocks:
                problems.append(f"{path.name}:{number + 1}: {marked!r} stands twice")
            name, start = marked, number + 1
        elif name != marked:
            problems.append(f"{path.name}:{number + 1}: {marked!r} ends, but {name!r} is open")
            name = None
        else:
            blocks[marked] = (start, number)
            name = None
    if name is not None:
        problems.append(f"{path.name}: {name!r} never ends")
    if not blocks and not problems:
        problems.append(f"{path.name}: no shared blocks")
    return lines, blocks, problems


def compare_order(parsed: dict[Path, tuple]) -> list[str]:
    """Problems of scripts that lack blocks or have them in another order than the first script."""
    first, *others = parsed
    wanted, problems = list(parsed[first][1]), []
    for path in others:
        names = list(parsed[path][1])
        missing, extra = [n for n in wanted if n not in names], [n for n in names if n not in wanted]
        if missing:
            problems.append(f"{path.name} lacks {', '.join(missing)}, which {first.name} has")
        if extra:
            problems.append(f"{path.name} has {', '.join(extra)}, which {first.name} lacks")
        if not missing and not extra and names != wanted:
            problems.append(f"{path.name} has the blocks in another order than {first.name}")
    return problems


def main(argv: list[str] | None = None) -> int:
    """Checks or copies; returns the exit code."""
    parser = argparse.ArgumentParser(description="Checks or copies the shared blocks of the training scripts.")
    parser.add_argument("--from", dest="source", help="script whose blocks are copied to the others")
    parser.add_argument(
        "--root", type=Path, default=Path(__file__).resolve().parent.parent, help="folder of the scripts"
    )
    args = parser.parse_args(argv)
    paths = sorted(args.root.glob("train_*.py"))
    if not paths:
        print(f"no train_*.py in {args.root}", file=sys.stderr)
        return 2
    parsed = {path: parse(path) for path in paths}
    problems = [p for _, _, found in parsed.values() for p in found] or compare_order(parsed)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    if args.source:
        source = next((p for p in paths if p.name == Path(args.source).name), None)
        if source is None:
            print(f"--from {args.source}: not one of {', '.join(p.name for p in paths)}", file=sys.stderr)
            return 2
        return copy(source, parsed)
    return report_drift(parsed)


def report_drift(parsed: dict[Path, tuple]) -> int:
    """Prints a diff for each block that differs from the first script's; 1 if there is one."""
    first, *others = parsed
    lines, blocks, _ = parsed[first]
    drift = 0
    for path in others:
        for name, (begin, end) in blocks.items():
            theirs, places = parsed[path][0], parsed[path][1][name]
            if lines[begin:end] != theirs[places[0] : places[1]]:
                drift = 1
                sys.stdout.writelines(
                    difflib.unified_diff(
                        lines[begin:end], theirs[places[0] : places[1]], f"{first.name}: {name}", f"{path.name}: {name}"
                    )
                )
    if not drift:
        print(f"{len(blocks)} shared blocks, the same in {len(parsed)} script{'s' * (len(parsed) > 1)}")
    return drift


def copy(source: Path, parsed: dict[Path, tuple]) -> int:
    """Writes the source's blocks into the other scripts."""
    lines, blocks, _ = parsed[source]
    for path, (old, places, _) in parsed.items():
        if path == source:
            continue
        content, at = [], 0
        for name, (begin, end) in places.items():
            content += old[at:begin] + lines[blocks[name][0] : blocks[name][1]]
            at = end
        content += old[at:]
        if content != old:
            path.write_text("".join(content), encoding="utf-8")
            print(f"{path.name} updated from {source.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
