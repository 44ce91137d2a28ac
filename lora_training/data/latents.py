"""Latents encoded once."""

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
    from lora_training.data.samples import TrainingData


def cache_latents(
    data: TrainingData, plan: BatchPlan, components: Components, args: argparse.Namespace
) -> None:
    """Encodes what the plan can ask for: every image in its bucket, mirrored too with --random_flip; class
    images in every bucket in use. The VAE is loaded only if something is missing, and freed afterwards.
    """
    disk = DiskCache(args.cache_folder, "latents")
    identity = (
        args.family.name,
        components.identity("vae"),
        components.dtype,
        args.family.vae_float32,
        args.image_interpolation_mode,
    )
    stores = [store for store in data.stores if store]
    slots = [Slot(i, e.bucket, 0, 0, 1.0) for i, e in enumerate(data.examples)]
    for store in stores[1:]:
        used = sorted(set(plan.buckets.values()))
        slots += [Slot(i, b, 0, 0, 1.0, True) for i in range(len(store.examples)) for b in used]

    def moments(place: tuple[int, bool]):
        slot, flip = slots[place[0]], place[1]
        example, crop = stores[slot.is_class].examples[slot.index], data.crop_of(slot, random.Random(0))
        crop.flip = flip
        key = (*identity, example.digest, data.buckets[slot.bucket], crop.left, crop.top, flip)
        found = disk.load(*key)
        if found is None:
            pixels = data.view(slot, crop, random.Random(0))
            found = {"moments": encode_pixels(pixels[None], components.vae())[0].cpu()}
            if not torch.isfinite(found["moments"]).all():
                advice = "use --mixed_precision bf16, or another --pretrained_vae_model_name_or_path"
                raise UserError(
                    f"{example.name}: the VAE's values aren't finite in {components.dtype}; {advice}"
                )
            disk.store(found, *key)
        return found["moments"]

    flips = (False, True)[: 1 + args.random_flip]
    places = [(number, flip) for number in range(len(slots)) for flip in flips]
    for (number, flip), found in distribute("latents", places, lambda share: map(moments, share)).items():
        data.moments[slots[number].is_class, slots[number].index, slots[number].bucket, flip] = found
        if data.masks:
            slot, crop = slots[number], data.crop_of(slots[number], random.Random(0))
            crop.flip = flip
            data.kept_masks[slot.is_class, slot.index, slot.bucket, flip] = data.mask(
                slot, crop, random.Random(0)
            )
    components.free("vae")
    for store in (*stores, data.masks) if data.masks else stores:
        store.kept.clear()
