"""How good a toy base is: does it draw what a prompt asks for, and how cleanly."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from scripts.dev.toys.parts.toy_judge import load_judge, verdicts
from scripts.dev.toys.parts.toy_outline import cleanness
from scripts.dev.toys.parts.toy_world import SIZE, describe, random_scene

SAMPLING = {  # how each kind of base is asked to draw
    "StableDiffusionPipeline": {"num_inference_steps": 25, "guidance_scale": 4.0},
    "StableDiffusionXLPipeline": {"num_inference_steps": 25, "guidance_scale": 4.0},
    "StableDiffusion3Pipeline": {"num_inference_steps": 20, "guidance_scale": 3.0, "max_sequence_length": 77},
    "FluxPipeline": {"num_inference_steps": 20, "guidance_scale": 3.5, "max_sequence_length": 77},
}


def pictures_of(folder: Path, prompts: list[str]) -> list[Image.Image]:
    """One picture per prompt, drawn by the base in `folder`; the same ones each time."""
    from diffusers import DiffusionPipeline

    sampling = SAMPLING[json.loads((folder / "model_index.json").read_text())["_class_name"]]
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for i in range(0, len(prompts), 32):
        generator = torch.Generator().manual_seed(i)
        images += pipeline(
            prompts[i : i + 32], height=SIZE, width=SIZE, generator=generator, **sampling
        ).images
    return images


def scores(folder: Path, count: int = 64, sheet: Path | None = None) -> dict[str, str]:
    """How good `count` pictures of a base are, as text by the name of the score; `sheet` gets all of them."""
    rng = random.Random(99)
    scenes = [random_scene(rng) for _ in range(count)]
    images = pictures_of(folder, [describe(*scene) for scene in scenes])
    right = np.array(verdicts(load_judge(), images)) == np.array(scenes)
    overlap, smudged = cleanness(images)
    if sheet:
        side_by_side(images).save(sheet)
    return {
        **{
            name: f"{share:.0%}"
            for name, share in zip(("shape", "colour", "background"), right.mean(0), strict=True)
        },
        "all three": f"{right.all(1).mean():.0%}",
        "overlap": f"{overlap.mean():.3f}",
        "overlap, worst tenth": f"{np.sort(overlap)[: max(1, count // 10)].mean():.3f}",
        "smudged": f"{smudged.mean():.2%}",
    }


def side_by_side(images: list[Image.Image], columns: int = 16) -> Image.Image:
    """All pictures in one, at twice their size."""
    cell = 2 * SIZE + 4
    sheet = Image.new("RGB", (columns * cell, -(-len(images) // columns) * cell), "gray")
    for i, image in enumerate(images):
        large = image.resize((2 * SIZE, 2 * SIZE), Image.Resampling.NEAREST)
        sheet.paste(large, (i % columns * cell + 2, i // columns * cell + 2))
    return sheet


def table(rows: dict[str, dict[str, str]]) -> str:
    """Scores by the name of the base, as a Markdown table."""
    names = list(next(iter(rows.values())))
    lines = [
        ["base", *names],
        ["---"] * (1 + len(names)),
        *([base, *row.values()] for base, row in rows.items()),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
