"""Class images for prior preservation."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lora_training.console import print_status, progress
from lora_training.data.captions import clean_caption
from lora_training.data.folders import Example, folder_examples
from lora_training.files import atomic_write
from lora_training.seeds import stable_seed
from lora_training.tensors import torch_dtype
from lora_training.validation.drawing import sample_images

if TYPE_CHECKING:
    import argparse

    from lora_training.base_model.components import Components
    from lora_training.text.prompts import Prompts


def generate_class_images(
    args: argparse.Namespace, components: Components, prompts: Prompts, accelerator
) -> None:
    """Draws the class images that are missing with the untrained base, and keeps them for the next run.

    Image i depends on (seed, i) only, so that several processes, or a second start, draw what one would have
    drawn.
    """
    folder = Path(args.class_data_dir)
    there = [example.name for example in load_class_examples(args)]
    missing = [i for i in range(args.num_class_images) if f"class_{i:05d}.png" not in there]
    missing = missing[: args.num_class_images - len(there)]
    accelerator.wait_for_everyone()
    if not missing:
        return
    wanted = f"{len(there)} of {args.num_class_images} class images in {folder}"
    print_status(f"{wanted}: drawing {len(missing)} of {args.class_prompt!r}")
    precision = args.prior_generation_precision
    dtype = torch_dtype(precision) if precision else components.dtype
    embeds = {k: v.to(accelerator.device, dtype) for k, v in prompts.for_pipeline(args.class_prompt).items()}
    prompts.release()  # never on the GPU together with the denoiser
    frugal = args.quantize_base or args.blocks_to_swap
    base = components.denoiser() if frugal else components.get(args.family.denoiser, dtype)
    pipeline, size = components.pipeline(base), (args.resolution * 2)[:2]
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    with progress("class images", len(mine)) as bar:
        for begin in range(0, len(mine), args.sample_batch_size):
            numbers = mine[begin : begin + args.sample_batch_size]
            seeds = [stable_seed(args.seed, "class", i) % 2**32 for i in numbers]
            images = sample_images(pipeline, components, embeds, seeds, size, args, contextlib.nullcontext())
            for number, image in zip(numbers, images, strict=True):
                with atomic_write(folder / f"class_{number:05d}.png") as part:
                    image.save(part)
                bar.update()
    del pipeline, base
    components.free(args.family.denoiser)
    accelerator.wait_for_everyone()


def load_class_examples(args: argparse.Namespace) -> list[Example]:
    """The whole class images that are there, --num_class_images of them at most, each with its own caption if
    it has one.
    """
    examples = []
    for example in folder_examples(Path(args.class_data_dir), None):
        if len(examples) < args.num_class_images:
            example.captions = example.captions or [clean_caption(args.class_prompt)]
            with contextlib.suppress(Exception), Image.open(io.BytesIO(example.read())) as image:
                image.verify()  # a half-written one doesn't count
                examples.append(example)
    return examples
