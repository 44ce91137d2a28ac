"""Says what is in a LoRA file, and answers "my LoRA has no effect".

    python scripts/lora/inspect_lora.py output/mine
    python scripts/lora/inspect_lora.py mine.safetensors --plot mine.png --base BASE_FOLDER

Prints family, rank, alpha, layers, trained text encoders and what the file's metadata says of words, data and training,
whichever trainer wrote it; the size of the update by block, as numbers and with --plot as
a picture; and whether the update is zero, not finite, or out of scale. With --base FOLDER sizes are relative to the base's
weights. Exit status: 0 sound, 1 something is wrong with the weights, 2 not a LoRA.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.lora.parts.lora_files import Lora, read_lora
from scripts.lora.parts.low_rank import FileError
from scripts.lora.parts.original_layout import BaseWeights
from scripts.parts.netted import netted
from scripts.parts.training_scripts import SCRIPTS

FAINT, STRONG = 1e-6, 0.05  # root mean square of an update; the weights of a base are about 0.02 to 0.05
SAID = {  # of the metadata, by line
    "hint": ("modelspec.usage_hint",),
    "base": ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name", "modelspec.prediction_type"),
    "data": ("ss_num_train_images", "ss_resolution", "ss_caption_dropout_rate", "ss_clip_skip"),
    "training": (
        *(
            "ss_max_train_steps",
            "ss_steps",
            "ss_learning_rate",
            "ss_text_encoder_lr",
            "ss_lr_scheduler",
            "ss_optimizer",
        ),
        *("ss_batch_size_per_device", "ss_seed", "ss_min_snr_gamma", "ss_noise_offset", "modelspec.date"),
    ),
}
FAINT_SHARE, STRONG_SHARE = 1e-4, 1.0  # of the base's own weight


def block_of(part: str, name: str) -> str:
    """The block that a layer belongs to, as people count them."""
    found = re.match(r"((?:down|up|single_transformer|transformer)_blocks\.\d+|mid_block)", name)
    if found:
        return found[1]
    found = re.search(r"(?:layers|block)\.(\d+)", name)
    return f"{part} {found[1]}" if found else name


def order_of(block: str) -> list:
    """Down before middle before up, numbers as numbers."""
    start = ["down", "mid", "up", "transformer", "single"]
    place = next((i for i, word in enumerate(start) if block.startswith(word)), len(start))
    return [place, re.sub(r"\d+", "", block), [int(n) for n in re.findall(r"\d+", block)]]


def measure(lora: Lora, base: Path | None) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """(size by block, size by layer, layers that are not finite): root mean squares, or shares of the base's weights."""
    weights = BaseWeights(base, lora.family, lora.base.config) if base else None
    sums, sizes, broken = defaultdict(lambda: [0.0, 0.0]), {}, []
    for part, name, layer in lora:
        if not all(torch.isfinite(t.float()).all() for t in layer.tensors):
            broken.append(f"{part}.{name}")
            continue
        norm = layer.norm()
        reference = math.sqrt(math.prod(layer.shape))
        if base:
            reference = weights(part, name).float().norm().item()
        sizes[f"{part}.{name}"] = norm / reference
        total = sums[block_of(part, name)]
        total[0] += norm**2
        total[1] += reference**2
    by_block = {block: math.sqrt(a / b) for block, (a, b) in sorted(sums.items(), key=lambda item: order_of(item[0]))}
    return by_block, sizes, broken


def verdict(lora: Lora, sizes: dict[str, float], broken: list[str], relative: bool) -> tuple[list[str], bool]:
    """(findings in plain words, whether something is wrong)."""
    faint, strong = (FAINT_SHARE, STRONG_SHARE) if relative else (FAINT, STRONG)
    unit = "of the base's weight" if relative else "per weight (root mean square)"
    if broken:
        return [
            f"NOT FINITE: {len(broken)} layers have NaN or infinite weights, such as {broken[0]}: train again"
        ], True
    if not any(sizes.values()):
        return ["ZERO: the update is exactly zero: nothing was learned, and it will have no effect"], True
    zero = [name for name, size in sizes.items() if size == 0]
    largest = max(sizes, key=sizes.get)
    findings, wrong = [], False
    if sizes[largest] < faint:
        findings.append(
            f"TOO FAINT: the largest update is {sizes[largest]:.1e} {unit}: train longer, or with a higher learning rate"
        )
        wrong = True
    if sizes[largest] > strong:
        findings.append(
            f"OUT OF SCALE: {largest} changes by {sizes[largest]:.2g} {unit}: pictures will be noise or copies; use it at a"
            " lower scale, or train with a lower learning rate"
        )
        wrong = True
    if zero:
        findings.append(f"{len(zero)} of {len(sizes)} layers have no update, such as {zero[0]}")
    return findings or ["sound: finite, not zero, and of an ordinary size"], wrong


def trigger_words(metadata: dict[str, str]) -> str:
    """Words that the file says it was trained with: its trigger phrase, else the tags that most captions have."""
    said = metadata.get("modelspec.trigger_phrase")
    if said:
        return said
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}")).values()
        tags = sum((Counter(folder) for folder in folders), Counter())
    except (ValueError, AttributeError, TypeError):
        tags = Counter()
    common = [tag.strip() for tag, _ in tags.most_common(5) if len(tag) < 30]  # no captions
    return f"none in the metadata; its commonest tags: {', '.join(common)}" if common else "none in the metadata"


def told(metadata: dict[str, str]) -> list[str]:
    """Lines of what the metadata says of base, data and training; nothing for a file without."""
    lines = []
    for title, keys in SAID.items():
        values = [(key.rpartition(".")[2].removeprefix("ss_"), metadata.get(key, "None")) for key in keys]
        known = [f"{name} {value}" for name, value in values if value not in ("None", "")]
        lines += [f"{title:<15} {', '.join(known)}"] if known else []
    return lines


def summary(lora: Lora) -> list[str]:
    """Lines about what the file holds."""
    ranks = Counter(x.rank for _, _, x in lora)
    scales = Counter(f"{x.alpha / x.rank:g}" for _, _, x in lora if x.alpha is not None)
    kinds = Counter(re.sub(r"\d+", "N", name).rsplit("N.", 1)[-1] for _, name, _ in lora)
    text = [part for part in lora.layers if part.startswith("text_encoder")]
    made_of = ", ".join(kind for kind in lora.kinds if kind != "LoRA")
    return [
        f"family          {lora.family}{f' ({made_of})' if made_of else ''}",
        f"rank            {', '.join(f'{r} ({n} layers)' if len(ranks) > 1 else str(r) for r, n in ranks.most_common())}",
        f"alpha / rank    {', '.join(s for s, _ in scales.most_common(5))}",
        f"layers          {', '.join(f'{n} x {kind}' for kind, n in kinds.most_common())}",
        f"text encoders   {', '.join(text) or 'none'}",
        f"trigger words   {trigger_words(lora.metadata)}",
        *told(lora.metadata),
        f"parameters      {sum(t.numel() for _, _, x in lora for t in x.tensors) / 1e6:.2f} million",
        *lora.notes,
    ]


def plot(blocks: dict[str, float], title: str, unit: str):
    """Horizontal bars, one per block."""
    from PIL import Image, ImageDraw, ImageFont

    font, small, row, left, width = ImageFont.load_default(18), ImageFont.load_default(14), 22, 250, 900
    image = Image.new("RGB", (width, 70 + row * len(blocks)), "white")
    pen = ImageDraw.Draw(image)
    pen.text((12, 10), title, fill="black", font=font)
    pen.text((12, 36), f"size of the update by block: {unit}", fill="#555", font=small)
    top = max(blocks.values()) or 1.0
    for i, (block, size) in enumerate(blocks.items()):
        y = 62 + i * row
        pen.text((12, y), block, fill="black", font=small)
        pen.rectangle(
            (left, y + 2, left + max(1, round((width - left - 100) * size / top)), y + row - 6), fill="#3b6fb6"
        )
        pen.text((width - 90, y), f"{size:.2e}", fill="#333", font=small)
    return image


@netted
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Says what is in a LoRA file, and whether its update is sound.")
    parser.add_argument("lora", type=Path, help="a .safetensors file, or a folder that training or peft has written")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the sizes by block as a picture")
    parser.add_argument("--base", type=Path, help="diffusers folder of the base: sizes relative to its weights")
    parser.add_argument("--family", choices=sorted(SCRIPTS), help="default: found out from the file")
    args = parser.parse_args(argv)
    try:
        lora = read_lora(args.lora, args.family, str(args.base) if args.base else None)
        blocks, sizes, broken = measure(lora, args.base)
    except (FileError, ValueError, OSError) as error:
        print(f"inspect_lora.py: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(summary(lora)))
    unit = "share of the base's weights" if args.base else "root mean square per weight"
    if blocks:
        print(f"update by block ({unit}):")
        top = max(blocks.values()) or 1.0
        for block, size in blocks.items():
            print(f"  {block:<32} {size:.2e} {'#' * round(40 * size / top)}")
    if args.plot and blocks:
        plot(blocks, args.lora.name, unit).save(args.plot)
        print(f"{args.plot}")
    findings, wrong = verdict(lora, sizes, broken, args.base is not None)
    print("\n".join(findings))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
