"""--cache_latents: latents encoded once, kept in memory and, with --cache_folder, on disk."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from lora_training.base_model.vae import encode_pixels
from lora_training.cache import DiskCache
from lora_training.data.batches import BatchPlan, Slot
from lora_training.errors import UserError
from lora_training.processes import distribute

if TYPE_CHECKING:
    import argparse

    from lora_training.base_model.components import Components
    from lora_training.data.crops import Crop
    from lora_training.data.samples import TrainingData


def cache_latents(
    data: TrainingData, plan: BatchPlan, components: Components, args: argparse.Namespace
) -> None:
    """Encodes what the plan can ask for: every image in its bucket, and class images in every bucket in use.

    With --random_flip each is encoded mirrored, too. The VAE is loaded only if something is missing, and
    freed.
    """
    disk = DiskCache(args.cache_folder, "latents")
    vae_float32, interpolation = args.family.vae_float32, args.image_interpolation_mode
    # under other keys than at first, when an image of another set could stand under another's hash
    identity = ("moments of a file", args.family.name, components.identity("vae"))
    identity += (components.dtype, vae_float32, interpolation)
    slots = [Slot(i, example.bucket, 0, 0, 1.0) for i, example in enumerate(data.examples)]
    slots += class_slots(data, plan)
    flips = (False, True)[: 1 + args.random_flip]
    views = [(number, flip) for number in range(len(slots)) for flip in flips]

    def load_or_encode(view: tuple[int, bool]) -> torch.Tensor:
        slot, crop = slots[view[0]], fixed_crop(data, slots[view[0]], view[1])
        example = data.stores[slot.is_class].examples[slot.index]
        key = (*identity, example.digest, data.buckets[slot.bucket], crop.left, crop.top, crop.flip)
        tensors = disk.load(*key)
        if tensors is None:
            tensors = {"moments": encode(data, slot, crop, components, example.name)}
            disk.store(tensors, *key)
        return tensors["moments"]

    moments = distribute("latents", views, lambda share: map(load_or_encode, share))
    for (number, flip), value in moments.items():
        slot = slots[number]
        key = (slot.is_class, slot.index, slot.bucket, flip)
        data.moments[key] = value
        if data.masks:
            data.cached_masks[key] = data.mask(slot, fixed_crop(data, slot, flip), random.Random(0))
    components.free("vae")
    for store in (*data.stores, data.masks):
        if store:
            store.covers.clear()


def class_slots(data: TrainingData, plan: BatchPlan) -> list[Slot]:
    """Every class image in every bucket that has images."""
    buckets, indices = sorted(set(plan.buckets.values())), range(len(data.class_examples))
    return [Slot(index, bucket, 0, 0, 1.0, True) for index in indices for bucket in buckets]


def fixed_crop(data: TrainingData, slot: Slot, flip: bool) -> Crop:
    """A slot's crop, which is the same in every epoch where latents are cached."""
    crop = data.draw_slot_crop(slot, random.Random(0))
    crop.flip = flip
    return crop


def encode(data: TrainingData, slot: Slot, crop: Crop, components: Components, name: str) -> torch.Tensor:
    """Moments (2C, h, w) of a slot's picture, on the CPU. Errors: UserError for values that aren't finite."""
    pixels = data.pixels(slot, crop, random.Random(0))
    moments = encode_pixels(pixels[None], components.vae())[0].cpu()
    if not torch.isfinite(moments).all():
        advice = "use --mixed_precision bf16, or another --pretrained_vae_model_name_or_path"
        raise UserError(f"{name}: the VAE's values aren't finite in {components.dtype}; {advice}")
    return moments
