"""Checkpoints, written in one step and resumed exactly."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_training.cli.resume_flags import FREE_FLAGS, RESUME_FLAGS
from lora_training.console import print_status, progress
from lora_training.errors import UserError, one_line
from lora_training.files import list_checkpoints, sha256_of, staging_folder
from lora_training.optim.parts import averaged_weights
from lora_training.training.weights import write_weights

if TYPE_CHECKING:
    import argparse

    from lora_training.data.folders import Example
    from lora_training.training.run import Run

STATE_FILE = "training_state.pt"
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")  # those that don't depend on the last step


def save_checkpoint(run: Run, step: int) -> None:
    """Writes checkpoint-N: usable weights, the training state, and a manifest with hashes.

    The folder appears under its name only when it is whole; older ones go only after that.
    """
    output = Path(run.args.output_dir)
    with staging_folder(output, f"checkpoint-{step}", whole=True) as folder:
        with averaged_weights(run.parts):
            write_weights(run, folder, torch.float32)
        torch.save(training_state(run, step), folder / STATE_FILE)
        hashes = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
        manifest = {"step": step, "seed": run.args.seed, "settings": resume_settings(run), "files": hashes}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    if run.args.checkpoints_total_limit:
        for stale in list_checkpoints(output)[run.args.checkpoints_total_limit :]:
            shutil.rmtree(stale, ignore_errors=True)  # another program may have a file of it open


def training_state(run: Run, step: int) -> dict:
    """What a resumed run needs: each part's flat weights, optimizer, schedule and average, and the guard's
    counts.
    """
    parts = {}
    for part in run.parts:
        stateful = {"optimizer": part.optimizer, "schedule": part.schedule, "ema": part.ema}
        states = {name: owner.state_dict() if owner else None for name, owner in stateful.items()}
        parts[part.name] = {"weights": part.weights.detach().cpu(), "initial": part.initial, **states}
    return {"step": step, "guard": run.guard.state_dict(), "parts": parts}


def load_checkpoint(run: Run, folder: Path, manifest: dict) -> int:
    """Restores a checkpoint; returns the number of steps done.

    Errors: UserError if it is another training's, is beyond this run's last step, or can't be read.
    """
    if manifest["step"] > run.max_steps:
        steps = f"{folder.name} has trained {manifest['step']} steps, this run ends at step {run.max_steps}"
        ways = "raise --max_train_steps, or name an earlier checkpoint with --resume_from_checkpoint"
        raise UserError(f"{steps}: {ways}")
    compare_settings(folder.name, manifest["settings"], resume_settings(run), run.args.resume_anyway)
    try:
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        run.guard.load_state_dict(state["guard"])
        for part in run.parts:
            part.load_state_dict(state["parts"][part.name], run.args.ema_decay)
        step = int(state["step"])
    except UserError as error:
        raise UserError(f"{folder.name}: {error}") from None
    except Exception as error:  # unpickling fails in many ways
        raise UserError(f"{folder.name}: {STATE_FILE} can't be read: {one_line(error)}") from None
    print_status(f"going on from {folder.name}")
    return step


def compare_settings(name: str, saved: dict, current: dict, resume_anyway: bool) -> None:
    """Names the settings that have changed since checkpoint `name` was written.

    Errors: UserError for settings that its tensors don't fit (RESUME_FLAGS), and for any other without
    --resume_anyway.
    """
    current = json.loads(json.dumps(current))  # tuples become lists, as in the manifest
    changes = {
        flag: f"{flag} {saved[flag]}, now {value}"
        for flag, value in current.items()
        if flag in saved and saved[flag] != value
    }
    if not changes:
        return
    blocking = [change for flag, change in changes.items() if flag in RESUME_FLAGS]
    if blocking:
        ways = "another --output_dir, or --overwrite, begins anew"
        raise UserError(f"{name} was trained with other settings: {', '.join(blocking)}; {ways}")
    listed = ", ".join(changes.values())
    if not resume_anyway:
        ways = "set them as they were, or let --resume_anyway go on as they are now"
        raise UserError(f"{name} was trained with other settings ({listed}): {ways}")
    print_status(f"note: changed since {name}: {listed}")


def resume_settings(run: Run) -> dict:
    """What a checkpoint must agree with to be resumed: all flags but those of FREE_FLAGS, and what follows
    from data, base and launcher.
    """
    args = run.args
    flags = [name for name in args.settings if name in vars(args) and name not in FREE_FLAGS]
    depends_on_length = args.lr_scheduler not in CONSTANT_SCHEDULES
    return {
        **{name: vars(args)[name] for name in flags},
        **{name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in identities(run).items()},
        "mixed_precision": run.accelerator.mixed_precision,
        "tokens": [token for tokens in run.abstractions.values() for token in tokens],
        "layout": "flat",  # of the weights in training_state.pt
        "global_batch_size": run.plan.size,
        "last_steps": [
            part.last_step for part in run.parts if depends_on_length or part.last_step < run.max_steps
        ],
    }


def identities(run: Run) -> dict[str, str]:
    """Texts that identify what is trained, on which data, from which base; a manifest has their hashes."""
    base = run.components
    sets = [f"{s.repeats}{s.trigger_word}{s.caption_dropout}{s.weight}" for s in run.args.sets]
    settings = run.scheduler.config.items()
    noise = sorted((name, str(value)) for name, value in settings if not name.startswith("_"))
    return {
        "targets": "|".join(name for part in run.parts for name in part.parameters),
        "data": identify_examples(run.data.examples) + "".join(sets),
        "class_images": identify_examples(run.data.class_examples),
        "base": "|".join([base.identity(run.family.denoiser), base.identity("vae"), str(noise)]),
    }


def identify_examples(examples: list[Example]) -> str:
    """A text that changes with the images, their buckets or their captions."""
    return "|".join(f"{e.digest}{e.bucket}{e.held_out}{e.marked_captions or e.captions}" for e in examples)


def find_checkpoint(args: argparse.Namespace) -> tuple[Path, dict] | None:
    """The checkpoint to go on from and its manifest; None if the training begins at step 0.

    A damaged one is named and the one before it taken. Errors: UserError if there is no whole one.
    """
    name, output = args.resume_from_checkpoint, Path(args.output_dir)
    if name is None:
        return None
    if name == "latest":
        folders = list_checkpoints(output)
    else:
        folders = [folder for folder in (Path(name), output / name) if folder.is_dir()][:1]
    problem = "no such folder"
    for folder in folders:
        try:
            with progress(f"reading {folder.name}"):
                return folder, check_checkpoint(folder)
        except ValueError as error:
            problem = f"{folder.name} is passed over: {error}"
            print_status(f"warning: {problem}")
    if name != "latest":
        raise UserError(f"--resume_from_checkpoint {name}: {problem}")
    if folders:
        raise UserError(f"--resume_from_checkpoint latest: every checkpoint in {output} is damaged")
    print_status(f"no checkpoint in {output}: starting from step 0")
    return None


def check_checkpoint(folder: Path) -> dict:
    """The manifest of a whole checkpoint. Errors: ValueError that says what is damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, digest in manifest["files"].items():
            if sha256_of(folder / name) != digest:
                raise ValueError(f"{name} is damaged")
        if not isinstance(manifest["settings"], dict) or STATE_FILE not in manifest["files"]:
            raise ValueError("its manifest is no checkpoint's")
        return manifest | {"step": int(manifest["step"]), "seed": int(manifest["seed"])}
    except (OSError, KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"manifest or file missing ({one_line(error)})") from None
