"""Cases of damaged files: YAML, JSON and text files of settings."""

from __future__ import annotations

import json
import random
from pathlib import Path

from scripts.dev import ROOT
from scripts.dev.attacks.damage import damage
from scripts.dev.attacks.damaged_data import PREPARE, DamagedJob
from scripts.dev.attacks.flag_values import BUNDLES
from scripts.dev.attacks.forked_runs import Job
from scripts.dev.attacks.random_flags import fill_paths, to_config
from scripts.dev.attacks.runs import DATA, base_of, train_argv, training_script

MODEL_STEPS = ("auto_caption", "auto_tagging", "masks")  # whose models are not here
ONE_STEP = ("--max_train_steps", "1")
PROMPT_ENTRIES = [
    {
        "prompt": "a circle",
        "width": 64,
        "height": 64,
        "seed": 1,
        "steps": 1,
        "guidance": 2.0,
        "lora_scale": 0.5,
    },
    "b",
]


def damaged_settings(stage: Path, family: str, rng: random.Random, folder: Path) -> DamagedJob:
    """A file of settings, and the command that reads it."""
    write = rng.choice((write_config, write_sets, write_prompts, write_inference, write_preparation))
    file, job = write(stage / family / "trained", family, rng, folder)
    return [f"{file.name}: {damage(file, rng)}"], job
    yield  # no job has to run first


def write_config(trained: Path, family: str, rng: random.Random, folder: Path) -> tuple[Path, Job]:
    """A training script's --config."""
    paths = {"folder": folder, "lora": trained / "pytorch_lora_weights.safetensors"}
    bundle = [fill_paths(argument, paths) for argument in rng.choice(BUNDLES)]
    values = {
        "rank": 4,
        "learning_rate": 1e-4,
        "resolution": [64, 64],
        "train_data_dir": str(DATA),
        "validation_prompt": ["a", "b"],
    }
    file = write_yaml(folder / "c.yaml", values | to_config(bundle, rng))
    argv = train_argv(family, folder / "x", *ONE_STEP, "--config", file)
    return file, Job(training_script(family), argv)


def write_sets(trained: Path, family: str, rng: random.Random, folder: Path) -> tuple[Path, Job]:
    """A training script's --dataset_config."""
    subject = {"train_data_dir": str(DATA), "repeats": 2, "trigger_word": "sks", "weight": 0.5}
    sets = [
        subject | {"resolutions": [32, 64]},
        {"train_data_dir": str(DATA), "class_prompt": "a circle"},
    ]
    file = write_yaml(folder / "c.yaml", sets)
    argv = train_argv(family, folder / "x", *ONE_STEP, "--dataset_config", file)
    return file, Job(training_script(family), argv)


def write_prompts(trained: Path, family: str, rng: random.Random, folder: Path) -> tuple[Path, Job]:
    """A training script's --validation_prompts_file."""
    file = folder / rng.choice(("p.yaml", "p.txt", "p.json"))
    lines = "a circle --w 64 --h 64 --d 1 --s 1\nb\n"
    file.write_text(lines if file.suffix == ".txt" else json.dumps(PROMPT_ENTRIES), encoding="utf-8")
    drawing = ("--num_validation_images", "1", "--validation_prompts_file", file)
    argv = train_argv(family, folder / "x", *ONE_STEP, "-d", DATA, *drawing)
    return file, Job(training_script(family), argv)


def write_inference(trained: Path, family: str, rng: random.Random, folder: Path) -> tuple[Path, Job]:
    """infer_lora.py's --config."""
    values = read_yaml(ROOT / "config" / "lora_infer.yaml")
    values |= {"num_generations": 1, "num_inference_steps": 1, "prompt": ["a", "b"], "adapter_scale": [1.0]}
    values["paths"] |= {
        "base_model_path": str(base_of(family)),
        "lora_weights_path": [{"path": str(trained), "weight": 0.5}],
        "infer_path": str(folder / "x"),
    }
    file = write_yaml(folder / "c.yaml", values)
    return file, Job("infer_lora.py", ["--config", str(file)])


def write_preparation(trained: Path, family: str, rng: random.Random, folder: Path) -> tuple[Path, Job]:
    """prepare_dataset.py's --config."""
    values = read_yaml(ROOT / "config" / "prepare_dataset.yaml")
    values["steps"] = {key: value for key, value in values["steps"].items() if key not in MODEL_STEPS}
    values |= {"data_dir": str(DATA), "output_dir": str(folder / "x")}
    file = write_yaml(folder / "c.yaml", values)
    return file, Job(PREPARE, ["--config", str(file), "-d", str(DATA), "-o", str(folder / "x")])


def read_yaml(file: Path) -> dict:
    import yaml

    return yaml.safe_load(file.read_text(encoding="utf-8"))


def write_yaml(file: Path, values: object) -> Path:
    import yaml

    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file
