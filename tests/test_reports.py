"""The reports of training runs: made from folders that are written here, whole, empty, cut off, old and hostile ones."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
import yaml
from conftest import ROOT
from PIL import Image, PngImagePlugin

from scripts.reports import compare_runs, report
from scripts.reports.parts.plots import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Curve,
    Plot,
    nice_ticks,
    svg_of,
    thinned,
)
from scripts.reports.parts.run_folder import FolderError, read_metrics, read_run, smoothed
from scripts.reports.parts.sections import same, show
from scripts.reports.report import write_report

pytestmark = pytest.mark.unit
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


def full_run(folder: Path, words: str = "a sks circle", last: int = 60, rank: int = 16) -> Path:
    """An output folder with everything in it; `words` in every place where people write."""
    rows = [{"step": 0, "learned": 0.0, "forgotten": 0.0}]
    for step in range(10, last + 1, 10):
        row = {"step": step, "epoch": step / 6, "loss": 1 / step, "grad_norm": 0.2, "lr_denoiser": 4e-3}
        rows.append(row | {"seconds_per_step": 0.5, "memory_gib": 7.25, "skipped_steps": 2})
        if step % 20 == 0:
            rows.append({"step": step, "held_out_loss": 0.3 - step / 1000})
            rows.append({"step": step, "learned": step / 100, "learned_held_out": step / 200, "forgotten": step / 400})
    write_metrics(folder, rows)
    table = [{"step": s, "learned": s / 100, "forgotten": s / 400, "held_out_loss": 0.3 - s / 1000} for s in (20, 40)]
    verdict = {"step": 40, "text": f"Take step 40: {words}", "warnings": [f"warned: {words}"], "rows": table}
    (folder / "verdict.json").write_text(json.dumps(verdict), encoding="utf-8")
    data = {"images": 12, "held_out": 2, "captions": [[words, words, "512 x 512", "512 x 512"]], "findings": [words]}
    (folder / "data.json").write_text(json.dumps(data | {"buckets": [["512 x 768", 12, 0.25]]}), encoding="utf-8")
    settings = {"rank": rank, "learning_rate": 4e-3, "validation_prompt": [words], "seed": 0, "max_train_steps": last}
    write_config(folder, settings, {"rank": 4, "learning_rate": "4e-3", "validation_prompt": None, "seed": 0})
    for step in (0, 20, 40, 60):
        for p, kind in enumerate(("validation", "control")):
            for k in range(2):
                text = {"prompt": f"{kind} {words}", "seed": str(100 + k), "step": str(step), "kind": kind}
                save_picture(
                    folder / f"samples/step-{step:06d}/{p:02d}_{k:02d}_{kind}.png", (step * 4, p * 90, k * 90), **text
                )
    save_picture(folder / "training_pictures/0.png", (9, 200, 9), 96, caption=words)
    save_picture(folder / "comparison.png", (250, 250, 250), 640)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"0" * 2048)
    (folder / "checkpoint-40").mkdir()
    (folder / "checkpoint-40" / "manifest.json").write_text("{}")
    (folder / "checkpoint-40" / "weights.bin").write_bytes(b"0" * 3 * 2**20)
    return folder


def page_of(folder: Path) -> tuple[str, Page]:
    html = write_report(folder).read_text(encoding="utf-8")
    return html, Page(html)


def assert_safe(html: str, page: Page, folder: Path) -> None:
    """Nothing is loaded from elsewhere, no text has become an element, every picture has a text, every link leads somewhere."""
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


def test_a_full_run_has_every_section(tmp_path):
    folder = full_run(tmp_path / "mine")
    assert write_report(folder) == folder / "report.html"
    html, page = page_of(folder)
    assert_safe(html, page, folder)
    found = re.findall(r'<section id="([a-z-]+)">', html)
    assert found == ["verdict", "before-after", "samples", "control", "curves", "data", "settings", "command", "files"]
    for words in (
        *(
            "Take step 40: a sks circle",
            "warned: a sks circle",
            "2 steps were left out",
            "base",
            "finished",
            "60 steps",
        ),
        *("Trained on", "seed 100", "control a sks circle", "512 × 768", "25% cropped", "12", "held out", "advised"),
        *(
            "python train.py --rank 16",
            "torch 2.9, diffusers 0.39",
            "checkpoint-40",
            "3.0 MiB",
            "2.0 KiB",
            "metrics.jsonl",
        ),
    ):
        assert words in page.text, words
    titles = re.findall(r"<h3>([^<]+)</h3><p>([^<]+)</p>", html)
    names = [name for name, _ in titles]
    assert names[:5] == ["Loss", "Learned and forgotten", "Held-out loss", "Gradient norm", "Learning rate"]
    assert names[5:] == ["Seconds per step", "Memory", "Steps left out"]
    assert all("ood" in about for _, about in titles)  # each says what is good
    assert [p for p in folder.iterdir() if "partial" in p.name] == []


def test_only_settings_that_differ_from_the_defaults_are_in_the_open(tmp_path):
    html, _ = page_of(full_run(tmp_path / "mine"))
    changed = html[html.index('id="settings"') : html.index("<summary>All 5 settings")]
    assert "<td>rank<td>16<td>4</tr>" in changed and "validation_prompt" in changed and "max_train_steps" in changed
    assert "<td>learning_rate" not in changed and "<td>seed" not in changed
    write_config(tmp_path / "mine", {"rank": 16, "nothing": None, "list": [1, 2.5]})
    html, _ = page_of(tmp_path / "mine")
    settings = html[html.index('id="settings"') : html.index('id="command"')]
    assert "<summary>All 3 settings" in settings and "default" not in settings
    assert "<td>nothing<td>none" in settings and "<td>list<td>1, 2.5" in settings


def test_values_that_are_one_setting():
    assert same("1e-4", 0.0001) and same([64], 64) and same([1, "2"], (1, 2)) and same(None, None)
    assert not same(True, 1.5) and not same(None, 0) and not same([1, 2], [1]) and not same("a", "b")
    assert show(1e-4) == "0.0001" and show(False) == "false" and show({"a": "é"}) == '{"a": "é"}'


def test_hostile_words_stay_words(tmp_path):
    folder = full_run(tmp_path / "<b onload='x'>&\"", HOSTILE)
    save_picture(folder / "samples/step-000060/javascript:alert(1).png", (1, 2, 3))
    (folder / "javascript:alert(1)").write_text("")
    (folder / "\udcff.txt").write_text("")  # a name that isn't text
    html, page = page_of(folder)
    assert_safe(html, page, folder)
    assert "<script>alert" not in html and "<b onload" not in html
    assert html.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") > 12
    assert any("alert('x')" in i["alt"] and "\n" in i["alt"] for i in page.all("img"))
    other = compare_runs.compare([folder, full_run(tmp_path / "b", HOSTILE, rank=8)], tmp_path / "compare.html")
    html = other.read_text(encoding="utf-8")
    assert_safe(html, Page(html), tmp_path)
    assert "<script>alert" not in html and "<b onload" not in html


def test_anything_may_be_missing(tmp_path):
    whole = full_run(tmp_path / "whole")
    for i, name in enumerate(sorted(p.name for p in whole.iterdir())):
        folder = full_run(tmp_path / f"without{i}")
        target = folder / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()
        assert_safe(*page_of(folder), folder)
    for name in ("metrics.jsonl", "config.yaml", "verdict.json", "comparison.png"):
        folder = tmp_path / f"only_{name}"
        folder.mkdir()
        (folder / name).write_text("")
        assert_safe(*page_of(folder), folder)


@pytest.mark.parametrize(
    "text", ["[1, 2]", '{"step": "x", "text": 3, "warnings": "no", "rows": 7, "captions": [1, [2]]}', '{"cut']
)
def test_files_of_another_shape_do_no_harm(tmp_path, text):
    folder = full_run(tmp_path / "mine")
    for name in ("verdict.json", "data.json"):
        (folder / name).write_text(text)
    (folder / "config.yaml").write_text(f"# defaults: {text}\nrank: [1\n  :")
    html, page = page_of(folder)
    assert_safe(html, page, folder)
    assert "can't be read as YAML" in page.text


def test_a_started_run_says_that_it_is_not_finished(tmp_path):
    write_metrics(tmp_path, [{"step": 10, "loss": 0.5}], cut='{"step": 20, "lo')
    write_config(tmp_path, {"max_train_steps": 350})
    html, page = page_of(tmp_path)
    assert "not finished" in page.text and "10 of 350 steps" in page.text
    assert read_metrics(tmp_path / "metrics.jsonl") == {"loss": [(10, 0.5)]}
    write_metrics(tmp_path, [{"step": 10, "loss": 0.5}, {"step": 20, "loss": 0.4}])
    assert "20 of 350 steps" in page_of(tmp_path)[1].text  # the page is written over


def test_numbers_that_are_not_finite(tmp_path):
    rows = [{"step": s, "loss": 0.5, "grad_norm": "nan"} for s in range(10, 60, 10)]
    rows[2]["loss"], rows[3]["loss"] = "nan", "inf"
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows)
        + '{"step": 60, "loss": NaN}\n{"step": 70, "loss": 1e999}\n[1]\n{"step": true}\n'
    )
    html, page = page_of(tmp_path)
    assert_safe(html, page, tmp_path)
    assert "Not finite at step 30, 40, 60, 70: the red triangles." in page.text
    assert "None of the 5 values is finite." in page.text
    assert "nan" not in " ".join(attrs.get("d", "") for attrs in page.all("path"))
    assert smoothed([(1, 2.0), (2, math.nan), (3, 2.0)]) == [(1, 2.0), (3, 2.0)]


def position(curve: Curve, plot: Plot) -> list[tuple[float, float]]:
    """Where a curve's points lie, read back through the labels of the axes."""
    svg = svg_of(plot)
    labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)</text>', svg)
    across = [(float(x), float(t)) for x, y, _, t in labels if float(y) > HEIGHT - BOTTOM + 10 and _ == "middle"]
    upright = [(float(y) - 4, float(t)) for x, y, _, t in labels if float(x) == LEFT - 6]

    def read(place: float, known: list[tuple[float, float]]) -> float:
        (a, va), (b, vb) = known[0], known[-1]
        return va + (place - a) / (b - a) * (vb - va)

    path = re.findall(r'class="curve [^"]*" d="([^"]+)"', svg)[plot.curves.index(curve)]
    drawn = [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in drawn)
    return [(read(x, across), read(y, upright)) for x, y in drawn]


def test_curves_lie_where_their_values_are():
    points = [(s, 0.1 + (s - 170) ** 2 / 1e5) for s in range(10, 351, 10)]
    other = [(s, 0.2 + s / 1000) for s in range(50, 351, 50)]
    plot = Plot("Loss", "", [Curve("a", points), Curve("b", other, 1)])
    for curve, wanted in zip(plot.curves, (points, other), strict=True):
        drawn = position(curve, plot)
        assert len(drawn) == len(wanted)
        for (step, value), (x, y) in zip(wanted, drawn, strict=True):
            assert abs(x - step) < 0.5 and abs(y - value) < 0.002, (step, value, x, y)


def test_the_pointer_and_the_legend_tell_the_values(tmp_path):
    html, page = page_of(full_run(tmp_path / "mine"))
    assert "<b>0.01667</b>" in html  # 1 / 60, the last loss
    stops = [attrs["data-values"].split("|") for attrs in page.all("g")]
    assert ["step 40", "0.025"] in [s[:2] for s in stops]
    assert ["step 40", "40%", "20%", "10%"] in stops
    assert "step 40: learned 40%, learned, held-out pictures 20%, forgotten 10%" in page.text
    assert "held-out pictures <b>0.24</b>" in html
    assert "7.25" in page.text and "30 s" in page.text  # memory; 60 steps of half a second


def test_a_spike_does_not_flatten_the_rest():
    points = [(s, 0.5 + s / 1000) for s in range(100)] + [(100, 500.0)]
    plot = Plot("Gradient norm", "", [Curve("a", points)], from_zero=True)
    drawn = position(plot.curves[0], plot)
    assert abs(drawn[50][1] - 0.55) < 0.01 and drawn[-1][1] < 2


@pytest.mark.parametrize(
    "value", [0.0, -3.0, 1e-30, 1e30, 7, 10**400, -1e308, True, "0.5", None], ids=lambda v: repr(v)[:9]
)
def test_any_number_can_be_drawn(tmp_path, value):
    for rows in ([value], [value, 0.5], [value] * 3, [0.0, 1e-9, value]):
        write_metrics(tmp_path, [{"step": s, "loss": v, "learned": v, "other": v} for s, v in enumerate(rows)])
        assert_safe(*page_of(tmp_path), tmp_path)


def test_many_points_are_thinned_but_not_their_ends():
    points = [(s, math.sin(s) + (9.0 if s == 5003 else 0)) for s in range(10_000)]
    kept = thinned(points)
    assert len(kept) < 700 and points[5003] in kept and kept[-1] == points[-1] and kept == sorted(kept)
    assert nice_ticks(0, 1, 6) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_smoothing_is_a_mean_that_starts_at_the_first_value():
    assert smoothed([(1, 3.0)]) == [(1, 3.0)]
    noisy = [(s, 1.0 + (-1) ** s * 0.5) for s in range(200)]
    assert all(abs(v - 1) < 0.1 for _, v in smoothed(noisy)[50:])


def test_pictures_come_with_their_prompt_seed_and_step(tmp_path):
    folder = full_run(tmp_path / "mine")
    run = read_run(folder)
    assert [(s.step, s.seed) for s in run.samples if s.control and s.place[1] == 1] == [
        (s, "101") for s in (0, 20, 40, 60)
    ]
    html, page = page_of(folder)
    alts = [i["alt"] for i in page.all("img")]
    for step in ("before", "step 20", "step 40, advised", "step 60, last"):
        assert f"validation a sks circle: {step}, seed 100" in alts
    pair = html[html.index('class="pair"') :]
    pair = pair[: pair.index("</figure>")]
    assert re.findall(r"<small>([^<]+)</small>", pair) == ["before", "step 40, advised", "step 60, last", "seed 100"]
    colours = []
    for found in re.findall(r"base64,([\w+/=]+)", pair):
        with Image.open(io.BytesIO(base64.b64decode(found))) as image:
            colours.append(image.convert("RGB").getpixel((30, 30)))
    assert colours == [(0, 0, 0), (160, 0, 0), (240, 0, 0)]
    assert html.count('data-names="before|step 20|step 40, advised|step 60, last"') == 2
    assert html.count('class="shot on" data-i="3"') == 4 and html.count('class="shot" data-i="0"') == 4


def test_pictures_of_older_scripts_have_names_alone(tmp_path):
    for step in (0, 20, 40):
        for k in range(2):
            save_picture(tmp_path / f"samples/step-{step:06d}/00_{k:02d}.png", (step, 0, 0))
    (tmp_path / "samples/step-000040/00_01.png").write_bytes(b"half a picture")
    (tmp_path / "samples/step-000020/00_00.png").unlink()
    (tmp_path / "samples/step-x").mkdir()
    place = tmp_path / "logs" / "lora" / "1"
    place.mkdir(parents=True)
    (place / "hparams.yml").write_text("validation_prompt: '[''a sks circle'']'\nsnr_gamma: None\nrank: 16\n")
    html, page = page_of(tmp_path)
    assert_safe(html, page, tmp_path)
    assert "a sks circle: before, picture 1" in [i["alt"] for i in page.all("img")]
    assert "no picture" in page.text and "not drawn" in page.text
    assert "<td>snr_gamma<td>none" in html and "<td>rank<td>16" in html


def test_a_run_of_six_validations_stays_below_eight_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (1024, 1024, 3), dtype=np.uint8)  # no picture is harder to make small
    Image.fromarray(noise).save(tmp_path / "noise.png", compress_level=0)
    for step in range(0, 6):
        folder = tmp_path / f"samples/step-{step * 100:06d}"
        folder.mkdir(parents=True)
        for k in range(8):
            shutil.copy(tmp_path / "noise.png", folder / f"00_{k:02d}.png")
    Image.fromarray(np.tile(noise, (2, 2, 1))).save(tmp_path / "comparison.png", compress_level=0)
    for k in range(8):
        (tmp_path / "training_pictures").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / f"training_pictures/{k}.jpg")
    html, page = page_of(tmp_path)
    assert len(page.all("img")) == 8 * 6 + 8 * 2 + 8 + 1
    assert len(html) < 8_000_000
    assert all(int(i["width"]) >= 128 for i in page.all("img"))


def test_of_many_steps_the_ends_and_the_advised_one_are_shown(tmp_path):
    for step in range(0, 1000, 10):
        save_picture(tmp_path / f"samples/step-{step:06d}/00_00.png", (step % 255, 0, 0), 16)
    (tmp_path / "verdict.json").write_text('{"step": 410, "text": "Take step 410"}')
    html, page = page_of(tmp_path)
    names = page.all("div")[[("films" in a.get("class", "")) for a in page.all("div")].index(True)]["data-names"].split(
        "|"
    )
    assert len(names) <= 24 and names[0] == "before" and names[-1] == "step 990, last" and "step 410, advised" in names


def test_the_report_is_where_it_is_wanted_and_its_links_lead_back(tmp_path, capsys):
    folder = full_run(tmp_path / "runs" / "a run")
    (tmp_path / "pages").mkdir()
    assert report.main([str(folder), "-o", str(tmp_path / "pages" / "out.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "pages" / "out.html")
    html = (tmp_path / "pages" / "out.html").read_text(encoding="utf-8")
    links = [a["href"] for a in Page(html).all("a") if not a["href"].startswith("#")]
    assert "./../runs/a%20run/metrics.jsonl" in links and "./../runs/a%20run/checkpoint-40/" in links
    assert not (folder / "report.html").exists()


def test_comparing_runs(tmp_path, capsys):
    one, two = full_run(tmp_path / "x" / "run", rank=4), full_run(tmp_path / "y" / "run", last=80, rank=32)
    write_report(two)
    three = tmp_path / "bare"
    write_metrics(three, [{"step": 10, "loss": 0.75}])
    out = tmp_path / "compare.html"
    assert compare_runs.main([str(f) for f in (one, two, three)] + ["-o", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    page = Page(html)
    assert_safe(html, page, tmp_path)
    assert "x/run" in page.text and "y/run" in page.text and "Take step 40" in page.text and "0.75" in page.text
    settings = html[html.index('id="settings-that-differ"') : html.index('id="curves"')]
    assert "<td>rank<td>4<td>32<td>–</tr>" in settings and "<td>max_train_steps<td>60<td>80<td>–</tr>" in settings
    assert "learning_rate" not in settings
    assert "y/run <b>0.0125</b>" not in html  # the curve is smoothed
    stops = [attrs["data-values"].split("|") for attrs in page.all("g")]
    assert ["step 60", "60%", "60%"] in stops and ["step 80", "60%", "80%"] in stops
    alts = [i["alt"] for i in page.all("img")]
    for name in ("x/run", "y/run"):
        assert f"validation a sks circle: {name}, step 60, seed 100" in alts
    assert len(alts) == 8 and "(control)" in page.text and "not drawn" in page.text
    assert "./y/run/report.html" in [a["href"] for a in page.all("a")]
    capsys.readouterr()


@pytest.mark.parametrize("tool", [report, compare_runs])
def test_errors_are_one_line(tool, tmp_path, capsys):
    name = Path(tool.__file__).name
    full = str(full_run(tmp_path / "full"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    more = [full] if tool is compare_runs else []
    wrong = {"nowhere": "no such folder", "empty": "nothing that a training run leaves", "file": "not a folder"}
    for folder, words in wrong.items():
        assert tool.main([*more, str(tmp_path / folder)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith(f"{name}: error: {tmp_path / folder}: {words}")
    assert (
        tool.main(
            [*more, str(tmp_path / "full" / "samples" / ".." / ".." / "full"), "-o", str(tmp_path / "no" / "x.html")]
        )
        == 2
    )
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"{name}: error: ")
    with pytest.raises(FolderError):
        write_report(tmp_path / "empty")


def test_one_run_cannot_be_compared(tmp_path, capsys):
    assert compare_runs.main([str(tmp_path)]) == 2
    assert "at least two" in capsys.readouterr().err


def test_it_starts_without_torch(tmp_path):
    folder = full_run(tmp_path / "mine")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from scripts.reports.report import write_report;"
        f"write_report({str(folder)!r}); print(sorted({{'torch', 'numpy', 'diffusers'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_pictures_of_one_step_are_not_called_before_and_after(tmp_path):
    save_picture(tmp_path / "samples/step-000000/00_00.png", (0, 0, 0))
    assert "Pictures before training" in page_of(tmp_path)[1].text
    save_picture(tmp_path / "samples/step-000010/00_00.png", (0, 0, 0))
    html, page = page_of(tmp_path)
    assert "Before and after" in page.text and 'type="range"' not in html  # two steps need no slider
