"""The frame of the pages of runs: style, sections under headings, what opens on demand, tables, links."""

from __future__ import annotations

import os
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from lora_training.report import plots

if TYPE_CHECKING:
    from collections.abc import Iterable

ADVISED_TAG = '<span class="tag">advised</span>'

STYLE = (
    plots.STYLE
    + """
.under { margin: -6px 0 14px; color: var(--dim); max-width: 80ch; } a { color: var(--mark); }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 10px 0 0; font-size: 14px; }
.below { margin: 14px 0 10px; }
.verdict { border-left: 4px solid var(--mark); background: var(--card); padding: 14px 18px; \
margin: 0 0 10px; font-size: 17px;
  overflow-wrap: anywhere; white-space: pre-line; }
.scroll { overflow-x: auto; margin: 0 0 12px; } .scroll td { overflow-wrap: break-word; max-width: 70ch; }
tr.taken td { background: color-mix(in srgb, var(--mark) 14%, transparent); } td .tag { margin-left: 8px; }
img { display: block; width: 100%; height: auto; } .px { image-rendering: pixelated; }
.gone { display: flex; aspect-ratio: 1; align-items: center; justify-content: center; \
background: var(--line); color: var(--dim); }
h3.prompt { font-size: 15px; font-weight: 600; margin: 20px 0 8px; overflow-wrap: anywhere; \
white-space: pre-line; }
.beside { display: grid; grid-template-columns: minmax(0, 230px) minmax(0, 1fr); gap: 24px; \
align-items: start; }
.beside > div > h3:first-child { margin-top: 0; } .beside > div:first-child { position: sticky; top: 12px; }
.taught { display: grid; grid-template-columns: repeat(2, 1fr); gap: 8px; font-size: 12px; }
.taught figcaption { padding: 4px 6px 6px; color: var(--dim); line-height: 1.3; max-height: 5.6em; \
overflow: hidden; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 14px; \
align-items: start; }
.pairs.single { grid-template-columns: repeat(auto-fill, minmax(min(46%, 180px), 1fr)); }
.pair { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 3px; align-items: start; }
.pair small, .shot small { display: block; padding: 4px 8px 0; color: var(--dim); }
.pairs figcaption, .reel figcaption { padding: 0 8px 6px; } .reel figcaption:empty { padding: 3px; }
.reel { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 210px), 1fr)); gap: 14px; \
align-items: start; }
.shot { display: none; } .shot.on { display: block; } .film .shot small { display: none; \
} .all .film .shot small { display: block; }
.all .reel { grid-template-columns: minmax(0, 1fr); }
.all .film > div { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30%, 130px), 1fr)); \
gap: 3px; }
.all .shot { display: block; }
.slide { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 6px 18px; \
align-items: center; padding: 10px 0;
  background: var(--back); } .slide input[type=range] { flex: 1 1 200px; max-width: 640px; \
accent-color: var(--mark); height: 28px; }
.slide output { min-width: 9.5em; font-weight: 600; font-variant-numeric: tabular-nums; }
.sheet { max-width: 900px; } details { margin: 12px 0; } summary { cursor: pointer; padding: 4px 0; \
color: var(--dim); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; \
margin: 0 0 12px;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; }
@media (max-width: 800px) { .beside > div:first-child { position: static; \
} .beside { grid-template-columns: minmax(0, 1fr); } .taught { grid-template-columns: repeat(4, 1fr); } }
@media (max-width: 600px) { td, th { padding: 4px 9px; } .verdict { font-size: 16px; \
} .taught figcaption { display: none; } }
@media print { :root { --back: #fff; --card: #fff; --ink: #1c1c1a; --dim: #6b6b66; --line: #dcdcd6; \
color-scheme: light; }
  body { max-width: none; padding: 0; } nav, .slide { display: none; \
} figure, tr, .finding { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .scroll { overflow: visible; \
} .pairs { grid-template-columns: repeat(3, 1fr); }
  .plots { grid-template-columns: repeat(2, 1fr); } .reel { grid-template-columns: minmax(0, 1fr); }
  .film > div { display: grid; grid-template-columns: repeat(8, 1fr); gap: 3px; \
} .shot, .film .shot small { display: block; }
  .beside > div:first-child { position: static; } .taught { grid-template-columns: repeat(8, 1fr); } }
"""
)

SCRIPT = (
    plots.SCRIPT
    + """
for (const films of document.querySelectorAll('.films')) {
  const slider = films.querySelector('[type=range]'), told = films.querySelector('output'), names = \
films.dataset.names.split('|');
  const shots = films.querySelectorAll('.shot');
  slider.addEventListener('input', () => { told.textContent = names[slider.value];
    for (const shot of shots) shot.classList.toggle('on', shot.dataset.i === slider.value); });
  films.querySelector('[type=checkbox]').addEventListener('change', e => films.classList.toggle('all', \
e.target.checked));
}
addEventListener('beforeprint', () => document.querySelectorAll('details:not(.extra)').forEach(d => d.open \
= true));
"""
)


def section(name: str, title: str, explanation: str, *parts: str) -> str:
    """A part of the page under its heading; empty if its parts are.

    name: that links lead to. explanation: what is to be seen, as HTML.
    """
    body = "".join(parts)
    if not body:
        return ""
    below = f'<p class="under">{explanation}</p>' if explanation else ""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{below}\n{body}</section>\n'


def folded(title: str, body: str, kind: str = "") -> str:
    """What opens on demand; empty if the body is.

    kind: "open" is open from the start, "extra" stays folded on paper.
    """
    attribute = {"open": " open", "extra": ' class="extra"'}.get(kind, "")
    return f"<details{attribute}><summary>{escape(title)}</summary>{body}</details>\n" if body else ""


class NumberCell(str):
    """A table's cell that is aligned to the right."""


def table(
    head: Iterable[str], rows: Iterable[Iterable[str]], highlighted: Iterable[bool] | None = None
) -> str:
    """A table that scrolls by itself where it is too wide. Cells are HTML.

    highlighted: for each row, whether it is.
    """
    rows = [list(row) for row in rows]
    if not rows:
        return ""
    pieces = ['<div class="scroll"><table><tr>', *(f"<th>{name}" for name in head), "</tr>\n"]
    for row, is_highlighted in zip(rows, highlighted or [False] * len(rows), strict=True):
        cells = [f'<td class="n">{c}' if isinstance(c, NumberCell) else f"<td>{c}" for c in row]
        pieces += ['<tr class="taken">' if is_highlighted else "<tr>", *cells, "</tr>\n"]
    return "".join(pieces) + "</table></div>\n"


def link(target: Path, page_folder: Path) -> str:
    """The address of a file as seen from the page's folder."""
    try:
        relative = os.path.relpath(target.resolve(), page_folder.resolve())
    except ValueError:  # another drive
        return escape(target.resolve().as_uri())
    return "./" + quote(os.fsencode(Path(relative).as_posix()))


def file_link(target: Path, page_folder: Path, text: str) -> str:
    """The <a> that leads to a file or a folder and is shown as `text`."""
    end = "/" if target.is_dir() else ""
    return f'<a href="{link(target, page_folder)}{end}">{escape(text)}</a>'


def contents(sections: list[str]) -> str:
    """Links to the sections that there are."""
    heads = [re.match(r'<section id="([a-z-]+)"><h2>([^<]+)', text) for text in sections]
    links = [f'<a href="#{head[1]}">{head[2]}</a>' for head in heads if head]
    return f"<nav>{''.join(links)}</nav>\n" if len(links) > 1 else ""
