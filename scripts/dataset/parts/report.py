"""report.html of prepare_dataset.py: one file to look at, with thumbnails, captions, buckets and what was left out."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator
from html import escape

from scripts.dataset.parts import image_steps
from scripts.parts import page

MOST_CARDS = 2000  # thumbnails in the file, about 8 KB each

STYLE = """
.tools input { flex: 1 1 260px; max-width: 420px; }
.frame { background: var(--line); display: flex; align-items: center; justify-content: center; height: 224px; }
.frame span { position: relative; overflow: hidden; line-height: 0; }
.frame em { position: absolute; outline: 2px solid #fff; box-shadow: 0 0 0 400px rgba(0, 0, 0, .55); }
.frame img.mask { position: absolute; inset: 0; width: 100%; height: 100%; }
.frame q { color: var(--dim); quotes: none; line-height: 1.4; }
"""

SCRIPT = """
const cards = [...document.querySelectorAll('#set figure')], count = document.getElementById('count');
const controls = ['words', 'bucket', 'source'].map(id => document.getElementById(id));
function show() {
  const [words, bucket, source] = controls.map(c => c ? c.value.toLowerCase() : '');
  let n = 0;
  for (const card of cards) {
    const fits = card.textContent.toLowerCase().includes(words) && (!bucket || card.dataset.bucket === bucket)
      && (!source || card.dataset.source === source);
    card.hidden = !fits; n += fits;
  }
  count.textContent = n + ' of ' + cards.length;
}
for (const c of controls) if (c) c.addEventListener('input', show);
show();
"""


def thumbnail(run, p) -> str:
    """The picture as it came, with what the crops leave out in the shade, and what its mask leaves out in red."""
    file = run.thumbnail(p)
    if not p.digest or not file.is_file():
        return '<div class="frame"><q>no picture</q></div>'
    data = base64.b64encode(file.read_bytes()).decode()
    shade = ""
    if p.mask and run.mask_thumbnail(p).is_file():
        red = base64.b64encode(run.mask_thumbnail(p).read_bytes()).decode()
        shade = f'<img class="mask" alt="" src="data:image/png;base64,{red}">'
    if p.problem is None:
        part = image_steps.kept_part(p, run.steps.image_resizing, run.steps.aspect_ratio_bucketing, run.shown_target(p))
        if min(part[2] - part[0], part[3] - part[1]) < 0.985:
            left, top, right, bottom = (f"{100 * x:.1f}%" for x in (part[0], part[1], 1 - part[2], 1 - part[3]))
            shade += f'<em style="left:{left};top:{top};right:{right};bottom:{bottom}"></em>'
    return f'<div class="frame"><span><img alt="" src="data:image/jpeg;base64,{data}">{shade}</span></div>'


def card(run, p) -> str:
    """One picture: thumbnail, name, sizes, caption."""
    facts = [f"{p.size[0]} × {p.size[1]}"] if p.size[0] else []
    if p.problem is None:
        size = run.shown_target(p) or p.resized
        if size != p.size:
            facts[0] += f" → {size[0]} × {size[1]}"
        facts.append(f"sharpness {p.facts['sharpness']:.0f}")
        captions = "".join(f"<p>{escape(c)}</p>" for c in p.final) or '<p class="none">no caption</p>'
        text = captions + (f'<span class="tag">{escape(p.caption_source)}</span>' if p.caption_source else "")
    else:
        text = f'<p class="why">{escape(p.problem)}</p>'
    bucket = bucket_name(run.buckets[p.bucket]) if run.buckets and p.problem is None else ""
    name = escape(p.name) + (f" <small>→ {escape(p.file)}</small>" if p.file and p.file != p.name else "")
    return (
        f'<figure data-bucket="{bucket}" data-source="{escape(p.caption_source)}">{thumbnail(run, p)}'
        f"<figcaption><b>{name}</b><br><small>{' · '.join(facts)}</small>{text}</figcaption></figure>\n"
    )


def bucket_name(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def bucket_shapes(run) -> str:
    """Each bucket drawn in its shape with its number of images."""
    counts = Counter(p.bucket for p in run.kept)
    shapes = [(*size, counts[i], "") for i, size in enumerate(run.buckets) if counts[i]]
    return f"<h2>Buckets</h2>{page.bucket_shapes(shapes)}"


def choices(name: str, title: str, values: list[str]) -> str:
    """A drop-down list of what the pictures can be chosen by."""
    options = "".join(f'<option value="{escape(v.lower())}">{escape(v)}</option>' for v in values)
    return f'<select id="{name}"><option value="">{title}</option>{options}</select>' if len(values) > 1 else ""


def write_report(run, findings: list) -> None:
    """Writes report.html into the output folder, card by card."""
    page.write_page(run.out / "report.html", parts_of_report(run, findings))


def parts_of_report(run, findings: list) -> Iterator[str]:
    """The report from top to bottom."""
    kept, left_out = sorted(run.kept, key=lambda p: p.file), [p for p in run.pictures if p.problem]
    captioned = sum(bool(p.final) for p in kept)
    numbers = [(len(kept), "images"), (len(left_out), "left out"), (captioned, "with a caption")]
    if run.buckets:
        numbers.append((len({p.bucket for p in kept}), "buckets in use"))
    title = run.out.resolve().name
    yield page.head(f"{title}: training set", STYLE)
    yield f'<h1>{escape(title)}</h1><div class="dim">from {escape(run.settings.data_dir or run.settings.dataset_name)}</div>\n'
    yield page.numbers(numbers)
    yield from (page.finding(f.what, f.advice) for f in findings)
    yield bucket_shapes(run) if run.buckets else ""
    yield "<h2>Steps</h2><table><tr><th>step<th>images<th>done now<th>from before<th>note</tr>\n"
    for name, images, now, before, note in run.rows:
        yield f'<tr><td>{name}<td class="n">{images}<td class="n">{now}<td class="n">{before}<td>{escape(note)}</tr>\n'
    yield '</table><h2>The training set</h2><div class="tools"><input id="words" placeholder="search names and captions">'
    sizes = [bucket_name(run.buckets[i]) for i in sorted({p.bucket for p in kept})] if run.buckets else []
    yield choices("bucket", "all buckets", sizes)
    yield choices("source", "all captions", sorted({p.caption_source for p in kept if p.caption_source}))
    masks = " · red: what hardly counts, by its mask" if any(p.mask for p in kept) else ""
    yield f'<span class="dim" id="count"></span><span class="dim">{masks}</span></div><div class="grid" id="set">\n'
    yield from (card(run, p) for p in kept[:MOST_CARDS])
    yield "</div>\n"
    if len(kept) > MOST_CARDS:
        yield f'<p class="dim">{len(kept) - MOST_CARDS} more are in metadata.jsonl.</p>\n'
    if left_out:
        yield '<h2>Left out</h2><div class="grid">\n'
        yield from (card(run, p) for p in left_out[:MOST_CARDS])
        yield "</div>\n"
    yield f"<script>{SCRIPT}</script>\n"
