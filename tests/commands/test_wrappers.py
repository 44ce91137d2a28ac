"""The wrappers and the Slurm script: what they start, and what they show where nothing is installed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest
from conftest import FAMILIES, ROOT, SAMPLE, losses, weights

from scripts.start import set_up

pytestmark = pytest.mark.run
WRAPPERS = ("run_lora_train", "run_lora_infer", "run_prepare_dataset", "run_tests")


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_for_bash_and_windows_start_the_same_job(name):
    bash, batch = (ROOT / f"{name}.sh").read_text(), (ROOT / f"{name}.bat").read_bytes()
    assert f'scripts/start/set_up.py {name} "$@"' in bash and len(bash.splitlines()) < 9
    assert b"\n" not in batch.replace(b"\r\n", b"")
    lines = batch.decode("ascii").split("\r\n")
    assert lines[0] == "@echo off" and lines[-2] == "exit /b %errorlevel%"
    assert f"%python% scripts\\start\\set_up.py {name} %*" in lines and 'cd /d "%~dp0"' in lines
    assert name in set_up.JOBS and (ROOT / set_up.JOBS[name][0]).is_file()


@pytest.mark.parametrize("wrapper", sorted(p.stem for p in ROOT.glob("run_*.bat")))
def test_a_batch_file_starts_what_its_bash_twin_starts(wrapper):
    """By reading: no Windows is here. Arguments and exit code are handed on, from any folder."""
    text = (ROOT / f"{wrapper}.bat").read_bytes().decode("ascii")
    assert text.lower().startswith("@echo off") and "%~dp0" in text and "%*" in text
    programs = re.findall(r"[\w./]+\.py", (ROOT / f"{wrapper}.sh").read_text())
    for program in re.findall(r"[\w.\\/]+\.py", text):
        assert (ROOT / program.replace("\\", "/")).is_file()
    assert not programs or any(Path(p).name in text for p in programs)


def copy_project(folder: Path) -> Path:
    """A copy of what the wrappers need, without pictures, bases and environment."""
    for name in ("config", "docs/help", "scripts", "lora_training"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for pattern in ("train_*.py", "infer_lora.py", "run_*.sh", "requirements*.txt"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def bare_clone(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """(a copy of the project, the environment of a Python without any package); pip finds no index."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "python", with_pip=False)
    path = f"{folder / 'python' / 'bin'}:/usr/bin:/bin"
    return copy_project(folder / "clone"), {"PATH": path, "HOME": str(folder), "PIP_NO_INDEX": "1"}


@pytest.mark.parametrize(
    ("command", "texts"),
    [
        (
            "run_lora_train.sh --help",
            ("families:", "--config_file FILE", "--train_data_dir DIR", "sd15: 512"),
        ),
        ("run_lora_train.sh sdxl --help", ("usage: run_lora_train [family]", "the others: 1024)")),
        ("run_lora_train.sh --help_all", ("usage: train_lora_sd15.py", "--adam_beta1")),
        ("run_lora_infer.sh --help", ("[LORA ...]", "--prompt VALUE", "--adapter_scale")),
        ("run_lora_infer.sh --help_all", ("[LORA ...]", "--adapter_scale")),
        ("run_prepare_dataset.sh -h", ("--auto_caption [NAME=VALUE ...]", "--doctor", "--help_all")),
        ("run_prepare_dataset.sh --help_all", ("--auto_caption [NAME=VALUE ...]", "min_aspect_ratio")),
        ("run_tests.sh --help", ("usage: run_tests", "--quick")),
    ],
)
def test_help_before_anything_is_installed_installs_nothing(bare_clone, command, texts):
    folder, environment = bare_clone
    result = subprocess.run(
        ["bash", *command.split()], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert all(text in result.stdout for text in texts), result.stdout
    assert not (folder / ".venv").exists()


@pytest.mark.parametrize("name", sorted(file.stem for file in ROOT.glob("docs/help/*.txt")))
def test_the_help_for_where_nothing_is_installed_is_the_commands_own(name):
    """To write one anew, with the packages there: COLUMNS=80 bash run_lora_infer.sh --help > a file of
    another folder, since the old one may be what is shown; _all: --help_all.
    """
    wrapper, is_all = name.removesuffix("_all"), name.endswith("_all")
    command = ["bash", str(ROOT / f"{wrapper}.sh"), "--help_all" if is_all else "--help"]
    environment = os.environ | {"COLUMNS": "80", "VIRTUAL_ENV": sys.prefix}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    shown, stored = result.stdout, (ROOT / "docs" / "help" / f"{name}.txt").read_text(encoding="ascii")
    without_repeated_values = [re.sub(r" [A-Z]+(?=, -)", "", text).split() for text in (shown, stored)]
    assert without_repeated_values[0] == without_repeated_values[1]  # which Python 3.13 doesn't print


@pytest.fixture
def checkout(tmp_path) -> tuple[Path, dict[str, str]]:
    """A copy of what the wrapper needs, with an environment that is active already."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    variables |= {"VIRTUAL_ENV": sys.prefix, "PATH": path, "HOME": str(tmp_path)}
    return copy_project(tmp_path / "checkout"), variables


def test_wrapper_trains_what_the_env_file_names(checkout, tmp_path):
    folder, env = checkout
    base, output = FAMILIES["sdxl"].base, tmp_path / "from env"
    (folder / ".env").write_text(
        f'MODEL_NAME="{base}"\nVAE_NAME="{base}"\nTRAIN_DATA_DIR="{SAMPLE}"\nOUTPUT_DIR="{output}"\n'
        'VALIDATION_PROMPTS=("a sks circle" "a blue star")\n'
    )
    flags = ("--mixed_precision", "no", "--resolution", "64", "--max_train_steps", "2", "--rank", "8")
    flags += ("--report_to", "wandb")
    command = ["bash", str(folder / "run_lora_train.sh"), *flags, "--validation_inference_steps", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    pictures = list((output / "samples" / "step-000002").glob("0*.png"))
    assert len(pictures) == 8  # two prompts, four each, as prompts are drawn that are named
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert len(weights(output)[f"lora.unet.{layer}.lora.down.weight"]) == 8
    assert list((output / "wandb").glob("offline-run-*"))
    assert "no checkpoint" in result.stdout  # resume_from_checkpoint latest is in the recipe


def test_slurm_script_starts_processes_and_queues_again_after_its_signal(checkout, tmp_path):
    """With stand-ins for srun and scontrol: SIGUSR1 ends two processes, and the job is requeued."""
    folder, env = checkout
    tools, output = tmp_path / "tools", tmp_path / "x"
    tools.mkdir()
    (tools / "srun").write_text(
        f"#!{sys.executable}\nimport os, signal, subprocess, sys\n"
        "signal.signal(signal.SIGUSR1, signal.SIG_DFL)\n"
        'p = subprocess.Popen(sys.argv[1:], env=os.environ | {"SLURM_NODEID": "0"})\n'
        f'open("{tmp_path}/pid", "w").write(str(p.pid))\nsys.exit(p.wait())\n'
    )
    (tools / "scontrol").write_text(
        '#!/bin/bash\n[ "$1" = show ] && echo 127.0.0.1 || echo "queued again: $2"\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    env |= {
        "PATH": f"{tools}:{env['PATH']}",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_ID": "77",
    }
    env |= {"SLURM_GPUS_ON_NODE": "2", "ACCELERATE_USE_CPU": "true", "SLURM_SUBMIT_DIR": str(folder)}
    flags = ["-m", FAMILIES["sd15"].base, "-d", str(SAMPLE), "--resolution", "64"]
    flags += ["--max_train_steps", "100000"]
    flags += ["--report_to", "none", "--num_validation_images", "0", "-o", str(output)]
    script = ["bash", str(folder / "config" / "slurm_multi_machine.sh"), "train_lora_sd15.py", *flags]
    process = subprocess.Popen(script, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not ((output / "metrics.jsonl").exists() and losses(output)) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR1)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text[-3000:]
    assert "x 2 processes" in text and "stopped by signal 10" in text and "queued again: 77" in text
    assert list(output.glob("checkpoint-*"))
