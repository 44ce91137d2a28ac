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
    from lora_training.optim.parts import TrainedPart
    from lora_training.training.run import Run

STATE_FILE = "training_state.pt"
PART_ENDS = {  # the flag that says for which share of the steps a part is trained, and what its last step is
    "embeddings": ("train_text_encoder_ti_frac", "the pivot, the new tokens' last step,"),
    "text_encoder": ("train_text_encoder_frac", "the text encoder's last step"),
    "denoiser": ("train_transformer_frac", "the LoRA's last step"),
}
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
    saved = manifest["settings"]
    changes = changed_settings(saved, resume_settings(run)) | moved_ends(saved, run)
    check_changes(folder.name, changes, run.args.resume_anyway)
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


def changed_settings(saved: dict, current: dict) -> dict[str, str]:
    """{setting: what it was when a checkpoint was written and what it is}, of those that have changed."""
    current = json.loads(json.dumps(current))  # tuples become lists, as in the manifest
    return {
        flag: f"{flag} {saved[flag]}, now {value}"
        for flag, value in current.items()
        if flag in saved and saved[flag] != value and flag != "last_steps"
    }


def moved_ends(saved: dict, run: Run) -> dict[str, str]:
    """{part: by which flags its training, or its schedule, ends at another step than in a checkpoint}."""
    now = last_steps(run)
    before = saved.get("last_steps", now)
    if isinstance(before, list):  # of an older checkpoint, in the order of the parts
        names = now if len(now) == len(before) else [part.name for part in run.parts]
        before = dict(zip(names, before, strict=False))
    is_same_schedule = saved.get("lr_scheduler") == run.args.lr_scheduler  # another one is named by itself
    return {
        part.name: describe_move(part, before.get(part.name), now.get(part.name), run)
        for part in run.parts
        if before.get(part.name) != now.get(part.name)
        and (is_same_schedule or part.last_step < run.max_steps)
    }


def last_steps(run: Run) -> dict[str, int]:
    """The last step of the parts that it matters for: those that end before the run, or whose rate depends
    on it.
    """
    depends_on_length = run.args.lr_scheduler not in CONSTANT_SCHEDULES
    ends = {part.name: part.last_step for part in run.parts}
    return {name: step for name, step in ends.items() if depends_on_length or step < run.max_steps}


def describe_move(part: TrainedPart, before: int | None, now: int | None, run: Run) -> str:
    """How flags move a part's end between two steps (None: the end of the run), and which one keeps it."""
    args, keeping = run.args, ""
    length = f"--max_train_steps {args.max_train_steps}"
    if not args.max_train_steps:
        length = f"--num_train_epochs {args.num_train_epochs}"
    share, what = PART_ENDS[part.name]
    if part.last_step < run.max_steps:
        length += f" with --{share} {vars(args)[share]:g}"
        if before and before < run.max_steps:
            keeping = f"; --{share} {before / run.max_steps:.6g} keeps it"
    elif now:
        what = f"the end of --lr_scheduler {args.lr_scheduler}"
    steps = " to ".join(f"step {step}" if step else "the end" for step in (before, now))
    return f"{length} moves {what} from {steps}{keeping}"


def check_changes(name: str, changes: dict[str, str], resume_anyway: bool) -> None:
    """Names the settings that have changed since checkpoint `name` was written.

    Errors: UserError for settings that its tensors don't fit (RESUME_FLAGS), and for any other without
    --resume_anyway.
    """
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
    return {
        **{name: vars(args)[name] for name in flags},
        **{name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in identities(run).items()},
        "mixed_precision": run.accelerator.mixed_precision,
        "tokens": [token for tokens in run.abstractions.values() for token in tokens],
        "layout": "flat",  # of the weights in training_state.pt
        "global_batch_size": run.plan.size,
        "last_steps": last_steps(run),
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
    if not args.dry_run:  # whose folder is a new one
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
