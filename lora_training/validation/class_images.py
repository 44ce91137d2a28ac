"""Class images for prior preservation, drawn with the untrained base."""

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
from lora_training.validation.drawing import draw_images

if TYPE_CHECKING:
    import argparse

    from accelerate import Accelerator

    from lora_training.base_model.components import Components
    from lora_training.text.prompts import Prompts


def generate_class_images(
    args: argparse.Namespace, components: Components, prompts: Prompts, accelerator: Accelerator
) -> None:
    """Draws the class images that are missing in --class_data_dir, where the next run finds them, too.

    Image i depends on (seed, i) only, so that several processes, or a second start, draw what one would have
    drawn.
    """
    names = [example.name for example in load_class_examples(args)]
    missing = [number for number in range(args.num_class_images) if file_name(number) not in names]
    missing = missing[: args.num_class_images - len(names)]  # a person's own count, too
    accelerator.wait_for_everyone()
    if not missing:
        return
    count = f"{len(names)} of {args.num_class_images} class images in {args.class_data_dir}"
    print_status(f"{count}: drawing {len(missing)} of {args.class_prompt!r}")
    dtype = components.dtype
    if args.prior_generation_precision:
        dtype = torch_dtype(args.prior_generation_precision)
    embeds = prompts.for_pipeline(args.class_prompt)
    embeds = {name: value.to(accelerator.device, dtype) for name, value in embeds.items()}
    prompts.release()  # never on the GPU together with the denoiser
    if args.quantize_base or args.blocks_to_swap:
        denoiser = components.denoiser()
    else:
        denoiser = components.get(args.family.denoiser, dtype)
    pipeline = components.pipeline(denoiser)
    numbers = missing[accelerator.process_index :: accelerator.num_processes]
    draw_class_images(pipeline, components, embeds, numbers, args)
    del pipeline, denoiser
    components.free(args.family.denoiser)
    accelerator.wait_for_everyone()


def draw_class_images(
    pipeline, components: Components, embeds: dict, numbers: list[int], args: argparse.Namespace
) -> None:
    """Draws the class images of these numbers, --sample_batch_size at a time, and writes them."""
    size = (args.resolution * 2)[:2]
    with progress("class images", len(numbers)) as bar:
        for begin in range(0, len(numbers), args.sample_batch_size):
            group = numbers[begin : begin + args.sample_batch_size]
            seeds = [stable_seed(args.seed, "class", number) % 2**32 for number in group]
            autocast = contextlib.nullcontext()
            images = draw_images(pipeline, components, embeds, seeds, size, args, autocast)
            for number, image in zip(group, images, strict=True):
                with atomic_write(Path(args.class_data_dir) / file_name(number)) as temporary:
                    image.save(temporary)
                bar.update()


def file_name(number: int) -> str:
    """The name of a class image's file."""
    return f"class_{number:05d}.png"


def load_class_examples(args: argparse.Namespace) -> list[Example]:
    """The images in --class_data_dir that can be read, --num_class_images of them at most.

    One without a caption has --class_prompt as its caption.
    """
    examples = []
    for example in folder_examples(Path(args.class_data_dir), None):
        if len(examples) == args.num_class_images:
            break
        example.captions = example.captions or [clean_caption(args.class_prompt)]
        with contextlib.suppress(Exception), Image.open(io.BytesIO(example.read())) as image:
            image.verify()  # a half-written one doesn't count
            examples.append(example)
    return examples
