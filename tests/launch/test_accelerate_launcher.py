"""Configurations of accelerate: what a machine lacks for them, and how a launched script's errors end."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import FAMILIES, ROOT

from lora_training.errors import UserError
from lora_training.launch import accelerate_launcher

pytestmark = pytest.mark.unit
TOY = {name: family.base for name, family in FAMILIES.items()}


@pytest.mark.parametrize(
    ("settings", "gpus", "message"),
    [
        ({"multi_gpu": True}, 0, "is for GPUs, and there is none here"),
        ({"gpu_ids": "0", "num_processes": 1}, 0, "is for GPUs"),
        ({"multi_gpu": True}, 2, "starts 8 processes here, and there are 2 GPUs: --num_processes 2"),
        ({"use_deepspeed": True}, 8, "DeepSpeed, which isn't installed"),
        ({"multi_gpu": True}, 8, None),
        ({"multi_gpu": True, "num_machines": 4}, 2, None),
        ({"num_processes": 1}, 0, None),
        ({"multi_gpu": True, "cpu": True}, 0, None),
    ],
)
def test_what_a_configuration_wants_and_the_machine_lacks(settings, gpus, message, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    plain = {"cpu": False, "use_cpu": False, "multi_gpu": False, "use_fsdp": False, "use_deepspeed": False}
    plain |= {
        "use_megatron_lm": False,
        "num_processes": 8,
        "num_machines": 1,
        "gpu_ids": "all",
        "config_file": "c.yaml",
    }
    args = SimpleNamespace(**plain | settings)
    if message is None:
        accelerate_launcher.check_machine(args, gpus)
    else:
        with pytest.raises(UserError, match=message):
            accelerate_launcher.check_machine(args, gpus)


def test_a_machine_alone_ends_in_a_line_within_seconds():
    args = SimpleNamespace(num_machines=2, machine_rank=0, main_process_ip="127.0.0.1", main_process_port=1)
    with pytest.raises(UserError, match="127.0.0.1 is out of the other machines' reach"):
        accelerate_launcher.check_first_machine(args)
    args.machine_rank = 1
    with pytest.raises(UserError, match="the first machine, 127.0.0.1:1, doesn't answer"):
        accelerate_launcher.check_first_machine(args, timeout=0)


TWO_PROCESSES = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
machine_rank: 0
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_under_the_launcher_is_one_line_and_exit_code_2(processes, tmp_path):
    config = tmp_path / "two.yaml"
    config.write_text(TWO_PROCESSES)
    if processes == 1:
        config = ROOT / "config" / "accelerate_config_cpu.yaml"
    command = [sys.executable, str(ROOT / "scripts/start/launch.py"), "--config_file", str(config)]
    command += ["--main_process_port", "0", str(ROOT / "train_lora_sd15.py"), "-m", TOY["sd15"], "--typo"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "train_lora_sd15.py: error: unknown flag --typo; did you mean --loss_type?\n"


HARDWARE = {
    "single_gpu": ("NO", 1),
    "a100_single": ("NO", 1),
    "multi_gpu": ("MULTI_GPU", 8),
    "fsdp2": ("FSDP", 8),
    "deepspeed_zero2": ("DEEPSPEED", 8),
    "multi_machine": ("MULTI_GPU", 16),
    "cpu": ("NO", 1),
}


@pytest.mark.parametrize("name", HARDWARE)
def test_hardware_configurations_load_in_accelerate(name):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(ROOT / "config" / f"accelerate_config_{name}.yaml"))
    kind, processes = HARDWARE[name]
    assert (loaded.distributed_type.value, loaded.num_processes) == (kind, processes)
    assert bool(loaded.use_cpu) == (name == "cpu")
    if name == "deepspeed_zero2":
        assert loaded.deepspeed_config["zero_stage"] == 2
    if name == "fsdp2":
        assert loaded.fsdp_config["fsdp_version"] == 2


def test_every_hardware_configuration_is_tested():
    files = {
        f.stem.removeprefix("accelerate_config_") for f in (ROOT / "config").glob("accelerate_config_*.yaml")
    }
    assert files == set(HARDWARE)
