"""Cases: a training script with random flags and configuration files."""

from __future__ import annotations

import argparse
import functools
import json
import random
from pathlib import Path

from scripts.dev.attacks.flag_values import PROMPTS, SETS
from scripts.dev.attacks.forked_runs import Case, Job
from scripts.dev.attacks.random_flags import draw_flags, fill_paths, to_config
from scripts.dev.attacks.runs import DATA, base_of, train_argv, training_script
from scripts.dev.attacks.verdicts import find_damaged_result, find_failure, last_line
from scripts.dev.recipes import recipe_parser

DATA_FLAGS = {"--dataset_config", "--dataset_name", "--data_name", "--instance_data_dir"}
LENGTHS = (
    ["--dry_run", "--max_train_steps", "2"],
    ["--max_train_steps", "1"],
    *[["--max_train_steps", "2"]] * 3,
    ["--max_train_steps", "3"],
)


@functools.cache
def actions_of(family: str) -> list[argparse.Action]:
    """All flags of a training script."""
    return recipe_parser(family)._actions


def paths_of(stage: Path, family: str, folder: Path) -> dict[str, Path]:
    """What stands for {name} in values of flags."""
    trained = stage / family / "trained"
    return {
        "folder": folder,
        "data": DATA,
        "twin": folder / "twin" / DATA.name,
        "base": base_of(family),
        "trained": trained,
        "lora": trained / "pytorch_lora_weights.safetensors",
        "kohya": trained / "trained.safetensors",
        "emb": stage / family / "tokens" / "tokens_emb.safetensors",
        "prompts": folder / "p.txt",
        "sets": folder / "s.yaml",
    }


def attack_configuration(stage: Path, family: str, rng: random.Random, folder: Path) -> Case:
    """A training script with random flags, in half of the cases partly in a --config file."""
    paths = paths_of(stage, family, folder)
    paths["twin"].parent.mkdir()
    paths["twin"].symlink_to(DATA)
    (folder / "p.txt").write_text(rng.choice(PROMPTS), encoding="utf-8")
    (folder / "s.yaml").write_text(fill_paths(rng.choice(SETS), paths), encoding="utf-8")
    flags = [fill_paths(argument, paths) for argument in draw_flags(actions_of(family), rng)]
    argv = train_argv(family, folder / "x")
    if not DATA_FLAGS & set(flags):
        argv += ["-d", str(DATA)]
    if rng.random() < 0.5:
        config = folder / "c.yaml"
        config.write_text(json.dumps(to_config(flags, rng)), encoding="utf-8")
        flags = ["--config", str(config)]
        if rng.random() < 0.5:  # else the values of `argv` win
            flags += draw_flags(actions_of(family), rng)[:2]
        flags = [fill_paths(argument, paths) for argument in flags]
    argv += [*flags, *rng.choice(LENGTHS)]
    result = yield Job(training_script(family), argv)
    return {
        "command": argv,
        "code": result.codes[0],
        "message": last_line(result),
        "wrong": find_failure(result) or find_damaged_result(folder),
        "seconds": result.seconds,
    }
