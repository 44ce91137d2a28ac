"""report.html of prepare_dataset.py: one file to look at, with thumbnails, captions, buckets and what was left out."""

from __future__ import annotations

import base64
from collections import Counter
from html import escape

from scripts.dataset.parts import image_steps

MOST_CARDS = 2000  # thumbnails in the file, about 8 KB each

STYLE = """
:root { color-scheme: light dark; --back: #f6f6f4; --card: #fff; --ink: #1c1c1a; --dim: #6b6b66; --line: #dcdcd6;
  --mark: #2f6f4f; --bad: #b3402a; }
@media (prefers-color-scheme: dark) { :root { --back: #171716; --card: #232321; --ink: #ecece6; --dim: #a0a098;
  --line: #3a3a36; --mark: #7cc49c; --bad: #ef8a72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 28px 24px 60px; background: var(--back); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 12px; }
.dim, figcaption small { color: var(--dim); }
.numbers { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; }
.numbers div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 18px; }
.numbers b { display: block; font-size: 24px; font-weight: 600; }
.finding { border-left: 4px solid var(--bad); background: var(--card); padding: 8px 14px; margin: 8px 0; }
.finding p { margin: 2px 0 0; color: var(--dim); overflow-wrap: anywhere; }
table { border-collapse: collapse; background: var(--card); }
td, th { padding: 5px 14px; border: 1px solid var(--line); text-align: left; font-weight: normal; }
th { color: var(--dim); } td.n { text-align: right; font-variant-numeric: tabular-nums; }
.buckets { display: flex; flex-wrap: wrap; gap: 18px; align-items: flex-end; }
.bucket { text-align: center; font-size: 13px; }
.bucket i { display: flex; margin: 0 auto 6px; border: 2px solid var(--mark); border-radius: 3px; font-size: 18px;
  font-style: normal; align-items: center; justify-content: center; }
.tools { display: flex; flex-wrap: wrap; gap: 10px; margin: 0 0 14px; }
.tools input, .tools select { font: inherit; padding: 6px 10px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); color: var(--ink); }
.tools input { flex: 1 1 260px; max-width: 420px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 14px; align-items: start; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
.frame { background: var(--line); display: flex; align-items: center; justify-content: center; height: 224px; }
.frame span { position: relative; overflow: hidden; line-height: 0; }
.frame em { position: absolute; outline: 2px solid #fff; box-shadow: 0 0 0 400px rgba(0, 0, 0, .55); }
.frame q { color: var(--dim); quotes: none; line-height: 1.4; }
figcaption { padding: 10px 12px 12px; overflow-wrap: anywhere; }
figcaption p { margin: 6px 0; }
.tag { display: inline-block; font-size: 12px; padding: 0 8px; border-radius: 9px; border: 1px solid var(--line); color: var(--dim); }
.none, .why { color: var(--bad); }
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
    """The picture as it came, with what the crops leave out in the shade."""
    file = run.thumbnail(p)
    if not p.digest or not file.is_file():
        return '<div class="frame"><q>no picture</q></div>'
    data = base64.b64encode(file.read_bytes()).decode()
    shade = ""
    if p.problem is None:
        part = image_steps.kept_part(p, run.steps.image_resizing, run.steps.aspect_ratio_bucketing, run.shown_target(p))
        if min(part[2] - part[0], part[3] - part[1]) < 0.985:
            left, top, right, bottom = (f"{100 * x:.1f}%" for x in (part[0], part[1], 1 - part[2], 1 - part[3]))
            shade = f'<em style="left:{left};top:{top};right:{right};bottom:{bottom}"></em>'
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
    counts, largest = Counter(p.bucket for p in run.kept), max(max(b) for b in run.buckets)
    shapes = []
    for i, (width, height) in enumerate(run.buckets):
        if counts[i]:
            side = f"width:{110 * width / largest:.0f}px;height:{110 * height / largest:.0f}px"
            shapes.append(f'<div class="bucket"><i style="{side}">{counts[i]}</i>{width} × {height}</div>')
    return f'<h2>Buckets</h2><div class="buckets">{"".join(shapes)}</div>'


def choices(name: str, title: str, values: list[str]) -> str:
    """A drop-down list of what the pictures can be chosen by."""
    options = "".join(f'<option value="{escape(v.lower())}">{escape(v)}</option>' for v in values)
    return f'<select id="{name}"><option value="">{title}</option>{options}</select>' if len(values) > 1 else ""


def write_report(run, findings: list) -> None:
    """Writes report.html into the output folder, card by card."""
    kept, left_out = sorted(run.kept, key=lambda p: p.file), [p for p in run.pictures if p.problem]
    captioned = sum(bool(p.final) for p in kept)
    numbers = [(len(kept), "images"), (len(left_out), "left out"), (captioned, "with a caption")]
    if run.buckets:
        numbers.append((len({p.bucket for p in kept}), "buckets in use"))
    title = escape(run.out.resolve().name)
    head = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{title}: training set</title><style>{STYLE}</style><h1>{title}</h1>",
        f'<div class="dim">from {escape(run.settings.data_dir or run.settings.dataset_name)}</div>',
        '<div class="numbers">',
        *(f"<div><b>{n}</b>{what}</div>" for n, what in numbers),
        "</div>",
        *(f'<div class="finding">{escape(f.what)}<p>{escape(f.advice)}</p></div>' for f in findings),
        bucket_shapes(run) if run.buckets else "",
        "<h2>Steps</h2><table><tr><th>step<th>images<th>done now<th>from before<th>note</tr>",
        *(
            f'<tr><td>{name}<td class="n">{images}<td class="n">{now}<td class="n">{before}<td>{escape(note)}</tr>'
            for name, images, now, before, note in run.rows
        ),
        "</table><h2>The training set</h2>",
        '<div class="tools"><input id="words" placeholder="search names and captions">',
        choices(
            "bucket",
            "all buckets",
            [bucket_name(run.buckets[i]) for i in sorted({p.bucket for p in kept})] if run.buckets else [],
        ),
        choices("source", "all captions", sorted({p.caption_source for p in kept if p.caption_source})),
        '<span class="dim" id="count"></span></div><div class="grid" id="set">\n',
    ]
    partial = run.out / ".report.html.partial"
    with open(partial, "w", encoding="utf-8") as out:
        out.write("\n".join(head))
        out.writelines(card(run, p) for p in kept[:MOST_CARDS])
        out.write("</div>\n")
        if len(kept) > MOST_CARDS:
            out.write(f'<p class="dim">{len(kept) - MOST_CARDS} more are in metadata.jsonl.</p>\n')
        if left_out:
            out.write('<h2>Left out</h2><div class="grid">\n')
            out.writelines(card(run, p) for p in left_out[:MOST_CARDS])
            out.write("</div>\n")
        out.write(f"<script>{SCRIPT}</script>\n")
    partial.replace(run.out / "report.html")
