"""Pages of folders that are cut off, of another shape, hostile, or lack something."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from run_folders import HOSTILE, Page, assert_safe, full_run, page_of, save_picture, write_metrics

from lora_training.report import write_comparison_page
from lora_training.report.plots import smoothed

pytestmark = pytest.mark.unit


def test_hostile_words_stay_words(tmp_path):
    folder = full_run(tmp_path / "<b onload='x'>&\"", HOSTILE)
    save_picture(folder / "samples/step-000060/javascript:alert(1).png", (1, 2, 3))
    (folder / "javascript:alert(1)").write_text("")
    (folder / "\udcff.txt").write_text("")  # a name that isn't text
    html, page = page_of(folder)
    assert_safe(html, page, folder)
    assert "<script>alert" not in html and "<b onload" not in html
    assert html.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") > 12
    assert any("alert('x')" in i["alt"] and "\n" in i["alt"] for i in page.all("img"))
    other = write_comparison_page(
        [folder, full_run(tmp_path / "b", HOSTILE, rank=8)], tmp_path / "compare.html"
    )
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


@pytest.mark.parametrize(
    "value", [0.0, -3.0, 1e-30, 1e30, 7, 10**400, -1e308, True, "0.5", None], ids=lambda v: repr(v)[:9]
)
def test_any_number_can_be_drawn(tmp_path, value):
    for rows in ([value], [value, 0.5], [value] * 3, [0.0, 1e-9, value]):
        write_metrics(
            tmp_path, [{"step": s, "loss": v, "learned": v, "other": v} for s, v in enumerate(rows)]
        )
        assert_safe(*page_of(tmp_path), tmp_path)
