"""A place in a batch turned into tensors."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from lora_training.base_model.vae import latent_shape
from lora_training.data.buckets import cover_size
from lora_training.data.crops import Crop, crop_and_augment, draw_crop
from lora_training.data.image_store import COVER_BUDGET, ImageStore, MaskStore
from lora_training.seeds import stable_seed

if TYPE_CHECKING:
    from lora_training.data.batches import Slot


class TrainingData:
    """Turns a `Slot` into tensors. Everything random in it is drawn from (seed, epoch, image, repeat)."""

    def __init__(
        self,
        store: ImageStore,
        class_store: ImageStore | None,
        args,
        vae_config: dict,
        scheduler,
        draw_noise,
        draw_caption,
    ) -> None:
        """draw_noise, draw_caption: the recipe's functions of these names."""
        self.stores = (store, class_store)  # by Slot.is_class
        masked = any(example.read_mask for example in store.examples)
        self.masks = MaskStore(store.examples, store.buckets, "bilinear", COVER_BUDGET) if masked else None
        self.examples, self.buckets, self.args = store.examples, store.buckets, args
        self.class_examples = class_store.examples if class_store else []
        self.vae_config, self.scheduler = vae_config, scheduler
        self.draw_noise, self.draw_caption = draw_noise, draw_caption
        # by (is_class, index, bucket, flip): (2C, H, W) and (1, H, W), if cached
        self.moments: dict[tuple, object] = {}
        self.kept_masks: dict[tuple, object] = {}

    def crop_of(self, slot: Slot, rng: random.Random) -> Crop:
        """The slot's crop. With cached latents only the flip is drawn anew."""
        example, target = self.stores[slot.is_class].examples[slot.index], self.buckets[slot.bucket]
        size = cover_size(example.size, target)
        crop = draw_crop(size, target, rng, self.args)
        if self.args.cache_latents:
            fixed = random.Random(stable_seed(self.args.seed, "crop", slot.is_class, example.name))
            still = draw_crop(size, target, fixed, self.args)
            crop = Crop(still.left, still.top, crop.flip)
        return crop

    def view(self, slot: Slot, crop: Crop, rng: random.Random):
        """The slot's pixels (3, H, W), uint8."""
        around, crop = self.stores[slot.is_class].window(slot.index, slot.bucket, crop)
        image = crop_and_augment(around, self.buckets[slot.bucket], crop, rng, self.args)
        return torch.from_numpy(np.array(image)).permute(
            2, 0, 1
        )  # a fourth of float32's bytes on their way to the device

    def mask(self, slot: Slot, crop: Crop, rng: random.Random):
        """The weights of the slot's latents in the loss, (1, h, w), with mean 1.

        rng: as it was for the picture.
        """
        target = self.buckets[slot.bucket]
        _, height, width = latent_shape(target, self.vae_config)
        if slot.is_class:
            return torch.ones(1, height, width)
        around, crop = self.masks.window(slot.index, slot.bucket, crop)
        small = crop_and_augment(around, target, crop, rng, self.args).resize(
            (width, height), Image.Resampling.BOX
        )
        shares = torch.from_numpy(np.array(small))[None].float() / 255
        low = self.examples[slot.index].own.unmasked_weight
        weights = (low + (1 - low) * shares).clamp_(min=1e-3)  # a crop beside the mask: all of it counts
        return weights / weights.mean()

    def __getitem__(self, slot: Slot) -> dict:
        example, target = self.stores[slot.is_class].examples[slot.index], self.buckets[slot.bucket]
        place = (self.args.seed, slot.epoch, slot.is_class, example.name, slot.repeat)
        rng = random.Random(stable_seed("image", *place))
        crop = self.crop_of(slot, rng)
        left = cover_size(example.size, target)[0] - target[0] - crop.left if crop.flip else crop.left
        item = {
            "weight": torch.tensor(slot.weight),
            "original_size": torch.tensor((example.size[1], example.size[0])),
            "crop_top_left": torch.tensor((crop.top, left)),  # in the picture as it is seen, mirrored or not
            "target_size": torch.tensor((target[1], target[0])),
        }
        key = (slot.is_class, slot.index, slot.bucket, crop.flip)
        if self.masks:
            twin = random.Random()
            twin.setstate(rng.getstate())  # so that a mask is turned as its picture is
            item["mask"] = self.kept_masks[key] if key in self.kept_masks else self.mask(slot, crop, twin)
        if key in self.moments:
            item["moments"] = self.moments[key]
        else:
            item["pixels"] = self.view(slot, crop, rng)
        text_rng, own = random.Random(stable_seed("caption", *place)), example.own or self.args
        captions = example.captions
        item["caption"] = (
            text_rng.choice(captions) if slot.is_class else self.draw_caption(captions, text_rng, own)
        )
        generator = torch.Generator().manual_seed(stable_seed("noise", *place))
        shape = latent_shape(target, self.vae_config)
        item["posterior_noise"] = torch.randn(shape, generator=generator)
        return item | self.draw_noise(generator, shape, self.scheduler, self.args)


def collate(items: list[dict]) -> dict:
    """Items of one bucket -> batch: tensors stacked along a first dimension, captions as a list."""
    batch = {key: torch.stack([i[key] for i in items]) for key in items[0] if key != "caption"}
    return batch | {"captions": [i["caption"] for i in items]}
