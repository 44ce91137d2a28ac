"""The counter of training steps: it sees what is planted, and no step needs more than counts.json says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from scripts.dev import ROOT
from scripts.dev.step_counter import records
from scripts.dev.step_counter.fake_device import shared_library

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs Linux and g++"),
]
LOOP = """
import torch
class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
    def forward(self, x):
        return self.layers(x)
denoiser = Denoiser().to("cuda", torch.bfloat16)
optimizer = torch.optim.AdamW(denoiser.parameters())
for step in range(9):
    x = torch.randn(2, 4, 32, device="cuda", dtype=torch.bfloat16)
    loss = denoiser(x).float().square().mean()
    {planted}
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""
LINE = LOOP[: LOOP.index("{planted}")].count("\n") + 1
PLANTED = {  # what is planted: (the line, by how much it raises the counts; or the error that it is)
    "nothing": ("pass", {}),
    "a wait": ("loss.item()", {"waits": 1}),
    "a list read": ("loss.new_empty(4).tolist()", {"waits": 1, "copies": 1}),
    "a blocking copy": ("torch.zeros(3).to('cuda')", {"waits": 1, "copies": 1}),
    "a copy that doesn't block": ("torch.zeros(3).to('cuda', non_blocking=True)", {"copies": 1}),
    "a float32 copy": (
        "y = x.float()",
        {"casts": 1, "cast_traffic": 1536, "traffic": 1536, "kernels": 1, "peak": 1024},
    ),
    "a product": (
        "x.new_empty(16, 16).mm(x.new_empty(16, 16))",
        {"flop": 2 * 16**3, "kernels": 1, "traffic": 1536},
    ),
    "a product that adds": (
        "x.new_empty(16, 16).addmm_(x.new_empty(16, 16), x.new_empty(16, 16))",
        {"flop": 2 * 16**3, "kernels": 1, "traffic": 2048},
    ),
    "memory kept": ("x.kept = x.new_empty(32 << 20)", {"peak": 64 << 20}),
    "two devices mixed": ("loss = (loss + torch.ones(2)).sum()", "cuda:0 and cpu"),
}
DRIVER = """
import json, sys
from pathlib import Path
from scripts.dev.step_counter.counting import count_step
from scripts.dev.step_counter.programs import Program
counts = {}
for script in sorted(Path(sys.argv[1]).glob("*.py")):
    work = script.with_suffix("")
    work.mkdir()
    counts[script.stem] = count_step(lambda _: Program(script, [], script.parent, ("Denoiser",)), work)
Path(sys.argv[1], "counts.json").write_text(json.dumps(counts))
"""


@pytest.fixture(scope="module")
def planted_counts(tmp_path_factory) -> dict[str, dict]:
    """{what is planted: the counts of its loop}"""
    folder = tmp_path_factory.mktemp("planted")
    for number, (planted, _) in enumerate(PLANTED.values()):
        (folder / f"{number}.py").write_text(LOOP.replace("{planted}", planted), encoding="utf-8")
    environment = os.environ | {"LD_PRELOAD": str(shared_library())}
    subprocess.run([sys.executable, "-c", DRIVER, str(folder)], check=True, cwd=ROOT, env=environment)
    counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    return {name: counts[str(number)] for number, name in enumerate(PLANTED)}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_raises_the_right_counts(planted_counts, name):
    """By the right amount, and no others; a wait is found where it stands."""
    expected, counts, plain = PLANTED[name][1], planted_counts[name], planted_counts["nothing"]
    if isinstance(expected, str):
        assert expected in counts["error"]
        return
    names = ("kernels", "traffic", "flop", "casts", "cast_traffic", "copies", "waits", "peak")
    growth = {each: records.total(counts, each) - records.total(plain, each) for each in names}
    assert {each: number for each, number in growth.items() if number} == expected
    assert records.total(plain, "kernels") > 20 and not plain["waits"]
    assert all(f".py:{LINE} <module>" in place for place in counts["waits"])


def test_no_step_needs_more_than_before():
    """Kernels, waits, bytes and memory of a step on the toys' sizes; what has grown is named."""
    command = [sys.executable, "scripts/dev/count_step.py", "--tiny", "--check"]
    check = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    grown = [line for line in check.stdout.splitlines() if "MORE" in line or "waits" in line]
    assert check.returncode == 0, "\n".join(grown) or check.stdout + check.stderr


def test_growth_is_told_with_its_place():
    before = {"kernels": {"forward": 5}, "waits": {}, "traffic": 10, "flop": 1, "casts": 0, "copies": 0}
    before |= {"peak": 100, "resident": 50, "places": {"forward: a.py step": 5}}
    now = before | {"kernels": {"forward": 7}, "places": {"forward: a.py step": 4, "forward: b.py cast": 3}}
    now |= {"waits": {"item at b.py:3 cast": 2}, "peak": 90}
    assert records.list_growth(before, now) == [
        "kernels: 5 -> 7 (2)",
        "  +3 forward: b.py cast",
        "waits: 0 -> 2 (2)",
        "  +2 item at b.py:3 cast",
    ]
    assert records.list_growth(now, now) == []
