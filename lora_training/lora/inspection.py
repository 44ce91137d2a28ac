"""What is in a LoRA file, how large its update is, and whether something is wrong with it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lora_training.lora.single_file import BaseWeights

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from lora_training.lora.reading import Lora

# root mean square of an update; the weights of a base are about 0.02 to 0.05
FAINT, STRONG = 1e-6, 0.05
FAINT_SHARE, STRONG_SHARE = 1e-4, 1.0  # of the base's own weight
METADATA_LINES = {  # {title of a line: entries of the metadata}
    "hint": ("modelspec.usage_hint",),
    "base": (
        "ss_base_model_version",
        "modelspec.architecture",
        "ss_sd_model_name",
        "modelspec.prediction_type",
    ),
    "data": ("ss_num_train_images", "ss_resolution", "ss_caption_dropout_rate", "ss_clip_skip"),
    "training": (
        "ss_max_train_steps",
        "ss_steps",
        "ss_learning_rate",
        "ss_text_encoder_lr",
        "ss_lr_scheduler",
        "ss_optimizer",
        "ss_batch_size_per_device",
        "ss_seed",
        "ss_min_snr_gamma",
        "ss_noise_offset",
        "modelspec.date",
    ),
}


@dataclass
class UpdateSizes:
    """How large a LoRA's update is: root mean squares per weight, or shares of the base's weights."""

    is_relative: bool
    by_block: dict[str, float] = field(default_factory=dict)
    by_layer: dict[str, float] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)  # layers

    @property
    def unit(self) -> str:
        return "share of the base's weights" if self.is_relative else "root mean square per weight"


def measure_update(lora: Lora, base: Path | None) -> UpdateSizes:
    """The sizes of a LoRA's update; with a base, a folder or a single file, relative to its weights."""
    weights = BaseWeights(base, lora.family, lora.base.config) if base else None
    sizes = UpdateSizes(is_relative=base is not None)
    squares = defaultdict(lambda: [0.0, 0.0])  # {block: [of the update, of the reference]}
    for part, name, layer in lora:
        if not all(torch.isfinite(t.float()).all() for t in layer.tensors):
            sizes.not_finite.append(f"{part}.{name}")
            continue
        norm = layer.delta_norm()
        reference = (
            weights(part, name).float().norm().item() if weights else math.sqrt(math.prod(layer.shape))
        )
        sizes.by_layer[f"{part}.{name}"] = norm / reference
        of_block = squares[block_of_layer(part, name)]
        of_block[0] += norm**2
        of_block[1] += reference**2
    for block in sorted(squares, key=block_order):
        update, reference = squares[block]
        sizes.by_block[block] = math.sqrt(update / reference)
    return sizes


def block_of_layer(part: str, name: str) -> str:
    """The block that a layer belongs to, as people count them."""
    match = re.match(r"((?:down|up|single_transformer|transformer)_blocks\.\d+|mid_block)", name)
    if match:
        return match[1]
    match = re.search(r"(?:layers|block)\.(\d+)", name)
    return f"{part} {match[1]}" if match else name


def block_order(block: str) -> list:
    """A sort key: down before middle before up, numbers as numbers."""
    starts = ["down", "mid", "up", "transformer", "single"]
    place = next((i for i, start in enumerate(starts) if block.startswith(start)), len(starts))
    return [place, re.sub(r"\d+", "", block), [int(n) for n in re.findall(r"\d+", block)]]


def judge_update(sizes: UpdateSizes) -> tuple[list[str], bool]:
    """(lines that say whether the update is sound, whether something is wrong)."""
    if sizes.not_finite:
        count, example = len(sizes.not_finite), sizes.not_finite[0]
        return [
            f"NOT FINITE: {count} layers have NaN or infinite weights, such as {example}: train again"
        ], True
    if not any(sizes.by_layer.values()):
        return ["ZERO: the update is exactly zero: nothing was learned, and it will have no effect"], True
    faint, strong = (FAINT_SHARE, STRONG_SHARE) if sizes.is_relative else (FAINT, STRONG)
    unit = "of the base's weight" if sizes.is_relative else "per weight (root mean square)"
    layer, size = max(sizes.by_layer.items(), key=lambda item: item[1])
    findings, wrong = [], False
    if size < faint:
        advice = "train longer, or with a higher learning rate"
        findings.append(f"TOO FAINT: the largest update is {size:.1e} {unit}: {advice}")
        wrong = True
    if size > strong:
        advice = (
            "pictures will be noise or copies; use it at a lower scale, or train with a lower learning rate"
        )
        findings.append(f"OUT OF SCALE: {layer} changes by {size:.2g} {unit}: {advice}")
        wrong = True
    if zero := [name for name, value in sizes.by_layer.items() if value == 0]:
        findings.append(f"{len(zero)} of {len(sizes.by_layer)} layers have no update, such as {zero[0]}")
    return findings or ["sound: finite, not zero, and of an ordinary size"], wrong


def describe_lora(lora: Lora) -> list[str]:
    """Lines about what a file holds, and what its metadata says."""
    ranks = Counter(layer.rank for _, _, layer in lora)
    scales = Counter(f"{layer.alpha / layer.rank:g}" for _, _, layer in lora if layer.alpha is not None)
    layer_kinds = Counter(re.sub(r"\d+", "N", name).rsplit("N.", 1)[-1] for _, name, _ in lora)
    encoders = [part for part in lora.layers if part.startswith("text_encoder")]
    other_kinds = ", ".join(kind for kind in lora.kinds if kind != "LoRA")
    parameters = sum(t.numel() for _, _, layer in lora for t in layer.tensors) / 1e6
    rank_counts = [f"{r} ({n} layers)" if len(ranks) > 1 else str(r) for r, n in ranks.most_common()]
    return [
        f"family          {lora.family}{f' ({other_kinds})' if other_kinds else ''}",
        f"rank            {', '.join(rank_counts)}",
        f"alpha / rank    {', '.join(scale for scale, _ in scales.most_common(5))}",
        f"layers          {', '.join(f'{n} x {kind}' for kind, n in layer_kinds.most_common())}",
        f"text encoders   {', '.join(encoders) or 'none'}",
        f"trigger words   {trigger_words(lora.metadata)}",
        *metadata_lines(lora.metadata),
        f"parameters      {parameters:.2f} million",
        *lora.notes,
    ]


def trigger_words(metadata: dict[str, str]) -> str:
    """What the file says triggers it: its trigger phrase, else the tags that most captions have."""
    if phrase := metadata.get("modelspec.trigger_phrase"):
        return phrase
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}")).values()
        tags = sum((Counter(folder) for folder in folders), Counter())
    except (ValueError, AttributeError, TypeError):
        tags = Counter()
    common = [tag.strip() for tag, _ in tags.most_common(5) if len(tag) < 30]  # no captions
    if common:
        return f"none in the metadata; its commonest tags: {', '.join(common)}"
    return "none in the metadata"


def metadata_lines(metadata: dict[str, str]) -> list[str]:
    """Lines of what the metadata says of base, data and training; none for a file without."""
    lines = []
    for title, keys in METADATA_LINES.items():
        values = {key.rpartition(".")[2].removeprefix("ss_"): metadata.get(key, "None") for key in keys}
        entries = [f"{name} {value}" for name, value in values.items() if value not in ("None", "")]
        lines += [f"{title:<15} {', '.join(entries)}"] if entries else []
    return lines


def plot_sizes(sizes: UpdateSizes, title: str) -> Image.Image:
    """Horizontal bars of the update's size, one per block."""
    from PIL import Image, ImageDraw, ImageFont

    font, small_font = ImageFont.load_default(18), ImageFont.load_default(14)
    row, left, width = 22, 250, 900
    image = Image.new("RGB", (width, 70 + row * len(sizes.by_block)), "white")
    pen = ImageDraw.Draw(image)
    pen.text((12, 10), title, fill="black", font=font)
    pen.text((12, 36), f"size of the update by block: {sizes.unit}", fill="#555", font=small_font)
    largest = max(sizes.by_block.values()) or 1.0
    for i, (block, size) in enumerate(sizes.by_block.items()):
        y, length = 62 + i * row, max(1, round((width - left - 100) * size / largest))
        pen.text((12, y), block, fill="black", font=small_font)
        pen.rectangle((left, y + 2, left + length, y + row - 6), fill="#3b6fb6")
        pen.text((width - 90, y), f"{size:.2e}", fill="#333", font=small_font)
    return image
