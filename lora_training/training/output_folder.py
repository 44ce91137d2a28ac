"""The output folder: made, locked, checked for earlier results, cleared."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.console import QUIET, STARTED, LineLog, print_status
from lora_training.errors import UserError
from lora_training.files import list_checkpoints, output_name
from lora_training.notify import Notifier
from lora_training.signals import default_signals_afterwards
from lora_training.training.requests import take_requests
from lora_training.training.summary import RESULTS, print_summary

if TYPE_CHECKING:
    import argparse

WANDB_RUN = ".wandb_run"  # the file that names W&B's run, which a resumed run goes on in
ADAPTER_FOLDER = "adapter"  # of --copy_to_adapter: where Olive leaves a LoRA
FINISHED = "# finished: step "  # the last line of config.yaml, before the number
# of a command rather than of a training, or secret
UNRECORDED_SETTINGS = (
    "hub_token",
    "notify",
    "config",
    "dry_run",
    "resume_from_checkpoint",
    "resume_anyway",
    "local_rank",
    "overwrite",
)


def open_output_folder(args: argparse.Namespace) -> contextlib.ExitStack:
    """For `with`: the output folder, locked; with --dry_run a temporary one.

    Signals are the system's again afterwards.
    """
    hide_secrets(args)
    stack = contextlib.ExitStack()
    stack.enter_context(default_signals_afterwards())
    stack.enter_context(temporary_output(args) if args.dry_run else locked_output(args))
    return stack


def hide_secrets(args: argparse.Namespace) -> None:
    """Takes what is secret out of this program's command line, which W&B, logs and config.yaml keep."""
    for secret in filter(None, (args.hub_token, args.notify)):
        sys.argv[:] = [argument.replace(secret, "…") for argument in sys.argv]


@contextlib.contextmanager
def temporary_output(args: argparse.Namespace) -> Iterator[None]:
    """--dry_run: while inside, all is written to a folder that is removed afterwards; nothing is uploaded."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        args.output_dir, args.cache_folder = folder, None
        args.push_to_hub, args.report_to = False, "none"
        if args.with_prior_preservation:
            args.class_data_dir = tempfile.mkdtemp(dir=folder)
            args.num_class_images = 2
        yield


@contextlib.contextmanager
def locked_output(args: argparse.Namespace) -> Iterator[None]:
    """Makes the folders of a run and holds the output folder's lock; a file beside it names the process.

    A lock goes when its process ends, however it ends, so a dead run's can be taken. Errors: UserError if a
    folder can't be used, or another run writes to it.
    """
    make_folders(args)
    if QUIET:  # the first process has the lock
        yield
        return
    output = Path(args.output_dir)
    owner = output / ".lock_owner"
    with contextlib.ExitStack() as locks:
        hold_lock(locks, output, owner)
        process, started = f"process {os.getpid()}", time.strftime("%Y-%m-%d %H:%M:%S")
        owner.write_text(f"{process} on {socket.gethostname()} since {started}", encoding="utf-8")
        LineLog.file = output / "log.txt"
        LineLog.add(f"{STARTED}{process} on {socket.gethostname()}, {started}")
        if args.notify:
            LineLog.notifier = Notifier(args.notify, output)
        take_requests(output)  # those that a run that has ended has not seen
        try:
            yield
        finally:
            for file in (owner, output / ".lock"):
                with contextlib.suppress(PermissionError):  # Windows removes no open file
                    file.unlink(missing_ok=True)


def hold_lock(locks: contextlib.ExitStack, output: Path, owner: Path) -> None:
    """Takes a folder's lock: the system's, or a file that stands for one where a network disk has none.

    owner: the file that names the process. Errors: UserError if another run has the lock.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    marker = output / ".soft_lock"
    for lock, advice in (
        (FileLock(output / ".lock", timeout=0), ""),
        (SoftFileLock(marker, timeout=0), f"; if it has ended, remove {marker}"),
    ):
        try:
            locks.enter_context(lock)
            return
        except Timeout:
            process = owner.read_text(encoding="utf-8") if owner.is_file() else "it has just begun"
            raise UserError(f"--output_dir {output}: another run writes there ({process}){advice}") from None
        except OSError as error:
            problem = error
    raise problem


def make_folders(args: argparse.Namespace) -> None:
    """Makes the folders that a run writes to. Errors: UserError that names the flag."""
    uses_tensorboard = "tensorboard" in args.report_to.split(",")
    folders = {"output_dir": args.output_dir, "cache_folder": args.cache_folder}
    if uses_tensorboard:
        folders["logging_dir"] = Path(args.output_dir, args.logging_dir)
    if args.with_prior_preservation:
        folders["class_data_dir"] = args.class_data_dir
    for flag, folder in folders.items():
        if folder is None:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            if flag in ("output_dir", "logging_dir"):  # the others may hold what only has to be read
                with tempfile.TemporaryDirectory(dir=folder) as trial:
                    Path(trial, "x" * 90).touch()  # Windows may end paths at 260 characters
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"--{flag} {folder} can't be written to: {reason}") from None


def is_finished(args: argparse.Namespace) -> bool:
    """Whether the folder holds this very run, finished; if so, prints its summary.

    Errors: UserError if it holds something that would be lost: without --overwrite, earlier results can be
    gone on from, and are never written over.
    """
    if args.dry_run or args.overwrite:
        return False
    output = Path(args.output_dir)
    weights = [file for file in result_files(output) if file.suffix == ".safetensors" and file.is_file()]
    checkpoints = list_checkpoints(output)
    if not weights and not checkpoints:
        return False
    ways = "another --output_dir, or --overwrite"
    recorded, last_step = read_recorded_settings(output)
    changes = changed_settings(recorded, args)
    if weights and last_step and not changes and args.resume_from_checkpoint in (None, "latest"):
        print_status(f"this run is finished, at step {last_step}; {ways}, trains anew")
        print_summary(args)
        return True
    if args.resume_from_checkpoint:
        first_step = resumed_step(args.resume_from_checkpoint, checkpoints)
        if weights and changes and first_step < last_step:
            begin = f"{args.resume_from_checkpoint} begins before"
            raise UserError(f"{output} holds the results of step {last_step}, and {begin}: {ways}")
        return False
    if weights and (changes or not recorded):
        reason = ", ".join(changes) or weights[0].name
        raise UserError(f"{output} holds another run's results ({reason}): {ways}")
    ways = "--resume_from_checkpoint latest goes on, --overwrite begins anew"
    newest = checkpoints[0] if checkpoints else weights[0]
    raise UserError(f"{output} holds {newest.name} of a run that has not finished: {ways}")


def result_files(output: Path) -> list[Path]:
    """Where a run's results are, or will be."""
    return [output / pattern.format(name=output_name(output)) for pattern in RESULTS.values()]


def changed_settings(recorded: dict, args: argparse.Namespace) -> list[str]:
    """What differs between a run's settings and the recorded ones of an earlier run; a line for each."""
    current = recorded_settings(args)
    if args.seed is None:
        current["seed"] = recorded.get("seed")  # it was drawn
    lines = []
    for name in recorded | current:  # one may be a flag that the earlier run did not have
        default = args.defaults.get(name)
        if recorded.get(name, default) != current.get(name, default):
            lines.append(f"{name} {recorded.get(name)}, now {current.get(name)}")
    return lines


def resumed_step(name: str, checkpoints: list[Path]) -> int:
    """The step of the checkpoint that --resume_from_checkpoint names; 0 if its name doesn't say.

    checkpoints: those of the output folder, the latest first.
    """
    folder = checkpoints[0] if name == "latest" and checkpoints else Path(name)
    step = folder.name.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() else 0


def recorded_settings(args: argparse.Namespace) -> dict:
    """The settings as they were given, without UNRECORDED_SETTINGS: what config.yaml holds."""
    settings = {name: value for name, value in args.settings.items() if value is not None}
    return {name: value for name, value in settings.items() if name not in UNRECORDED_SETTINGS}


def read_recorded_settings(output: Path) -> tuple[dict, int]:
    """(the settings in config.yaml, the last step if that run has finished, else 0).

    ({}, 0) where there is none.
    """
    import yaml

    try:
        text = (output / "config.yaml").read_text(encoding="utf-8-sig")
        settings = dict(yaml.safe_load(text))
        step = text.rpartition(FINISHED)[2].strip()
        return settings, int(step) if step.isdecimal() else 0
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        return {}, 0


def clear_output_folder(output: Path) -> None:
    """Before the first step: removes what another run has left, and nothing that is a person's own."""
    for folder in (*list_checkpoints(output), *output.glob("samples/step-[0-9]*")):
        shutil.rmtree(folder, ignore_errors=True)
    names = ("verdict.json", "metrics.jsonl", "crash.log", WANDB_RUN)
    others = [output / name for name in (*names, f"{ADAPTER_FOLDER}/{RESULTS['LoRA']}")]
    for file in result_files(output) + others:
        with contextlib.suppress(PermissionError):  # on Windows: open in another program
            file.unlink(missing_ok=True)
