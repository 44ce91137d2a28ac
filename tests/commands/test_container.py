"""The Dockerfile: read by a linter, and by what it takes from the project. No Docker is here to build it."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch

import pytest
from conftest import ROOT

pytestmark = pytest.mark.unit
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint has no wheel for this system")
def test_the_linter_finds_nothing():
    result = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_the_base_has_the_cuda_of_the_locked_torch():
    lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    (toolkit,) = [package for package in lock["package"] if package["name"] == "cuda-toolkit"]
    assert f"ARG BASE_IMAGE=nvidia/cuda:{'.'.join(toolkit['version'].split('.')[:2])}." in TEXT


def test_everything_that_is_needed_goes_into_the_container_and_nothing_private():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    ignored = [line for line in ignored if line and not line.startswith("#")]
    for files in re.findall(r"^COPY (?!--from)(.+) \./$", TEXT, re.MULTILINE):
        assert all((ROOT / name).is_file() for name in files.split())
    needed = {"lora_training", "scripts", "config", "assets", "docs", "uv.lock", "requirements.txt"}
    needed |= {path.name for pattern in ("*.py", "run_*.sh") for path in ROOT.glob(pattern)}
    private = {".env", ".git", ".venv", "output", "wandb", "pictures"}
    for names, is_ignored in ((needed, False), (private, True)):
        assert {name: any(fnmatch(name, line) for line in ignored) for name in names} == dict.fromkeys(
            names, is_ignored
        )


def test_it_runs_as_a_user_whose_volumes_are_those_of_the_command_above():
    assert re.findall(r"^USER (.+)$", TEXT, re.MULTILINE) == ["${USER_ID}"]
    volumes = re.findall(r'"(/[^"]+)"', re.search(r"^VOLUME (.+)$", TEXT, re.MULTILINE)[1])
    mounted = re.findall(r"-v \./\w+:(/\w+)", TEXT)
    made = re.search(r"install -d -o trainer (.+) \\$", TEXT, re.MULTILINE)[1].split()
    assert volumes == mounted == made
    assert "HF_HOME=/hub" in TEXT
