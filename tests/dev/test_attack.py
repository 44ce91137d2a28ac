"""attack.py: its cases are drawn by their numbers alone, and its verdicts see what falls."""

import json
import random
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SAMPLE
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_training.families import FAMILIES
from scripts.dev.attacks import runs
from scripts.dev.attacks.configurations import actions_of
from scripts.dev.attacks.damage import damage, tensors
from scripts.dev.attacks.damaged_data import write_pictures
from scripts.dev.attacks.forked_runs import JobResult
from scripts.dev.attacks.random_flags import draw_flags, to_config, values_of
from scripts.dev.attacks.verdicts import find_damaged_result, find_difference, find_failure

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (JobResult([0], ["done"], ["training: 100%|####| 2/2 [00:01<00:00]\r\n"]), None),
        (JobResult([2], [""], ["train.py: error: --rank 0 is below 1\n"]), None),
        (JobResult([1], [""], ["train.py: error: out of memory; try, in this order, ...\n"]), None),
        (JobResult([1], [""], ["train.py: error: /x: No such file\n"]), "exit code 1: train.py: error: /x"),
        (JobResult([137], [""], [""]), "exit code 137"),
        (
            JobResult(
                [0], [""], ["Exception in thread\nTraceback (most recent call last):\n  x\nKeyError: 1\n"]
            ),
            "traceback",
        ),
        (
            JobResult([1], [""], ["train.py: error: a fault of this script (x); y has the traceback\n"]),
            "a fault of this",
        ),
        (JobResult([2], [""], ["warning\ntrain.py: error: --rank\n"]), "2 lines"),
        (JobResult([2], [""], [""]), "exit code 2 without a line"),
        (JobResult([2], [""], ["train.py: error: wrong\n"]), "it names nothing"),
        (JobResult([0, 3], ["", ""], ["", ""]), "exit code 3"),
        (JobResult([0], [""], [""], timed_out=True), "it hangs"),
    ],
)
def test_what_fails_is_seen(result, expected):
    failure = find_failure(result)
    assert failure is None if expected is None else expected in failure


def test_results_that_are_not_whole_or_not_finite_are_seen(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "good.safetensors")
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    (tmp_path / ".7.half.png").write_bytes(b"still written")
    assert find_damaged_result(tmp_path) is None
    for name, raw in (
        ("x.png", (tmp_path / "good.png").read_bytes()[:40]),
        ("x.json", b"{"),
        ("x.safetensors", b""),
    ):
        (tmp_path / name).write_bytes(raw)
        assert f"not whole: {name}" in find_damaged_result(tmp_path)
        (tmp_path / name).unlink()
    save_file({"a": torch.tensor([1.0, torch.nan])}, tmp_path / "x.safetensors")
    assert find_damaged_result(tmp_path) == "not finite: a of x.safetensors"


@pytest.mark.parametrize("difference", ["nothing", "a bit", "a loss", "a file"])
def test_runs_that_differ_by_a_bit_are_seen(tmp_path, difference):
    for name in "ab":
        (tmp_path / name).mkdir()
        weight = torch.ones(3)
        if name == "b" and difference == "a bit":
            weight[1] = torch.nextafter(weight[1], torch.tensor(2.0))
        if name == "a" or difference != "a file":
            save_file({"x": weight}, tmp_path / name / "pytorch_lora_weights.safetensors")
        loss = 0.5 + 1e-9 * (name == "b" and difference == "a loss")
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss}) + "\n")
    assert (find_difference(tmp_path / "a", tmp_path / "b") is None) == (difference == "nothing")


@pytest.mark.parametrize("family", FAMILIES)
def test_configurations_are_drawn_of_all_flags_and_by_the_number_alone(family):
    actions = actions_of(family)
    flags = {option for action in actions for option in action.option_strings}
    for action in actions:
        if action.nargs != 0 and "help" not in action.dest:
            good, others = values_of(action)  # a flag of a new kind needs values in flag_values.py
            assert good and others or "num_new_tokens" in action.dest
    drawn = [[draw_flags(actions, random.Random(f"{n}")) for n in range(400)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    words = {word.split("=")[0] for case in drawn[0] for word in case}
    assert len(flags & words) > 0.75 * len([a for a in actions if a.option_strings])
    for case in drawn[0][:50]:
        json.dumps(to_config(case, random.Random(1)))


def test_damages_are_drawn_by_the_number_alone_and_change_the_file(tmp_path):
    save_file(
        {"a": torch.ones(4), "b": torch.ones(2, 2)}, tmp_path / "whole.safetensors", metadata={"x": "y"}
    )
    whole = (tmp_path / "whole.safetensors").read_bytes()
    seen, same = set(), 0
    for number in range(80):
        found = []
        for name in ("a.safetensors", "b.safetensors"):
            file = tmp_path / name
            file.write_bytes(whole)
            how = damage(file, random.Random(number))
            found.append((how, file.read_bytes() if file.is_file() else None))
            file.rmdir() if file.is_dir() else file.unlink(missing_ok=True)
        assert found[0] == found[1]
        seen.add(found[0][0])
        same += found[0][1] == whole
    assert seen >= {"tensors", "cut", "flip", "overwritten", "moved", "replaced", "gone"} and same < 5
    (tmp_path / "c.safetensors").write_bytes(tensors(whole, random.Random(2)))
    reads = []
    for number in range(30):  # many are well-formed, with wrong content
        (tmp_path / "c.safetensors").write_bytes(tensors(whole, random.Random(number)))
        try:
            reads.append(load_file(tmp_path / "c.safetensors"))
        except Exception:
            reads.append(None)
    assert sum(read is not None for read in reads) > 8


def test_programs_are_run_killed_and_timed_in_forked_processes(tmp_path):
    """Without the libraries, which this program needs no more than the one that it runs."""
    (tmp_path / "wait.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from scripts.dev.attacks.forked_program import run_program
from scripts.dev.attacks.forked_runs import Job, run_cases
WAIT = {str(tmp_path / "wait.py")!r}
def case(folder):
    first = yield Job("scripts/dev/compare_recipes.py", ["--help"])
    killed = yield Job(WAIT, [], after=0.3, signal={int(signal.SIGTERM)})
    slow = yield Job(WAIT, [], limit=0.3)
    two = yield Job(WAIT, [], processes=2, after=0.3)
    return [first.codes, killed.codes, killed.out, slow.timed_out, two.codes, "usage" in first.out[0]]
run_cases([case, case], 2, lambda index, result: print(index, result), run_program)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    line = "[[0], [143], ['begun\\n'], True, [137, 143], True]"
    assert sorted(found.stdout.splitlines()) == [f"0 {line}", f"1 {line}"], found.stderr


def test_pictures_that_are_damaged_are_of_many_kinds(tmp_path):
    assert SAMPLE == runs.DATA
    endings = {f.suffix for n in range(9) for f in write_pictures(tmp_path / str(n), random.Random(n))}
    assert endings >= {".png", ".jpg", ".webp", ".gif"}
