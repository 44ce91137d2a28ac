"""A place in a batch turned into tensors."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from lora_training.base_model.vae import latent_shape
from lora_training.data.buckets import cover_size
from lora_training.data.crops import Crop, crop_and_augment, draw_crop
from lora_training.data.image_store import MEMORY_BUDGET, ImageStore, MaskStore
from lora_training.seeds import stable_seed

if TYPE_CHECKING:
    import argparse

    from lora_training.data.batches import Slot
    from lora_training.data.folders import Example


class TrainingData:
    """Turns a `Slot` into tensors. Everything random in it is drawn from (seed, epoch, image, repeat)."""

    def __init__(
        self,
        store: ImageStore,
        class_store: ImageStore | None,
        args: argparse.Namespace,
        vae_config: dict,
        scheduler,
        draw_noise,
        draw_caption,
    ) -> None:
        """draw_noise, draw_caption: the recipe's functions of these names."""
        self.stores = (store, class_store)  # by Slot.is_class
        masked = any(example.read_mask for example in store.examples)
        self.masks = MaskStore(store.examples, store.buckets, "bilinear", MEMORY_BUDGET) if masked else None
        self.examples, self.buckets, self.args = store.examples, store.buckets, args
        self.class_examples = class_store.examples if class_store else []
        set_draw_keys(self.examples)
        set_draw_keys(self.class_examples)
        self.vae_config, self.scheduler = vae_config, scheduler
        self.draw_noise, self.draw_caption = draw_noise, draw_caption
        # what is cached, by (is_class, index, bucket, flip): (2C, h, w) and (1, h, w)
        self.moments: dict[tuple, torch.Tensor] = {}
        self.cached_masks: dict[tuple, torch.Tensor] = {}

    def draw_slot_crop(self, slot: Slot, rng: random.Random) -> Crop:
        """The slot's crop. With cached latents only the flip is drawn anew."""
        example, target = self.stores[slot.is_class].examples[slot.index], self.buckets[slot.bucket]
        size = cover_size(example.size, target)
        crop = draw_crop(size, target, rng, self.args)
        if self.args.cache_latents:
            seed = stable_seed(self.args.seed, "crop", slot.is_class, example.draw_key)
            fixed = draw_crop(size, target, random.Random(seed), self.args)
            crop = Crop(fixed.left, fixed.top, crop.flip)
        return crop

    def pixels(self, slot: Slot, crop: Crop, rng: random.Random) -> torch.Tensor:
        """The slot's pixels (3, H, W), in uint8, a fourth of float32's bytes on their way to the device."""
        window, crop = self.stores[slot.is_class].window(slot.index, slot.bucket, crop)
        image = crop_and_augment(window, self.buckets[slot.bucket], crop, rng, self.args)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def mask(self, slot: Slot, crop: Crop, rng: random.Random) -> torch.Tensor:
        """The weights of the slot's latents in the loss, (1, h, w), with mean 1.

        rng: as it was for the picture.
        """
        target = self.buckets[slot.bucket]
        _, height, width = latent_shape(target, self.vae_config)
        if slot.is_class:
            return torch.ones(1, height, width)
        window, crop = self.masks.window(slot.index, slot.bucket, crop)
        mask = crop_and_augment(window, target, crop, rng, self.args)
        mask = mask.resize((width, height), Image.Resampling.BOX)
        shares = torch.from_numpy(np.array(mask))[None].float() / 255
        low = self.examples[slot.index].set_args.unmasked_weight
        weights = (low + (1 - low) * shares).clamp_(min=1e-3)  # a crop beside the mask: all of it counts
        return weights / weights.mean()

    def __getitem__(self, slot: Slot) -> dict:
        """One sample: weight, sizes, latents' moments or pixels, mask, caption, and what the recipe draws."""
        example, target = self.stores[slot.is_class].examples[slot.index], self.buckets[slot.bucket]
        place = (self.args.seed, slot.epoch, slot.is_class, example.draw_key, slot.repeat)
        rng = random.Random(stable_seed("image", *place))
        crop = self.draw_slot_crop(slot, rng)
        left = cover_size(example.size, target)[0] - target[0] - crop.left if crop.flip else crop.left
        item = {
            "weight": torch.tensor(slot.weight),
            "original_size": torch.tensor((example.size[1], example.size[0])),
            "crop_top_left": torch.tensor((crop.top, left)),  # in the picture as it is seen, mirrored or not
            "target_size": torch.tensor((target[1], target[0])),
        }
        key = (slot.is_class, slot.index, slot.bucket, crop.flip)
        if self.masks:
            mask_rng = random.Random()
            mask_rng.setstate(rng.getstate())  # so that a mask is turned as its picture is
            cached = self.cached_masks.get(key)
            item["mask"] = self.mask(slot, crop, mask_rng) if cached is None else cached
        if key in self.moments:
            item["moments"] = self.moments[key]
        else:
            item["pixels"] = self.pixels(slot, crop, rng)
        caption_rng = random.Random(stable_seed("caption", *place))
        if slot.is_class:
            item["caption"] = caption_rng.choice(example.captions)
        else:
            set_args = example.set_args or self.args
            captions = example.marked_captions or example.captions
            item["caption"] = self.draw_caption(captions, caption_rng, set_args)
        generator = torch.Generator().manual_seed(stable_seed("noise", *place))
        shape = latent_shape(target, self.vae_config)
        item["posterior_noise"] = torch.randn(shape, generator=generator)
        return item | self.draw_noise(generator, shape, self.scheduler, self.args)


def set_draw_keys(examples: list[Example]) -> None:
    """Gives each example what its draws depend on: its name, and a number from the second of a name on."""
    counts = Counter()
    for example in examples:
        number = counts[example.name]
        example.draw_key = f"{example.name}\0{number}" if number else example.name
        counts[example.name] += 1


def collate(items: list[dict]) -> dict:
    """Items of one bucket -> batch: tensors stacked along a first dimension, captions as a list."""
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0] if key != "caption"}
    return batch | {"captions": [item["caption"] for item in items]}
