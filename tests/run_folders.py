"""Output folders as runs leave them, written by hand, and the pages that are made of them."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import yaml
from PIL import Image, PngImagePlugin

from lora_training.report import write_run_page

HOSTILE = '<script>alert(\'x\')</script>\n"quoted" & --> \' onerror="alert(1)" </title></style>'


ALONE = {"meta", "img", "input", "br", "path", "circle", "line", "rect", "link"}  # elements without an end


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, texts, and what isn't closed."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ALONE:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def save_picture(file: Path, colour: tuple[int, int, int], size: int = 64, **text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    Image.new("RGB", (size, size), colour).save(file, pnginfo=info)


def write_metrics(folder: Path, rows: list[dict], cut: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + cut, encoding="utf-8")


def write_config(folder: Path, settings: dict, defaults: dict | None = None) -> None:
    notes = [f"# defaults: {json.dumps(defaults)}"] if defaults is not None else []
    notes += ["# command: python train.py --rank 16", "# versions: torch 2.9, diffusers 0.39"]
    (folder / "config.yaml").write_text("\n".join(notes) + "\n" + yaml.safe_dump(settings), encoding="utf-8")


def full_run(folder: Path, text: str = "a sks circle", last: int = 60, rank: int = 16) -> Path:
    """An output folder with everything in it; `text` in every place where people write."""
    rows = [{"step": 0, "learned": 0.0, "forgotten": 0.0}]
    for step in range(10, last + 1, 10):
        row = {"step": step, "epoch": step / 6, "loss": 1 / step, "grad_norm": 0.2, "lr_denoiser": 4e-3}
        rows.append(row | {"seconds_per_step": 0.5, "memory_gib": 7.25, "skipped_steps": 2})
        if step % 20 == 0:
            rows.append({"step": step, "held_out_loss": 0.3 - step / 1000})
            rows.append(
                {"step": step, "learned": step / 100, "learned_held_out": step / 200, "forgotten": step / 400}
            )
    write_metrics(folder, rows)
    table = [
        {"step": s, "learned": s / 100, "forgotten": s / 400, "held_out_loss": 0.3 - s / 1000}
        for s in (20, 40)
    ]
    verdict = {"step": 40, "text": f"Take step 40: {text}", "warnings": [f"warned: {text}"], "rows": table}
    (folder / "verdict.json").write_text(json.dumps(verdict), encoding="utf-8")
    data = {
        "images": 12,
        "held_out": 2,
        "captions": [[text, text, "512 x 512", "512 x 512"]],
        "findings": [text],
    }
    (folder / "data.json").write_text(
        json.dumps(data | {"buckets": [["512 x 768", 12, 0.25]]}), encoding="utf-8"
    )
    settings = {
        "rank": rank,
        "learning_rate": 4e-3,
        "validation_prompt": [text],
        "seed": 0,
        "max_train_steps": last,
    }
    write_config(folder, settings, {"rank": 4, "learning_rate": "4e-3", "validation_prompt": None, "seed": 0})
    for step in (0, 20, 40, 60):
        for p, kind in enumerate(("validation", "control")):
            for k in range(2):
                about = {"prompt": f"{kind} {text}", "seed": str(100 + k), "step": str(step), "kind": kind}
                file = folder / f"samples/step-{step:06d}/{p:02d}_{k:02d}_{kind}.png"
                save_picture(file, (step * 4, p * 90, k * 90), **about)
    save_picture(folder / "training_pictures/0.png", (9, 200, 9), 96, caption=text)
    save_picture(folder / "comparison.png", (250, 250, 250), 640)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"0" * 2048)
    (folder / "checkpoint-40").mkdir()
    (folder / "checkpoint-40" / "manifest.json").write_text("{}")
    (folder / "checkpoint-40" / "weights.bin").write_bytes(b"0" * 3 * 2**20)
    return folder


def page_of(folder: Path) -> tuple[str, Page]:
    """The page of an output folder: as text, and as a browser sees it."""
    html = write_run_page(folder).read_text(encoding="utf-8")
    return html, Page(html)


def assert_safe(html: str, page: Page, folder: Path) -> None:
    """Nothing is loaded from elsewhere, and no text has become an element.

    Every picture has a text, every link leads somewhere. folder: the page's.
    """
    assert not page.open or set(page.open) <= {"html", "td", "th", "tr"}, page.open
    tags = {name for name, _ in page.elements}
    assert not tags & {"iframe", "object", "embed", "base", "form", "audio", "video", "image"}
    assert len(page.all("script")) == 1 and not page.all("script")[0]
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/")
        if (target := attributes.get("href")) is not None:
            assert target.startswith(("#", "./")), target
    assert not re.search(r"@import|url\(", html)
    assert "default-src 'none'" in page.all("meta")[1]["content"]
    assert all(i["alt"] and int(i["width"]) > 0 and int(i["height"]) > 0 for i in page.all("img"))
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    for anchor in page.all("a"):
        target = os.fsdecode(unquote_to_bytes(anchor["href"]))
        assert target[1:] in ids if target.startswith("#") else (folder / target).exists(), target
