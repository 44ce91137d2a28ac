"""--validation_prompts_file."""

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
    "lora_scale": ("", "lora_scale", amount),
}


def read_prompts(file: str, pixel_divisor: int) -> list[dict]:
    """The prompts of --validation_prompts_file, each with its settings (PROMPT_KEYS).

    Errors: UserError that names the entry.
    """
    letters = {letter: key for key, (letter, *_) in PROMPT_KEYS.items() if letter} | {"g": "guidance"}
    if file.lower().endswith((".yaml", ".yml", ".json")):
        entries = [
            {"prompt": e} if isinstance(e, str) else e
            for e in read_config_file(file, "--validation_prompts_file", list)
        ]
    else:
        lines = [line.strip() for line in read_text_file(file, "--validation_prompts_file").splitlines()]
        pieces = [re.split(r"\s--(\w+)\s+", line) for line in lines if line and not line.startswith("#")]
        entries = [
            {"prompt": p[0]} | {letters.get(k, k): v for k, v in zip(p[1::2], p[2::2], strict=True)}
            for p in pieces
        ]
    for number, entry in enumerate(entries, 1):
        where = f"--validation_prompts_file {file}, prompt {number}"
        if not isinstance(entry, dict) or not str(entry.get("prompt") or "").strip():
            raise UserError(f"{where}: has no prompt")
        for key, value in entry.items():
            if key not in PROMPT_KEYS:
                raise UserError(f"{where}: unknown key {key!r}; known are {', '.join(PROMPT_KEYS)}")
            try:
                entry[key] = PROMPT_KEYS[key][2](str(value))
            except (ValueError, argparse.ArgumentTypeError):
                raise UserError(f"{where}: {key} {value!r} is no {PROMPT_KEYS[key][2].__name__}") from None
            if key in ("width", "height") and entry[key] % pixel_divisor:
                raise UserError(f"{where}: {key} {value} is not divisible by {pixel_divisor}")
    if not entries:
        raise UserError(f"--validation_prompts_file {file}: no prompt in it")
    return entries
