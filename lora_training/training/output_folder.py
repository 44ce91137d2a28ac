"""The output folder: locked, checked for earlier results, cleared."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.console import QUIET, print_status
from lora_training.errors import UserError
from lora_training.files import list_checkpoints
from lora_training.signals import default_signals_afterwards
from lora_training.training.summary import RESULTS, print_summary

if TYPE_CHECKING:
    import argparse


FINISHED = "# finished: step "


def open_output_folder(args: argparse.Namespace):
    """For `with`: the output folder, locked; with --dry_run a temporary one.

    Signals are the system's again afterwards.
    """
    stack = contextlib.ExitStack()
    stack.enter_context(default_signals_afterwards())
    stack.enter_context(temporary_output(args) if args.dry_run else locked_output(args))
    return stack


@contextlib.contextmanager
def temporary_output(args: argparse.Namespace):
    """--dry_run: while inside, everything is written to a folder that goes afterwards, and nothing is
    uploaded.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        args.output_dir, args.cache_folder, args.push_to_hub, args.report_to = folder, None, False, "none"
        if args.with_prior_preservation:
            args.class_data_dir, args.num_class_images = tempfile.mkdtemp(dir=folder), 2
        yield


@contextlib.contextmanager
def locked_output(args: argparse.Namespace):
    """Makes the folders of a run and holds the output folder's lock, which says who writes there.

    The system lets go of a lock when its process ends, however it ends: a dead run's is taken over. Errors:
    UserError if a folder can't be used, or another run writes to it.
    """
    folders = {"output_dir": args.output_dir, "cache_folder": args.cache_folder}
    logs = {"tensorboard", "all"} & set(args.report_to.split(","))
    folders["logging_dir"] = Path(args.output_dir, args.logging_dir) if logs else None
    folders["class_data_dir"] = args.class_data_dir if args.with_prior_preservation else None
    for flag, folder in folders.items():
        try:
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
            if folder is not None and flag in (
                "output_dir",
                "logging_dir",
            ):  # of the others much may be there already
                with tempfile.TemporaryDirectory(dir=folder) as trial:
                    Path(trial, "x" * 90).touch()  # Windows may end paths at 260 characters
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"--{flag} {folder} can't be written to: {why}") from None
    if QUIET:
        yield
        return
    import platform

    file = Path(args.output_dir, ".lock")
    with file.open("a+", encoding="utf-8", errors="replace") as lock:
        if not acquire_lock(lock):
            lock.seek(0)
            raise UserError(
                f"--output_dir {args.output_dir}: another run writes there ({lock.read().strip()})"
            )
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        lock.flush()
        try:
            yield
        finally:
            with contextlib.suppress(PermissionError):  # Windows removes no open file
                file.unlink(missing_ok=True)


def acquire_lock(file) -> bool:
    """Takes the system's lock of an open file, if no living process has it; a file system without locks gives
    it.
    """
    try:
        try:
            import fcntl
        except ImportError:  # Windows
            import msvcrt

            file.seek(1 << 20)  # beyond the text, which others read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by the loader's processes
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        print_status(
            "note: this file system has no locks: see that no second run writes to the output folder"
        )
    return True


def is_finished(args: argparse.Namespace) -> bool:
    """Whether the folder holds this very run, finished, which is said.

    Errors: UserError if it holds something that would be lost: without --overwrite, results are gone on from,
    and never written over.
    """
    if args.dry_run:
        return False
    output, wanted = Path(args.output_dir), args.resume_from_checkpoint
    files = [output / name.format(name=output.resolve().name) for name in RESULTS.values()]
    found, there = [f for f in files if f.suffix == ".safetensors" and f.is_file()], list_checkpoints(output)
    if args.overwrite or not (found or there):
        return False
    ways = "another --output_dir, or --overwrite"
    before, step = earlier_settings(output)
    now = kept_settings(args) | (
        {"seed": before.get("seed")} if args.seed is None else {}
    )  # one that was drawn
    names = [
        n for n in before | now if before.get(n, args.defaults.get(n)) != now.get(n)
    ]  # one may be a newer flag
    changed = [f"{name} {before.get(name)}, now {now.get(name)}" for name in names]
    if found and step and not changed and wanted in (None, "latest"):
        print_status(f"this run is finished, at step {step}; {ways}, trains anew")
        print_summary(args)
        return True
    if not wanted and found and (changed or not before):
        raise UserError(
            f"{output} holds another run's results ({', '.join(changed) or found[0].name}): {ways}"
        )
    if not wanted:
        what = there[0].name if there else found[0].name
        ways = "--resume_from_checkpoint latest goes on, --overwrite begins anew"
        raise UserError(f"{output} holds {what} of a run that has not finished: {ways}")
    begin = (there[0] if wanted == "latest" and there else Path(wanted)).name.removeprefix("checkpoint-")
    if found and changed and (int(begin) if begin.isdecimal() else 0) < step:
        raise UserError(f"{output} holds the results of step {step}, and {wanted} begins before: {ways}")
    return False


def kept_settings(args: argparse.Namespace) -> dict:
    """The settings as they were given, but for what is secret and what is not the run's own: what config.yaml
    holds.
    """
    left_out = {
        "hub_token",
        "config",
        "dry_run",
        "resume_from_checkpoint",
        "resume_anyway",
        "local_rank",
        "overwrite",
    }
    return {
        name: value for name, value in args.settings.items() if value is not None and name not in left_out
    }


def earlier_settings(output: Path) -> tuple[dict, int]:
    """(what config.yaml says, the last step if that run has finished, else 0); ({}, 0) where there is none."""
    import yaml

    try:
        text = (output / "config.yaml").read_text(encoding="utf-8")
        settings, step = dict(yaml.safe_load(text)), text.rpartition(FINISHED)[2].strip()
        return settings, int(step) if step.isdecimal() else 0
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        return {}, 0


def clear_output(output: Path) -> None:
    """Before the first step: removes what another run has left, and nothing that is a person's own."""
    for folder in (*list_checkpoints(output), *output.glob("samples/step-[0-9]*")):
        shutil.rmtree(folder, ignore_errors=True)
    for name in (*RESULTS.values(), "verdict.json", "metrics.jsonl", "crash.log"):
        with contextlib.suppress(PermissionError):  # on Windows: open in another program
            (output / name.format(name=output.resolve().name)).unlink(missing_ok=True)
