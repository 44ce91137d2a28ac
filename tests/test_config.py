"""config/: hardware configurations, presets and recipes do what they say; the wrapper and the Slurm script start them."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import FAMILIES, ROOT, SAMPLE, load_script, losses, run_here, weights

pytestmark = pytest.mark.run

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
    files = {f.stem.removeprefix("accelerate_config_") for f in (ROOT / "config").glob("accelerate_config_*.yaml")}
    assert files == set(HARDWARE)


CARDS = (8, 12, 16, 24, 80)


@pytest.mark.parametrize("card", CARDS)
def test_presets_train(family, card, tmp_path):
    """Each preset as it stands, but for the size and the time that compiling takes."""
    file = ROOT / "config" / "presets" / f"{family.name}_{card}gb.yaml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert all("  # " in f" {line.replace(' # ', '  # ')}" for line in lines), "each value has its effect beside it"
    values = yaml.safe_load(file.read_text())
    args = load_script(family.script).parse_args(["--config", str(file), "-m", family.base, "-d", str(SAMPLE)])
    assert all(getattr(args, k) in (v, [v]) for k, v in values.items() if k not in ("lora_layers", "learning_rate"))
    if card in (12, 16):  # their neighbours have the same flags with other numbers
        return
    quick = tmp_path / "preset.yaml"
    quick.write_text(yaml.safe_dump(values | {"compile": False, "mixed_precision": "bf16"}))
    small = ("--resolution", 64, "--max_train_steps", 2, "--train_batch_size", 2)
    assert run_here(family, tmp_path / "x", "--config", quick, "-d", SAMPLE, *small) == 0
    assert len(losses(tmp_path / "x")) == 2


def test_recipes_are_complete(family):
    file = ROOT / "config" / f"recipe_{family.name}.yaml"
    args = load_script(family.script).parse_args(["--config", str(file), "-m", "BASE", "-d", str(SAMPLE)])
    assert args.resume_from_checkpoint == "latest" and args.report_to == "wandb" and args.gradient_checkpointing
    assert args.mixed_precision == ("fp16" if family.name in ("sd15", "sdxl") else "bf16")
    if family.name == "sdxl":
        assert (args.resolution, args.num_train_epochs, args.learning_rate) == ([1280, 720], 500, 5e-5)
        assert (args.train_batch_size, args.rank, args.optimizer) == (4, 32, "adamw8bit")
        assert args.pretrained_vae_model_name_or_path == "madebyollin/sdxl-vae-fp16-fix"


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the wrapper needs, with an environment that is active already."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "config", folder / "config")
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("train_*.py"), ROOT / "run_lora_train.sh", ROOT / "requirements.txt"):
        shutil.copy(file, folder)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return folder, kept | {"VIRTUAL_ENV": sys.prefix, "PATH": path, "HOME": str(tmp_path)}


def test_wrapper_trains_what_the_env_file_names(checkout, tmp_path):
    folder, env = checkout
    base, output = FAMILIES["sdxl"].base, tmp_path / "from env"
    (folder / ".env").write_text(
        f'MODEL_NAME="{base}"\nVAE_NAME="{base}"\nTRAIN_DATA_DIR="{SAMPLE}"\nOUTPUT_DIR="{output}"\n'
        'VALIDATION_PROMPTS=("a sks circle" "a blue star")\n'
    )
    flags = ("--mixed_precision", "no", "--resolution", "64", "--max_train_steps", "2", "--rank", "8")
    command = ["bash", str(folder / "run_lora_train.sh"), *flags, "--validation_inference_steps", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert (
        len(list((output / "samples" / "step-000002").glob("0*.png"))) == 8
    )  # two prompts, four each, as the recipe says
    assert (
        len(weights(output)["lora.unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight"]) == 8
    )
    assert list((output / "wandb").glob("offline-run-*"))
    assert "no checkpoint" in result.stdout  # resume_from_checkpoint latest is in the recipe


def test_slurm_script_starts_processes_and_queues_again_after_its_signal(checkout, tmp_path):
    """With stand-ins for srun and scontrol: two processes train, SIGUSR1 ends them with a checkpoint, the job is requeued."""
    folder, env = checkout
    tools, output = tmp_path / "tools", tmp_path / "x"
    tools.mkdir()
    (tools / "srun").write_text(
        f"#!{sys.executable}\nimport os, signal, subprocess, sys\nsignal.signal(signal.SIGUSR1, signal.SIG_DFL)\n"
        'p = subprocess.Popen(sys.argv[1:], env=os.environ | {"SLURM_NODEID": "0"})\n'
        f'open("{tmp_path}/pid", "w").write(str(p.pid))\nsys.exit(p.wait())\n'
    )
    (tools / "scontrol").write_text('#!/bin/bash\n[ "$1" = show ] && echo 127.0.0.1 || echo "queued again: $2"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    env |= {"PATH": f"{tools}:{env['PATH']}", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "77"}
    env |= {"SLURM_GPUS_ON_NODE": "2", "ACCELERATE_USE_CPU": "true", "SLURM_SUBMIT_DIR": str(folder)}
    flags = ["-m", FAMILIES["sd15"].base, "-d", str(SAMPLE), "--resolution", "64", "--max_train_steps", "100000"]
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


TITLES = {"sd15": "SD 1.5", "sdxl": "SDXL", "sd3": "SD3", "flux": "FLUX.1"}


def test_the_readmes_table_has_every_flag():
    """By group of --help_all; what is not in all four scripts stands in a row of its families."""
    shared, own = {}, {}
    for name, family in FAMILIES.items():
        script = load_script(family.script)
        parser = script.OneLineParser(add_help=False)
        script.add_shared_args(parser)
        script.add_family_args(parser.add_argument_group("own").add_argument)
        for group in parser._action_groups:
            flags = [a for a in group._group_actions if a.option_strings and a.help != "==SUPPRESS=="]
            names = [next(n for n in a.option_strings if n.startswith("--")) for a in flags]
            if group.title == "own":
                for flag in names:
                    own.setdefault(flag, []).append(name)
            elif names:
                shared[group.title] = set(names) - {"--help_all"}
    for flag, names in own.items():
        shared.setdefault(", ".join(TITLES[n] for n in TITLES if n in names), set()).add(flag)
    rows = (ROOT / "README.md").read_text().split("| | all flags |\n| --- | --- |\n")[1].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert {title: set(flags.replace("`", "").split(", ")) for title, flags in cells} == shared
