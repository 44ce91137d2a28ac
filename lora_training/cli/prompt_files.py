"""--validation_prompts_file: prompts with settings of their own, as YAML or as kohya's lines."""

from __future__ import annotations

import argparse
import re

from lora_training.cli.types import amount, count, natural
from lora_training.errors import UserError
from lora_training.files import read_config_file, read_text_file

PROMPT_KEYS = {  # of --validation_prompts_file: kohya's letter, the flag that it stands for, type
    "prompt": ("", "prompt", str),
    "negative_prompt": ("n", "negative_prompt", str),
    "width": ("w", "width", count),
    "height": ("h", "height", count),
    "seed": ("d", "sample_seed", natural),
    "steps": ("s", "validation_inference_steps", count),
    "guidance": ("l", "validation_guidance_scale", amount),
    "sampler": ("ss", "sampler", str),  # which is the base's
    "lora_scale": ("", "lora_scale", amount),
}


def read_prompts(file: str, pixel_divisor: int) -> list[dict]:
    """The prompts of --validation_prompts_file, each with its settings (PROMPT_KEYS).

    pixel_divisor: of image sides. Errors: UserError that names the entry.
    """
    if file.lower().endswith((".yaml", ".yml", ".json")):
        entries = read_config_file(file, "--validation_prompts_file", list)
        entries = [{"prompt": entry} if isinstance(entry, str) else entry for entry in entries]
    else:
        lines = [line.strip() for line in read_text_file(file, "--validation_prompts_file").splitlines()]
        entries = [parse_line(line) for line in lines if line and not line.startswith("#")]
    for number, entry in enumerate(entries, 1):
        check_entry(entry, f"--validation_prompts_file {file}, prompt {number}", pixel_divisor)
    if not entries:
        raise UserError(f"--validation_prompts_file {file}: no prompt in it")
    return entries


def parse_line(line: str) -> dict:
    """A line as kohya's scripts read it, "a cat --w 512 --n blurry", by our keys."""
    letters = {letter: key for key, (letter, *_) in PROMPT_KEYS.items() if letter} | {"g": "guidance"}
    prompt, *options = re.split(r"\s--(\w+)\s+", line)
    values = zip(map(str.lower, options[::2]), options[1::2], strict=True)
    return {"prompt": prompt} | {letters.get(letter, letter): value for letter, value in values}


def check_entry(entry: object, where: str, pixel_divisor: int) -> None:
    """Checks the settings of a prompt and converts them to their types. Errors: UserError."""
    if not isinstance(entry, dict) or not str(entry.get("prompt") or "").strip():
        raise UserError(f"{where}: has no prompt")
    for key, value in entry.items():
        if key not in PROMPT_KEYS:
            raise UserError(f"{where}: unknown key {key!r}; known are {', '.join(PROMPT_KEYS)}")
        convert = PROMPT_KEYS[key][2]
        try:
            entry[key] = convert(str(value))
        except (ValueError, argparse.ArgumentTypeError):
            raise UserError(f"{where}: {key} {value!r} is no {convert.__name__}") from None
        if key in ("width", "height") and entry[key] % pixel_divisor:
            raise UserError(f"{where}: {key} {value} is not divisible by {pixel_divisor}")
