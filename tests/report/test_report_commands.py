"""scripts/reports/: pages where they are asked for, runs compared, and errors of one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from run_folders import Page, assert_safe, full_run, write_metrics

from lora_training.errors import UserError
from lora_training.report import write_run_page
from scripts.reports import compare_runs, report

pytestmark = pytest.mark.unit


def test_the_report_is_where_it_is_asked_for_and_its_links_lead_back(tmp_path, capsys):
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
    write_run_page(two)
    three = tmp_path / "bare"
    write_metrics(three, [{"step": 10, "loss": 0.75}])
    out = tmp_path / "compare.html"
    assert compare_runs.main([str(f) for f in (one, two, three)] + ["-o", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    page = Page(html)
    assert_safe(html, page, tmp_path)
    assert (
        "x/run" in page.text and "y/run" in page.text and "Take step 40" in page.text and "0.75" in page.text
    )
    settings = html[html.index('id="settings-that-differ"') : html.index('id="curves"')]
    assert (
        "<td>rank<td>4<td>32<td>–</tr>" in settings
        and "<td>max_train_steps<td>60<td>80<td>–</tr>" in settings
    )
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
    wrong = {
        "nowhere": "no such folder",
        "empty": "nothing that a training run leaves",
        "file": "not a folder",
    }
    for folder, message in wrong.items():
        assert tool.main([*more, str(tmp_path / folder)]) == 2
        error_line = capsys.readouterr().err
        assert error_line.count("\n") == 1 and error_line.startswith(
            f"{name}: error: {tmp_path / folder}: {message}"
        )
    assert (
        tool.main(
            [
                *more,
                str(tmp_path / "full" / "samples" / ".." / ".." / "full"),
                "-o",
                str(tmp_path / "no" / "x.html"),
            ]
        )
        == 2
    )
    error_line = capsys.readouterr().err
    assert error_line.count("\n") == 1 and error_line.startswith(f"{name}: error: ")
    with pytest.raises(UserError):
        write_run_page(tmp_path / "empty")


def test_one_run_cannot_be_compared(tmp_path, capsys):
    assert compare_runs.main([str(tmp_path)]) == 2
    assert "at least two" in capsys.readouterr().err


def test_it_starts_without_torch_and_without_the_templates(tmp_path):
    folder = full_run(tmp_path / "mine")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from lora_training.prepare import page;"
        "from lora_training.report import write_comparison_page, write_run_page;"
        "early = {'jinja2', 'markupsafe'} & set(sys.modules);"
        f"write_run_page({str(folder)!r});"
        "print(sorted(early | {'torch', 'numpy', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr
