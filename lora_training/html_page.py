"""One-file HTML pages: the frame, the colours and the pieces that all pages of the project share.

Nothing on a page is loaded from elsewhere.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from lora_training.files import atomic_write

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --back: #f6f6f4; --card: #fff; --ink: #1c1c1a; --dim: #6b6b66; \
--line: #dcdcd6;
  --mark: #2f6f4f; --bad: #b3402a; }
@media (prefers-color-scheme: dark) { :root { --back: #171716; --card: #232321; --ink: #ecece6; \
--dim: #a0a098;
  --line: #3a3a36; --mark: #7cc49c; --bad: #ef8a72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 28px 24px 60px; background: var(--back); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 36px 0 12px; }
.dim, figcaption small { color: var(--dim); }
.numbers { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; }
.numbers div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; \
padding: 10px 18px; }
.numbers b { display: block; font-size: 24px; font-weight: 600; }
.finding { border-left: 4px solid var(--bad); background: var(--card); padding: 8px 14px; margin: 8px 0;
  overflow-wrap: anywhere; }
.finding p { margin: 2px 0 0; color: var(--dim); }
table { border-collapse: collapse; background: var(--card); }
td, th { padding: 5px 14px; border: 1px solid var(--line); text-align: left; font-weight: normal; }
th { color: var(--dim); } td.n { text-align: right; font-variant-numeric: tabular-nums; }
.buckets { display: flex; flex-wrap: wrap; gap: 18px; align-items: flex-end; }
.bucket { text-align: center; font-size: 13px; }
.bucket i { display: flex; margin: 0 auto 6px; border: 2px solid var(--mark); border-radius: 3px; \
font-size: 18px;
  font-style: normal; align-items: center; justify-content: center; }
.tools { display: flex; flex-wrap: wrap; gap: 10px; margin: 0 0 14px; }
.tools input, .tools select { font: inherit; padding: 6px 10px; border: 1px solid var(--line); \
border-radius: 6px;
  background: var(--card); color: var(--ink); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 14px; \
align-items: start; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; \
overflow: hidden; }
figcaption { padding: 10px 12px 12px; overflow-wrap: anywhere; }
figcaption p { margin: 6px 0; }
.tag { display: inline-block; font-size: 12px; padding: 0 8px; border-radius: 9px; \
border: 1px solid var(--line); color: var(--dim); }
.none, .why { color: var(--bad); }
@media (max-width: 600px) { body { padding: 18px 14px 40px; } .numbers { gap: 8px; }
  .numbers div { padding: 6px 12px; flex: 1 0 auto; } .numbers b { font-size: 20px; } }
"""

# All that a page needs is in it: whatever a caption or a file's name may hold, a browser loads nothing else.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

LARGEST_BUCKET = 110  # pixels on the page of the longest side of all buckets


def page_head(title: str, style: str = "") -> str:
    """The start of a page. style: CSS that it needs beyond the shared one."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style>\n"
    )


def number_cards(pairs: Iterable[tuple[object, str]]) -> str:
    """Cards with a large number each, and what it counts."""
    cards = "".join(f"<div><b>{escape(str(number))}</b>{escape(label)}</div>" for number, label in pairs)
    return f'<div class="numbers">{cards}</div>\n'


def finding_box(text: str, advice: str = "") -> str:
    """A line that stands out, and under it what to do about it."""
    below = f"<p>{escape(advice)}</p>" if advice else ""
    return f'<div class="finding">{escape(text)}{below}</div>\n'


def bucket_shapes(buckets: list[tuple[int, int, int, str]]) -> str:
    """Buckets (width, height, number of images, a note) drawn in their shapes."""
    largest, shapes = max((max(bucket[:2]) for bucket in buckets), default=1), []
    for width, height, images, note in buckets:
        across, down = (LARGEST_BUCKET * side / largest for side in (width, height))
        size = f"width:{across:.0f}px;height:{down:.0f}px"
        below = f'<br><span class="dim">{escape(note)}</span>' if note else ""
        shapes.append(f'<div class="bucket"><i style="{size}">{images}</i>{width} × {height}{below}</div>')
    return f'<div class="buckets">{"".join(shapes)}</div>\n'


def write_page(file: Path, parts: Iterable[str]) -> Path:
    """Writes a page piece by piece, in one step for whoever reads it. Returns the file."""
    # names of files need not be text
    with atomic_write(file) as part, part.open("w", encoding="utf-8", errors="replace") as stream:
        stream.writelines(parts)
    return file
