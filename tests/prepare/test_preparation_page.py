"""report.html of a training set."""

from __future__ import annotations

import re

import pytest
from photo_folders import EVERY_STEP, prepare

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("prepare")]


def test_the_report_is_one_file_that_escapes_what_people_write(phone, tmp_path):
    out = tmp_path / "out"
    (phone / "IMG_2.caption").write_text("<script>alert(1)</script> & co")
    assert prepare("-d", phone, "-o", out, *EVERY_STEP) == 0
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in html and "<script>alert" not in html
    assert not re.search(r'(src|href)="(?!data:image/jpeg;base64,)', html)
    assert html.count("<figure") == 15 and html.count("data:image") == 13  # two could not be decoded
    for text in (
        "duplicate of IMG_1.JPG",
        "too small: 100 x 100",
        "no caption",
        "112 × 144",
        "400 × 300 → ",
    ):
        assert text in html, text
