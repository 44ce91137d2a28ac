"""The comparison image: training pictures, and what is drawn before and after the training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

if TYPE_CHECKING:
    from lora_training.training.run import Run

COLUMNS = 4  # of tiles; fewer pictures leave room
MARGIN, LABEL_WIDTH, HEADING_HEIGHT = 12, 120, 34  # pixels
TILE_SIDE = 384  # pixels of a tile's longer side
ENLARGED_SIDE = 224  # pictures of at most so many pixels, as toys draw them, are enlarged by a whole number
MAX_PROMPTS = 6


class Block(NamedTuple):
    """A heading, and rows of pictures below it.

    rows: {label: files from left to right}; columns: how many each has if all are drawn.
    """

    heading: str
    rows: dict[str, list[Path]]
    columns: int = COLUMNS


def comparison_image(run: Run) -> Image.Image | None:
    """Training pictures, each prompt before and after with the same seeds, and control prompts.

    None if the run has not drawn all of them.
    """
    training, *drawn = comparison_blocks(run)
    is_complete = all(len(files) == block.columns for block in drawn for files in block.rows.values())
    if not run.draws_comparison or not is_complete:
        return None
    return draw_blocks([training, *drawn], run.validation_size)


def comparison_blocks(run: Run) -> list[Block]:
    """Training pictures, then a block for each prompt and one for the control prompts."""
    output = Path(run.args.output_dir)
    after = "with the\nLoRA" if run.lora_modules else "with the\nnew tokens"
    steps = {"before": 0, after: run.max_steps}
    count, prompts = min(run.pictures.per_prompt, COLUMNS), run.sample_prompts[:MAX_PROMPTS]
    patterns = [(prompt, f"{number:02d}_*", count) for number, prompt in enumerate(prompts)]
    if run.pictures.controls:
        heading = f"should not change: {', '.join(run.control_prompts)}"
        patterns.append((heading, "control_*", min(run.pictures.controls, COLUMNS)))
    blocks = [Block("trained on", {"": sorted(output.glob("training_pictures/*.png"))})]
    for heading, pattern, columns in patterns:
        rows = {}
        for label, step in steps.items():
            rows[label] = sorted(output.glob(f"samples/step-{step:06d}/{pattern}"))[:columns]
        blocks.append(Block(heading, rows, columns))
    return blocks


def draw_blocks(blocks: list[Block], size: tuple[int, int]) -> Image.Image:
    """The blocks below each other, on white. size: (width, height) of the drawn pictures."""
    enlargement = ENLARGED_SIDE // max(size)  # 0 for what is larger
    scale = enlargement or TILE_SIDE / max(size)
    tile_width, tile_height = (round(side * scale) for side in size)
    width = LABEL_WIDTH + COLUMNS * (tile_width + MARGIN) + MARGIN
    rows = sum(len(block.rows) for block in blocks)
    height = len(blocks) * (HEADING_HEIGHT + MARGIN) + rows * (tile_height + MARGIN)
    canvas = Image.new("RGB", (width, height), "white")
    draw, y = ImageDraw.Draw(canvas), MARGIN
    heading_font, label_font = ImageFont.load_default(20), ImageFont.load_default(16)
    for block in blocks:
        heading = shorten(block.heading, heading_font, width - 2 * MARGIN)
        draw.text((MARGIN, y), heading, fill="black", font=heading_font)
        y += HEADING_HEIGHT
        for label, files in block.rows.items():
            draw.text((MARGIN, y + tile_height // 2 - 16), label, fill="#444", font=label_font)
            for column, file in enumerate(files[:COLUMNS]):
                with Image.open(file) as image:
                    keeps_pixels = enlargement > 0 and image.width == size[0]
                    tile = fit_tile(image, (tile_width, tile_height), keeps_pixels)
                canvas.paste(tile, (LABEL_WIDTH + column * (tile_width + MARGIN), y))
            y += tile_height + MARGIN
        y += MARGIN
    return canvas


def shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A text, cut with an ellipsis to a width in pixels."""
    text = text[:300]
    while font.getlength(text) > width:
        text = text[:-2] + "…"
    return text


def fit_tile(image: Image.Image, size: tuple[int, int], keeps_pixels: bool) -> Image.Image:
    """A picture scaled into a tile, with white beside it. keeps_pixels: pixels become squares, unblurred."""
    method = Image.Resampling.NEAREST if keeps_pixels else Image.Resampling.LANCZOS
    return ImageOps.pad(image.convert("RGB"), size, method, color="white")
