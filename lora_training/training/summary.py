"""The last lines of a run, and commands that go on from it."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.console import print_status
from lora_training.data.captions import prepend_trigger
from lora_training.errors import one_line

if TYPE_CHECKING:
    import argparse

RESULTS = {  # what a finished run has to show, in the order in which a person wants it
    "LoRA": "pytorch_lora_weights.safetensors",
    "for others": "{name}.safetensors",
    "new tokens": "{name}_emb.safetensors",
    "pictures": "comparison.png",
    "report": "report.html",
}


def print_summary(args: argparse.Namespace, processes: int = 1, stopped: int = 0) -> None:
    """The last lines: which step to take, where the files are, and what draws with them.

    stopped: the step after which a signal ended the run; its checkpoint's files are shown, and what goes on
    from there.
    """
    output = Path(args.output_dir)
    place, name = output / f"checkpoint-{stopped}" if stopped else output, output.resolve().name
    if args.dry_run:
        return
    if not stopped and (file := output / "verdict.json").is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        print_status("\n".join(f"advice: {line}" for line in (found["text"], *found["warnings"])))
    for what, pattern in RESULTS.items():
        folder = place if pattern.endswith("safetensors") else output
        if (file := folder / pattern.format(name=name)).is_file():
            print_status(f"{what:12}{file}")
    prompt = (args.validation_prompt or [""])[0]
    with contextlib.suppress(OSError, ValueError, LookupError):
        caption = json.loads((output / "data.json").read_text(encoding="utf-8"))["captions"][0][1]
        prompt = prompt or prepend_trigger(caption, (*args.triggers, None)[0])
    home, drawing = args.script.parent, (place, "--prompt", one_line(prompt) or "a picture")
    print_status(f"{'draw':12}{command_line(home, 'run_lora_infer', 'infer_lora.py', [], *drawing)}")
    if stopped:
        resume = "--resume_from_checkpoint", "latest"
        flags = "--config", output / "config.yaml", *resume
        again = command_line(home, "run_lora_train", args.script.name, [args.family.name], *flags)
        again = again if processes == 1 else f"the same command with {' '.join(resume)}"
        print_status(f"{'go on':12}{again}")


def command_line(home: Path, wrapper: str, program: str, first: list[str], *words: object) -> str:
    """A command line that works here: one of the project's wrappers (its `first` argument: the family) in the
    project's own folder, `home`, else its Python file.
    """
    import subprocess

    windows = sys.platform == "win32"
    file = home / f"{wrapper}{'.bat' if windows else '.sh'}"
    line = [*["bash"] * (not windows), file.name, *first] if file.is_file() and Path.cwd() == home else None
    if line is None and not (home / program).is_file():
        return "README.md there has the lines for diffusers"
    line = [*(line or [sys.executable, home / program]), *words]
    return (subprocess.list2cmdline if windows else shlex.join)(map(str, line))
