"""report.html of a training set: thumbnails, captions, buckets, and what was left out."""

from __future__ import annotations

import base64
from collections import Counter
from html import escape
from typing import TYPE_CHECKING

from lora_training.html_page import bucket_shapes, finding_box, number_cards, page_head, write_page
from lora_training.prepare.crops import visible_part

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_training.data.checks import Finding
    from lora_training.prepare.pictures import Picture
    from lora_training.prepare.preparation import Preparation

MOST_CARDS = 2000  # thumbnails in the file, about 8 KB each
NEARLY_ALL = 0.985  # of a side: a crop that leaves as much is not shown

STYLE = """
.tools input { flex: 1 1 260px; max-width: 420px; }
.frame { background: var(--line); display: flex; align-items: center; justify-content: center; \
height: 224px; }
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


def write_preparation_page(preparation: Preparation, findings: list[Finding]) -> None:
    """Writes report.html into the output folder, card by card."""
    write_page(preparation.output / "report.html", page_parts(preparation, findings))


def page_parts(preparation: Preparation, findings: list[Finding]) -> Iterator[str]:
    """The page from top to bottom."""
    pictures = sorted(preparation.remaining, key=lambda picture: picture.file)
    left_out = [picture for picture in preparation.pictures if picture.problem]
    title, settings = preparation.output.resolve().name, preparation.settings
    source = escape(settings.data_dir or settings.dataset_name)
    yield page_head(f"{title}: training set", STYLE)
    yield f'<h1>{escape(title)}</h1><div class="dim">from {source}</div>\n'
    yield summary_cards(preparation, pictures, len(left_out))
    yield from (finding_box(finding.what, finding.advice) for finding in findings)
    yield used_buckets(preparation)
    yield from results_table(preparation)
    yield '<h2>The training set</h2><div class="tools">'
    yield search_controls(preparation, pictures)
    yield '</div><div class="grid" id="set">\n'
    yield from (card(preparation, picture) for picture in pictures[:MOST_CARDS])
    yield "</div>\n"
    if len(pictures) > MOST_CARDS:
        yield f'<p class="dim">{len(pictures) - MOST_CARDS} more are in metadata.jsonl.</p>\n'
    if left_out:
        yield '<h2>Left out</h2><div class="grid">\n'
        yield from (card(preparation, picture) for picture in left_out[:MOST_CARDS])
        yield "</div>\n"
    yield f"<script>{SCRIPT}</script>\n"


def summary_cards(preparation: Preparation, pictures: list[Picture], left_out: int) -> str:
    """The numbers that are asked for first. left_out: how many pictures were."""
    captioned = sum(bool(picture.final_captions) for picture in pictures)
    cards = [(len(pictures), "images"), (left_out, "left out"), (captioned, "with a caption")]
    if preparation.buckets:
        cards.append((len({picture.bucket for picture in pictures}), "buckets in use"))
    return number_cards(cards)


def used_buckets(preparation: Preparation) -> str:
    """Each bucket in use drawn in its shape with its number of images; nothing without buckets."""
    if not preparation.buckets:
        return ""
    counts = Counter(picture.bucket for picture in preparation.remaining)
    shapes = [(*size, counts[i], "") for i, size in enumerate(preparation.buckets) if counts[i]]
    return f"<h2>Buckets</h2>{bucket_shapes(shapes)}"


def results_table(preparation: Preparation) -> Iterator[str]:
    """What each step did."""
    yield "<h2>Steps</h2><table><tr><th>step<th>images<th>done now<th>from before<th>note</tr>\n"
    for step, *numbers, note in preparation.results:
        cells = "".join(f'<td class="n">{number}' for number in numbers)
        yield f"<tr><td>{step}{cells}<td>{escape(note)}</tr>\n"
    yield "</table>"


def search_controls(preparation: Preparation, pictures: list[Picture]) -> str:
    """What the pictures can be chosen by: words, bucket, where the caption is from."""
    used = sorted({picture.bucket for picture in pictures}) if preparation.buckets else []
    sizes = [bucket_name(preparation.buckets[i]) for i in used]
    sources = sorted({picture.caption_source for picture in pictures if picture.caption_source})
    has_masks = any(picture.mask_digest for picture in pictures)
    masks = " · red: what hardly counts, by its mask" if has_masks else ""
    return (
        '<input id="words" placeholder="search names and captions">'
        f"{drop_down('bucket', 'all buckets', sizes)}{drop_down('source', 'all captions', sources)}"
        f'<span class="dim" id="count"></span><span class="dim">{masks}</span>'
    )


def drop_down(name: str, title: str, values: list[str]) -> str:
    """A list to choose from; nothing where there is no choice."""
    if len(values) < 2:
        return ""
    options = "".join(f'<option value="{escape(v.lower())}">{escape(v)}</option>' for v in values)
    return f'<select id="{name}"><option value="">{title}</option>{options}</select>'


def bucket_name(size: tuple[int, int]) -> str:
    """A bucket's size as text."""
    return f"{size[0]} x {size[1]}"


def card(preparation: Preparation, picture: Picture) -> str:
    """One picture: thumbnail, name, sizes, caption; or why it was left out."""
    facts = ["{} × {}".format(*picture.size)] if picture.size[0] else []
    bucket = ""
    if picture.problem is None:
        size = preparation.training_size(picture) or picture.resized
        if size != picture.size:
            facts[0] += " → {} × {}".format(*size)
        facts.append(f"sharpness {picture.facts['sharpness']:.0f}")
        text = caption_text(picture)
        bucket = bucket_name(preparation.buckets[picture.bucket]) if preparation.buckets else ""
    else:
        text = f'<p class="why">{escape(picture.problem)}</p>'
    name = escape(picture.name)
    if picture.file and picture.file != picture.name:
        name += f" <small>→ {escape(picture.file)}</small>"
    source, image = escape(picture.caption_source), thumbnail(preparation, picture)
    caption = f"<figcaption><b>{name}</b><br><small>{' · '.join(facts)}</small>{text}</figcaption>"
    return f'<figure data-bucket="{bucket}" data-source="{source}">{image}{caption}</figure>\n'


def caption_text(picture: Picture) -> str:
    """A picture's captions, and where they are from."""
    text = "".join(f"<p>{escape(caption)}</p>" for caption in picture.final_captions)
    text = text or '<p class="none">no caption</p>'
    source = picture.caption_source
    return text + (f'<span class="tag">{escape(source)}</span>' if source else "")


def thumbnail(preparation: Preparation, picture: Picture) -> str:
    """The picture as it came, what the crops cut away in the shade, what its mask leaves out in red."""
    file = preparation.thumbnail_file(picture)
    if not picture.digest or not file.is_file():
        return '<div class="frame"><q>no picture</q></div>'
    mask, mask_file = "", preparation.mask_thumbnail_file(picture)
    if picture.mask_digest and mask_file.is_file():
        data = base64.b64encode(mask_file.read_bytes()).decode()
        mask = f'<img class="mask" alt="" src="data:image/png;base64,{data}">'
    data = base64.b64encode(file.read_bytes()).decode()
    image = f'<img alt="" src="data:image/jpeg;base64,{data}">'
    crop = crop_frame(preparation, picture) if picture.problem is None else ""
    return f'<div class="frame"><span>{image}{mask}{crop}</span></div>'


def crop_frame(preparation: Preparation, picture: Picture) -> str:
    """A frame around what the crops leave; nothing where that is nearly all."""
    target = preparation.training_size(picture)
    left, top, right, bottom = visible_part(picture, preparation.steps, target)
    if min(right - left, bottom - top) >= NEARLY_ALL:
        return ""
    left, top, right, bottom = (f"{100 * share:.1f}%" for share in (left, top, 1 - right, 1 - bottom))
    return f'<em style="left:{left};top:{top};right:{right};bottom:{bottom}"></em>'
