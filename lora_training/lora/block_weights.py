"""--block_weights: a factor for each block of a LoRA, as merge_lora.py takes it.

An entry is a block's name and a number, `double_blocks.0-9=0.5`: everything below that name in the base, by
the names of diffusers, of the original checkpoint, or of a text encoder. Of several entries that mean a
layer, the last one counts.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from typing import TYPE_CHECKING

from lora_training.errors import UserError

if TYPE_CHECKING:
    from lora_training.lora.base_layers import BaseLayers

MOST_BLOCKS = 1000  # in one range
Layer = tuple[str, str]  # (part, diffusers name)


def parse_block_weights(text: str) -> list[tuple[str, float]]:
    """[(block, weight)] of "BLOCK=WEIGHT BLOCK=WEIGHT". Errors: UserError that names the entry."""
    entries = []
    for entry in text.replace(",", " ").split():
        block, equals, value = entry.partition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not (block and equals and math.isfinite(weight)):
            raise UserError(f"--block_weights {entry}: expected BLOCK=WEIGHT, as double_blocks.0-9=0.5")
        entries.append((block, weight))
    if not entries:
        raise UserError("--block_weights: expected BLOCK=WEIGHT, as double_blocks.0-9=0.5")
    return entries


def layer_weights(entries: list[tuple[str, float]], base: BaseLayers) -> dict[Layer, float]:
    """The weights of the layers that the entries mean. Errors: UserError for a block that the base hasn't."""
    layers = layers_by_prefix(base)
    weights: dict[Layer, float] = {}
    for block, weight in entries:
        for name in block_names(block):
            if name not in layers:
                raise UserError(f"--block_weights {block}: {missing_block(name, layers, base)}")
            weights |= dict.fromkeys(layers[name], weight)
    return weights


def missing_block(name: str, layers: dict[str, list[Layer]], base: BaseLayers) -> str:
    """Why a name is no block of the base: the last number that there is, or the name of nearest spelling."""
    parent, _, number = name.rpartition(".")
    numbers = [int(n) for n in re.findall(rf"^{re.escape(parent)}\.(\d+)$", "\n".join(layers), re.MULTILINE)]
    if number.isdigit() and numbers:
        return f"{base.title} has {parent}.{min(numbers)} to {max(numbers)}"
    (near,) = difflib.get_close_matches(name, layers, n=1, cutoff=0.0)
    return f"no block of {base.title}; the nearest is {near}"


def layers_by_prefix(base: BaseLayers) -> dict[str, list[Layer]]:
    """{a name, or the beginning of one up to a dot: the layers below it}, in all spellings that have dots."""
    layers: dict[str, list[Layer]] = {}
    for part, name in base.shapes:
        is_denoiser = part == base.family.denoiser
        spellings = {name if is_denoiser else f"{part}.{name}", f"{part}.{name}"}
        if is_denoiser:
            spellings.add(base.places[name].name)
        prefixes = {p for s in spellings for p in itertools.accumulate(s.split("."), "{}.{}".format)}
        for prefix in prefixes:
            layers.setdefault(prefix, []).append((part, name))
    return layers


def block_names(block: str) -> list[str]:
    """ "double_blocks.0-2" -> ["double_blocks.0", …]. Errors: UserError for a range that isn't one."""
    numbers = []
    for number in block.split("."):
        match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", number)
        first, last = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 0 <= last - first < MOST_BLOCKS:
            raise UserError(f"--block_weights {block}: {number} is no range of blocks")
        numbers.append([str(n) for n in range(first, last + 1)] if match else [number])
    return [".".join(names) for names in itertools.product(*numbers)]
