"""Text embeddings by prompt, computed once where they can't change."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch

from lora_training.cache import DiskCache
from lora_training.console import print_status
from lora_training.memory.block_swap import swap_blocks
from lora_training.tensors import move_to_device, pin_memory

if TYPE_CHECKING:
    from lora_training.base_model.components import Components

UNSKIPPED = "\0"  # before a negative prompt, for which pipelines skip no layers
KEY_SETTINGS = ("clip_skip", "max_sequence_length", "max_token_length")  # in the keys of the disk cache


class Prompts:
    """Text embeddings by prompt.

    What an encoder that isn't trained gives is computed once, alone, and kept in memory and on disk, also
    while another encoder is trained: pivotal tuning of CLIP doesn't run, or hold, T5. Encoders are loaded
    when a prompt has to be encoded, and freed by `release()`.
    """

    def __init__(
        self, args: argparse.Namespace, components: Components, encode_prompts, join_embeds, negative_embeds
    ) -> None:
        """encode_prompts, join_embeds, negative_embeds: the recipe's functions of these names."""
        self.args, self.components, self.family = args, components, args.family
        self.encode_prompts = encode_prompts
        self.join_embeds = join_embeds
        self.negative_embeds = negative_embeds
        self.known: dict[tuple[str, str], dict] = {}  # {(encoder key, prompt): tensors}
        self.disk = DiskCache(args.cache_folder, "text")
        parts = self.family.text_encoders.items()
        self.tokenizers = {
            key: components.get(tokenizer) for key, (tokenizer, _) in parts if components.has(tokenizer)
        }
        skips_layers = "clip_skip" in self.family.text_settings and args.clip_skip
        self.negative_mark = UNSKIPPED if skips_layers else ""
        # sets of encoder keys: whose embeddings change from step to step; which are no longer the base's, and
        # not for
        # the disk; whose weights come to the device anew for each group of prompts
        self.trained: set[str] = set()
        self.altered: set[str] = set()
        self.streamed: set[str] = set()
        on_disk = self.tokenizers if self.disk.folder else ()
        self.identity = {key: [*map(components.identity, self.family.text_encoders[key])] for key in on_disk}

    def text_encoder(self, key: str):
        """One encoder, loaded; its blocks are swapped where the GPU's free memory doesn't hold it.

        An encoder that is trained is never swapped.
        """
        name = self.family.text_encoders[key][1]
        if name not in self.components.loaded:
            if key in self.altered:
                raise RuntimeError(
                    f"{key} was freed with what it had learned, and is asked for another prompt"
                )
            encoder = self.components.get(name, device="cpu")
            if self.components.device.type == "cuda" and key not in self.trained:
                self.stream_if_large(key, encoder)
            encoder.to(self.components.device)
        return self.components.loaded[name]

    def stream_if_large(self, key: str, encoder) -> None:
        """Swaps the blocks of an encoder that doesn't fit into the GPU's free memory."""
        size = sum(p.numel() * p.element_size() for p in encoder.parameters())
        if torch.cuda.mem_get_info()[0] < 1.1 * size:
            gib = size / 2**30
            print_status(f"note: {key} ({gib:.1f} GiB) doesn't fit on the GPU: its blocks come in one by one")
            swap_blocks(encoder, None, self.components.device)
            self.streamed.add(key)

    def cache_key(self, key: str, prompt: str) -> tuple:
        """What an embedding depends on."""
        settings = {name: vars(self.args)[name] for name in self.family.text_settings}
        values = [settings.get(name) for name in KEY_SETTINGS]
        values += ["prompt_weighting"] if settings.get("prompt_weighting") else []
        return (self.family.name, key, prompt, *self.identity[key], self.components.dtype, *values)

    def compute(self, key: str, prompts: list[str]) -> dict:
        """One encoder's tensors (B, ...) for prompts, computed now; differentiable in whatever is trained."""
        args, unskipped = self.args, [prompt.startswith(UNSKIPPED) for prompt in prompts]
        if any(unskipped) and not all(unskipped):  # rare: a dropped caption, --clip_skip, a trained encoder
            rows = [self.compute(key, [prompt]) for prompt in prompts]
            return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        if unskipped[0]:
            prompts = [prompt.removeprefix(UNSKIPPED) for prompt in prompts]
            args = argparse.Namespace(**vars(args) | {"clip_skip": None})
        return self.encode_prompts(key, prompts, self.tokenizers[key], self.text_encoder(key), args)

    def encode(self, key: str, prompts: list[str]) -> list[dict]:
        """One encoder's tensors for each prompt: from memory, from disk, or computed; no gradient."""
        on_disk = self.disk.folder is not None and key not in self.altered
        unknown = dict.fromkeys(prompt for prompt in prompts if (key, prompt) not in self.known)
        encoded = {p: self.disk.load(*self.cache_key(key, p)) if on_disk else None for p in unknown}
        missing = [prompt for prompt, tensors in encoded.items() if tensors is None]
        for group in self.encoding_groups(key, missing):
            with torch.no_grad():
                rows = {name: value.split(1) for name, value in self.compute(key, group).items()}
            for number, prompt in enumerate(group):
                encoded[prompt] = {name: values[number] for name, values in rows.items()}
                if on_disk:
                    self.disk.store(encoded[prompt], *self.cache_key(key, prompt))
        if self.args.captions_vary:  # hardly a caption would come twice
            return [encoded.get(prompt) or self.known[key, prompt] for prompt in prompts]
        self.remember(key, encoded)
        return [self.known[key, prompt] for prompt in prompts]

    def encoding_groups(self, key: str, prompts: list[str]) -> list[list[str]]:
        """Prompts in groups that are encoded together: each alone, so that it depends on no other.

        With a streamed encoder all come together, but for negative prompts that skip no layers.
        """
        if prompts:
            self.text_encoder(key)  # whether it is streamed shows now
        if key not in self.streamed:
            return [[prompt] for prompt in prompts]
        groups = [[p for p in prompts if p.startswith(UNSKIPPED) == marked] for marked in (False, True)]
        return [group for group in groups if group]

    def remember(self, key: str, encoded: dict[str, dict]) -> None:
        """Keeps one encoder's tensors for prompts on the CPU, for FLUX.1 has 4 MiB for each."""
        for prompt, tensors in encoded.items():
            self.known[key, prompt] = {name: pin_memory(value.cpu()) for name, value in tensors.items()}

    def lookup(self, prompts: list[str], live: set[str] | tuple = ()) -> dict:
        """Prompts -> embeddings (B, ...), each computed once.

        live: keys of the encoders that are run now, and through which a gradient flows.
        """
        encoded = {}
        for key in self.tokenizers:
            if key in live:
                encoded[key] = self.compute(key, prompts)
            else:
                rows = [move_to_device(row, self.components.device) for row in self.encode(key, prompts)]
                encoded[key] = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        return self.join_embeds(encoded, self.args, self.components.config(self.family.denoiser))

    def lookup_captions(self, captions: list[str], live: set[str] | tuple = ()) -> dict:
        """As `lookup`, for captions that are trained: an empty one, as --caption_dropout leaves it, is what
        the unconditional half of guidance is in the pipeline.
        """
        embeds = self.lookup([caption or self.negative_mark for caption in captions], live)
        if all(captions):
            return embeds
        unconditional = self.negative_embeds(embeds, self.components)
        for name, value in embeds.items():
            empty = unconditional.get(f"negative_{name}", value)
            if empty is not value:  # zeros; what is trained stays in the graph, without a gradient
                pairs = zip(captions, value, empty, strict=True)
                embeds[name] = torch.stack([row if c else zeros + 0 * row for c, row, zeros in pairs])
        return embeds

    def for_pipeline(self, prompt: str, negative: str = "") -> dict:
        """A pipeline's embeddings for a prompt, and for the one that guidance leads away from."""
        without = self.lookup([self.negative_mark + negative])
        embeds = self.negative_embeds(without, self.components)
        if negative:  # which no base replaces by zeros
            embeds = {name: without[name.removeprefix("negative_")] for name in embeds}
        return self.lookup([prompt]) | embeds

    def forget(self) -> None:
        """Drops the embeddings that a training step has changed."""
        self.known = {key: value for key, value in self.known.items() if key[0] not in self.trained}

    def release(self, *keys: str) -> None:
        """Frees encoders: these, or all of them."""
        keys = keys or tuple(self.tokenizers)
        self.streamed -= set(keys)
        self.components.free(*(self.family.text_encoders[key][1] for key in keys))
