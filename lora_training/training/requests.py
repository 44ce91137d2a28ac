"""What scripts/control.py asks of a run that goes on: files in its output folder, which the loop looks for.

A request is a file in a folder of its own, so that none is lost and asking twice is asking once. A loop
without requests pays one question to the file system a step.
"""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_training.console import print_status
from lora_training.errors import UserError

if TYPE_CHECKING:
    from lora_training.training.run import Run

REQUESTS = {  # name: what it asks for
    "sample": "draw the validation prompts now, with the same seeds",
    "save": "write a checkpoint now",
    "stop": "write a checkpoint and end, as Ctrl-C does",
    "skip_validation": "draw no more pictures of the validation that goes on, or none of the next one",
}
FOLDER = ".requests"


class Requests(NamedTuple):
    """What is asked after a step. stop: the number of a signal, or 0."""

    stop: int = 0
    save: bool = False


def send_requests(output: Path, names: list[str]) -> None:
    """Leaves requests for the run that writes to the folder. Errors: UserError if the folder is not there."""
    if not output.is_dir():
        raise UserError(f"{output}: no such folder")
    for name in names:
        for _ in range(2):  # the run may remove the folder meanwhile
            (output / FOLDER).mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                (output / FOLDER / name).touch()
                break


def waiting_requests(output: Path) -> list[str]:
    """The requests that the run has not seen yet."""
    return [name for name in REQUESTS if (output / FOLDER / name).exists()]


def take_requests(output: Path, names: tuple[str, ...] = tuple(REQUESTS)) -> set[str]:
    """The requests that wait; they are gone then. Without any it asks once whether the folder is there."""
    folder, taken = output / FOLDER, set()
    if not folder.exists():
        return taken
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
            taken.add(name)
    with contextlib.suppress(OSError):  # others wait in it, or another one has just come
        folder.rmdir()
    return taken


def received_requests(run: Run, step: int) -> Requests:
    """What signals and control.py ask for after a step; several processes agree on it every ten steps.

    A step that is to be sampled becomes one of those that are validated, with pictures.
    """
    import torch

    is_alone = run.accelerator.num_processes == 1
    if not is_alone and step % 10:
        return Requests()
    taken = take_requests(Path(run.args.output_dir)) if run.accelerator.is_main_process else set()
    stop = run.stop.number or (signal.SIGTERM if "stop" in taken else 0)
    bits = [name in taken for name in REQUESTS]
    if not is_alone:
        own = torch.tensor([stop, *bits], device=run.accelerator.device)
        stop, *bits = run.accelerator.gather(own).view(-1, 1 + len(bits)).amax(dim=0).tolist()
    asked = [name for name, bit in zip(REQUESTS, bits, strict=True) if bit]
    if asked:
        print_status(f"step {step}: control.py asks to {' and to '.join(asked)}")
    run.skips_pictures |= "skip_validation" in asked
    if "sample" in asked:
        run.validation_steps.add(step)
        run.pictures.steps.add(step)
    return Requests(int(stop), "save" in asked)


def pictures_are_skipped(run: Run) -> bool:
    """Whether no more pictures are to be drawn now; asked between them, where one process draws alone."""
    if not run.components.sharded:
        run.skips_pictures |= bool(take_requests(Path(run.args.output_dir), ("skip_validation",)))
    skips, run.skips_pictures = run.skips_pictures, False
    if skips:
        print_status("control.py: no more pictures now")
    return skips
