"""The comparison image: before and after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

if TYPE_CHECKING:
    from lora_training.training.run import Run


def comparison_image(run: Run):
    """The picture to look at: training images, each prompt before and after with the same seeds, and control
    prompts.

    None if the run has not drawn all of them.
    """
    from PIL import ImageDraw, ImageFont

    output, shown = Path(run.args.output_dir), min(run.args.num_validation_images, 4)
    steps = {"before": 0, "with the\nLoRA" if run.lora_modules else "with the\nnew tokens": run.max_steps}
    blocks = [("trained on", {"": sorted(output.glob("training_pictures/*.png"))})]
    groups = [(prompt, f"{p:02d}_*") for p, prompt in enumerate(run.sample_prompts[:6])]
    for heading, pattern in (*groups, (f"should not change: {', '.join(run.control_prompts)}", "control_*")):
        rows = {
            name: sorted(output.glob(f"samples/step-{step:06d}/{pattern}")) for name, step in steps.items()
        }
        blocks.append((heading, rows))
    if not run.compares or any(len(files) < shown for _, rows in blocks[1:] for files in rows.values()):
        return None
    whole = 224 // max(run.plan_size)  # toys draw 64 pixels
    tile = tuple(round(side * (whole or 384 / max(run.plan_size))) for side in run.plan_size)
    font, small = ImageFont.load_default(20), ImageFont.load_default(16)
    margin, label, head, columns = 12, 120, 34, max(4, shown)
    width = label + columns * (tile[0] + margin) + margin
    height = sum(head + margin + (tile[1] + margin) * len(rows) for _, rows in blocks)
    sheet = Image.new("RGB", (width, height), "white")
    pen, y = ImageDraw.Draw(sheet), margin
    for heading, rows in blocks:
        heading = heading[:300]
        while pen.textlength(heading, font=font) > width - 2 * margin:
            heading = heading[:-2] + "…"
        pen.text((margin, y), heading, fill="black", font=font)
        y += head
        for name, files in rows.items():
            pen.text((margin, y + tile[1] // 2 - 16), name, fill="#444", font=small)
            for k, file in enumerate(files[:columns]):
                with Image.open(file) as image:
                    sharp = whole and image.width == run.plan_size[0]
                    method = Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS
                    fitted = ImageOps.pad(image.convert("RGB"), tile, method, color="white")
                sheet.paste(fitted, (label + k * (tile[0] + margin), y))
            y += tile[1] + margin
        y += margin
    return sheet
