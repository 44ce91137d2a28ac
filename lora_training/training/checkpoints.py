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

    from lora_training.training.run import Run


def save_checkpoint(run: Run, step: int) -> None:
    """Writes checkpoint-N: usable weights, the training state, and a manifest with hashes.

    The folder appears under its name only when it is whole; older ones go only after that.
    """
    output = Path(run.args.output_dir)
    with staging_folder(output, f"checkpoint-{step}", whole=True) as part:
        with averaged_weights(run.parts):
            write_weights(run, part, torch.float32)
        torch.save(training_state(run, step), part / "training_state.pt")
        hashes = {f.name: sha256_of(f) for f in sorted(part.iterdir())}
        manifest = {"step": step, "seed": run.args.seed, "settings": resume_settings(run), "files": hashes}
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
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
        states = {name: thing.state_dict() if thing else None for name, thing in stateful.items()}
        parts[part.name] = {"weights": part.weights.detach().cpu(), "initial": part.initial, **states}
    return {"step": step, "guard": run.guard.state_dict(), "parts": parts}


def load_checkpoint(run: Run, folder: Path, manifest: dict) -> int:
    """Restores a checkpoint; returns the number of steps done.

    Errors: UserError if it is another's, or can't be read.

    Settings that have changed are named. Those that its tensors don't fit end the run; the others need
    --resume_anyway.
    """
    before, now = manifest["settings"], json.loads(json.dumps(resume_settings(run)))
    changed = {n: f"{n} {before[n]}, now {now[n]}" for n in now if n in before and before[n] != now[n]}
    if hindered := [what for name, what in changed.items() if name in RESUME_FLAGS]:
        ways = "another --output_dir, or --overwrite, begins anew"
        raise UserError(f"{folder.name} was trained with other settings: {', '.join(hindered)}; {ways}")
    if changed and not run.args.resume_anyway:
        ways = "set them as they were, or let --resume_anyway go on as they are now"
        raise UserError(
            f"{folder.name} was trained with other settings ({', '.join(changed.values())}): {ways}"
        )
    if changed:
        print_status(f"note: changed since {folder.name}: {', '.join(changed.values())}")
    try:
        state = torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
        run.guard.load_state_dict(state["guard"])
        for part in run.parts:
            part.load_state_dict(state["parts"][part.name], run.args.ema_decay)
        step = int(state["step"])
    except Exception as error:  # unpickling fails in many ways
        raise UserError(f"{folder.name}: training_state.pt can't be read: {one_line(error)}") from None
    print_status(f"going on from {folder.name}")
    return step


def resume_settings(run: Run) -> dict:
    """What a checkpoint must agree with to be gone on from: all flags but those of FREE_FLAGS, and what
    follows from data, base and launcher.
    """
    args, base = run.args, run.components
    layers = "|".join(n for p in run.parts for n in p.parameters)
    examples = (run.data.examples, run.data.class_examples)
    data = ["|".join(f"{e.digest}{e.bucket}{e.held_out}{e.captions}" for e in kind) for kind in examples]
    data[0] += "".join(
        f"{own.repeats}{own.trigger_word}{own.caption_dropout}{own.weight}" for own in args.sets
    )
    decays = args.lr_scheduler not in ("constant", "constant_with_warmup")
    schedule = sorted((k, str(v)) for k, v in run.scheduler.config.items() if not k.startswith("_"))
    identity = [base.identity(args.family.denoiser), base.identity("vae"), str(schedule)]
    short = {"targets": layers, "data": data[0], "class_images": data[1], "base": "|".join(identity)}
    return {
        **{
            name: vars(args)[name]
            for name in args.settings
            if name in vars(args) and name not in FREE_FLAGS
        },
        **{name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in short.items()},
        "mixed_precision": run.accelerator.mixed_precision,
        "tokens": [t for tokens in run.abstractions.values() for t in tokens],
        "layout": "flat",  # of the weights in training_state.pt
        "global_batch_size": run.plan.size,
        "last_steps": [p.last_step for p in run.parts if decays or p.last_step < run.max_steps],
    }


def find_checkpoint(args: argparse.Namespace) -> tuple[Path, dict] | None:
    """The checkpoint to go on from and its manifest; a damaged one is named and the one before it taken."""
    wanted, output = args.resume_from_checkpoint, Path(args.output_dir)
    if wanted is None:
        return None
    named = [folder for folder in (Path(wanted), output / wanted) if folder.is_dir()][:1]
    for folder in list_checkpoints(output) if wanted == "latest" else named:
        try:
            with progress(f"reading {folder.name}"):
                return folder, check_checkpoint(folder)
        except ValueError as error:
            problem = f"{folder.name} is passed over: {error}"
            print_status(f"warning: {problem}")
    if wanted != "latest":
        raise UserError(f"--resume_from_checkpoint {wanted}: {problem if named else 'no such folder'}")
    if list_checkpoints(output):
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
        if not isinstance(manifest["settings"], dict) or "training_state.pt" not in manifest["files"]:
            raise ValueError("its manifest is no checkpoint's")
        return manifest | {"step": int(manifest["step"]), "seed": int(manifest["seed"])}
    except (OSError, KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"manifest or file missing ({one_line(error)})") from None
