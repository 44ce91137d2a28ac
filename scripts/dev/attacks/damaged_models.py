"""Cases of damaged files: LoRAs and embeddings, runs' folders, bases."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from scripts.dev.attacks.damage import damage, linked_copy
from scripts.dev.attacks.damaged_data import DamagedJob
from scripts.dev.attacks.forked_runs import Job
from scripts.dev.attacks.runs import DATA, DRAWN, TOKENS, base_of, train_argv, training_script

ONE_STEP = ("--max_train_steps", "1")


def make_job(program: str, *argv: object) -> Job:
    return Job(program, [str(argument) for argument in argv])


def infer_job(lora: Path, base: Path, folder: Path, *flags: object) -> Job:
    """infer_lora.py for one picture of one step."""
    argv = ["--paths.base_model_path", base, "--paths.infer_path", folder / "x", "--prompt", "a circle"]
    argv += ["--num_inference_steps", "1", "--resolution.width", "64", "--resolution.height", "64"]
    argv += ["--num_generations", "1", "--adapter_scale", "1"]
    return make_job("infer_lora.py", lora, *argv, *flags)


def damaged_lora(stage: Path, family: str, rng: random.Random, folder: Path) -> DamagedJob:
    """LoRA and embedding files, and folders with them, for everything that reads one."""
    source = stage / family / rng.choice(("trained", "tokens"))
    copy = folder / source.name
    copy.mkdir()
    names = ["pytorch_lora_weights.safetensors", f"{source.name}.safetensors", "config.yaml"]
    names += [f"{source.name}_emb.safetensors"] * (source.name == "tokens")
    for name in names:
        shutil.copy(source / name, copy / name)
    victim = copy / rng.choice([*names[:2], *names])
    lora = rng.choice((victim, copy)) if victim.suffix == ".safetensors" else copy
    base, target = base_of(family), folder / "x" / "out.safetensors"
    training = train_argv(family, folder / "x", "-d", DATA, *ONE_STEP, "--init_lora", lora)
    jobs = {
        "train": Job(training_script(family), training),
        "infer": infer_job(lora, base, folder, *rng.choice(((), ("--fuse",)))),
        "convert": make_job(
            "scripts/lora/convert_lora.py",
            *(lora, target, "--base", base),
            *rng.choice(((), ("--to", "kohya"), ("--to", "diffusers"))),
        ),
        "inspect": make_job(
            "scripts/lora/inspect_lora.py",
            lora,
            *rng.choice(((), ("--base", base), ("--plot", folder / "p.png", "--base", base))),
        ),
        "merge": make_job(
            "scripts/lora/merge_lora.py", base, rng.choice((target, folder / "x")), "--lora", lora
        ),
        "join": make_job("scripts/lora/merge_lora.py", lora, lora, "--into", target, "--base", base),
        "resize": make_job(
            "scripts/lora/resize_lora.py",
            *(lora, target),
            *rng.choice((("--rank", "2"), ("--keep", "0.9"))),
            *("--base", base),
        ),
    }
    job = jobs[rng.choice(sorted(jobs))]
    return [f"{victim.name}: {damage(victim, rng)}"], job
    yield  # no job has to run first


def damaged_run(stage: Path, family: str, rng: random.Random, folder: Path) -> DamagedJob:
    """A run's folder: checkpoints to go on from, caches, and what reports and pictures are made of."""
    source, output, cache = stage / family / "trained", folder / "trained", folder / "cache"
    kind = rng.randrange(4)
    shutil.copytree(source, output)
    flags = ("-d", DATA, "--checkpointing_steps", "2", *DRAWN, "--cache_latents", "--cache_folder", cache)
    checkpoint = rng.choice(("latest", "checkpoint-4"))
    argv = train_argv(family, output, *flags, "--resume_from_checkpoint", checkpoint)
    job = Job(training_script(family), [*argv, "--max_train_steps", "5"])
    if kind == 0:  # the caches
        shutil.copytree(stage / family / "cache", cache)
        victims = [file for file in cache.rglob("*") if file.is_file()]
    else:
        victims = [file for file in output.rglob("*") if file.is_file() and file.suffix != ".png"]
    if kind == 1:
        victims = [file for file in victims if "checkpoint" in str(file)]
    if kind == 3:
        more = rng.choice(((), ("--checkpoints", "all")))
        job = rng.choice(
            (
                infer_job(output, base_of(family), folder, *more),
                make_job("scripts/reports/report.py", output),
                make_job("scripts/reports/compare_runs.py", output, source, "-o", folder / "x"),
            )
        )
    victims = rng.sample(sorted(victims), min(len(victims), rng.choice((1, 1, 2, 4))))
    return [f"{victim.relative_to(folder)}: {damage(victim, rng)}" for victim in victims], job
    yield  # no job has to run first


def damaged_base(stage: Path, family: str, rng: random.Random, folder: Path) -> DamagedJob:
    """A part of a base, for everything that reads one."""
    base, lora = linked_copy(base_of(family), folder / "base"), stage / family / "trained"
    victim = rng.choice(sorted(file for file in base.rglob("*") if file.is_file() and file.suffix != ".md"))
    options = rng.choice(((), DRAWN, ("--train_text_encoder",), TOKENS, ("--quantize_base", "int8")))
    argv = train_argv(family, folder / "x", "-m", base, "-d", DATA, *ONE_STEP, *options)
    training = Job(training_script(family), argv)
    drawing = infer_job(lora, base, folder)
    merging = make_job("scripts/lora/merge_lora.py", base, folder / "x", "--lora", lora)
    extracting = make_job(
        "scripts/lora/extract_lora.py", base_of(family), base, folder / "x.safetensors", "--rank", "2"
    )
    description = f"{victim.relative_to(folder)}: {damage(victim, rng)}"
    return [description], rng.choice((training, training, drawing, merging, extracting))
    yield  # no job has to run first
