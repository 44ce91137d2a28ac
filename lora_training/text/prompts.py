"""Text embeddings by prompt, computed once where they can't change."""

from __future__ import annotations

import argparse
import functools
from typing import TYPE_CHECKING

import torch

from lora_training.cache import DiskCache
from lora_training.console import print_status
from lora_training.data.captions import prepend_trigger
from lora_training.memory.block_swap import swap_blocks
from lora_training.processes import distribute
from lora_training.tensors import move_to_device, pin_memory
from lora_training.text.words import class_caption, insert_tokens

if TYPE_CHECKING:
    from lora_training.base_model.components import Components
    from lora_training.training.run import Run

UNSKIPPED = "\0"  # before a negative prompt, for which pipelines skip no layers


class Prompts:
    """Text embeddings by prompt.

    What an encoder that isn't trained gives is computed once, alone, and kept in memory and on disk, also
    while another encoder is trained: pivotal tuning of CLIP doesn't run, or hold, T5.

    Encoders are loaded when a prompt has to be encoded, and freed by `release()`.
    """

    def __init__(
        self, args: argparse.Namespace, components: Components, encode_prompts, join_embeds, negative_embeds
    ) -> None:
        """encode_prompts, join_embeds, negative_embeds: the recipe's functions of these names."""
        self.args, self.components, self.family = args, components, args.family
        self.encode_prompts, self.join_embeds, self.negative_embeds = (
            encode_prompts,
            join_embeds,
            negative_embeds,
        )
        self.known: dict[tuple[str, str], dict] = {}  # by encoder key and prompt
        self.disk = DiskCache(args.cache_folder, "text")
        names = {
            key: tokenizer
            for key, (tokenizer, _) in args.family.text_encoders.items()
            if components.has(tokenizer)
        }
        self.tokenizers = {key: components.get(name) for key, name in names.items()}
        self.unskipped = UNSKIPPED if "clip_skip" in args.family.text_settings and args.clip_skip else ""
        self.trained: set[str] = set()  # keys of the encoders whose embeddings change from step to step
        self.altered: set[str] = set()  # keys of those that are no longer the base's: not for the disk
        self.streamed: set[str] = (
            set()
        )  # keys of those whose weights come to the device anew for each group of prompts
        on_disk = self.tokenizers if self.disk.folder else ()
        self.identity = {
            key: [components.identity(part) for part in args.family.text_encoders[key]] for key in on_disk
        }

    def text_encoder(self, key: str):
        """One encoder, loaded; where it isn't trained and the GPU's free memory doesn't hold it, its blocks
        are swapped.
        """
        name = self.family.text_encoders[key][1]
        if name not in self.components.loaded:
            if key in self.altered:
                raise RuntimeError(
                    f"{key} was freed with what it had learned, and is asked for another prompt"
                )
            encoder = self.components.get(name, device="cpu")
            if self.components.device.type == "cuda":
                needed = sum(p.numel() * p.element_size() for p in encoder.parameters())
                if key not in self.trained and torch.cuda.mem_get_info()[0] < 1.1 * needed:
                    print_status(
                        f"note: {key} ({needed / 2**30:.1f} GiB) doesn't fit on the GPU: its blocks come in one by one"
                    )
                    swap_blocks(encoder, None, self.components.device)
                    self.streamed.add(key)
            encoder.to(self.components.device)
        return self.components.loaded[name]

    def key(self, key: str, prompt: str) -> tuple:
        """What an embedding depends on."""
        settings = {name: vars(self.args)[name] for name in self.family.text_settings}
        settings = [settings.get(name) for name in ("clip_skip", "max_sequence_length", "max_token_length")]
        return (self.family.name, key, prompt, *self.identity[key], self.components.dtype, *settings)

    def compute(self, key: str, prompts: list[str]) -> dict:
        """What one encoder gives for prompts, computed now; differentiable in whatever is trained."""
        args = self.args
        if prompts[0].startswith(UNSKIPPED):
            prompts, args = [p[1:] for p in prompts], argparse.Namespace(**vars(args) | {"clip_skip": None})
        return self.encode_prompts(key, prompts, self.tokenizers[key], self.text_encoder(key), args)

    def kept(self, key: str, prompts: list[str]) -> list[dict]:
        """What one encoder gives for each prompt: from memory, from disk, or computed; no gradient.

        Each is computed alone, so that it depends on no other; with a streamed encoder, all that are missing
        together.
        """
        on_disk = self.disk.folder is not None and key not in self.altered
        asked = dict.fromkeys(p for p in prompts if (key, p) not in self.known)
        found = {p: self.disk.load(*self.key(key, p)) if on_disk else None for p in asked}
        if missing := [p for p in found if found[p] is None]:
            self.text_encoder(key)  # whether it is streamed shows now
        kinds = [[p for p in missing if p.startswith(UNSKIPPED) == kind] for kind in (False, True)]
        for group in filter(None, kinds) if key in self.streamed else [[p] for p in missing]:
            with torch.no_grad():
                rows = {k: v.split(1) for k, v in self.compute(key, group).items()}
            for number, prompt in enumerate(group):
                found[prompt] = {k: v[number] for k, v in rows.items()}
                if on_disk:
                    self.disk.store(found[prompt], *self.key(key, prompt))
        if self.args.captions_vary:  # hardly a caption would come twice
            return [found.get(prompt) or self.known[key, prompt] for prompt in prompts]
        self.remember(key, found)
        return [self.known[key, prompt] for prompt in prompts]

    def remember(self, key: str, found: dict[str, dict]) -> None:
        """Keeps what one encoder gives for prompts: on the CPU, for FLUX.1 has 4 MiB for each."""
        self.known |= {
            (key, p): {k: pin_memory(v.cpu()) for k, v in rows.items()} for p, rows in found.items()
        }

    def lookup(self, prompts: list[str], live: set[str] | tuple = ()) -> dict:
        """Prompts -> embeddings (B, ...), each computed once; no gradient but through the `live` encoders,
        computed now.
        """
        encoded = {}
        for key in self.tokenizers:
            if key in live:
                encoded[key] = self.compute(key, prompts)
            else:
                rows = [move_to_device(row, self.components.device) for row in self.kept(key, prompts)]
                encoded[key] = {k: torch.cat([row[k] for row in rows]) for k in rows[0]}
        return self.join_embeds(encoded, self.args, self.components.config(self.family.denoiser))

    def for_pipeline(self, prompt: str, negative: str = "") -> dict:
        """The embeddings that a pipeline takes for one prompt, and for the one that guidance leads away from."""
        return self.lookup([prompt]) | self.negative_embeds(
            self.lookup([self.unskipped + negative]), self.components
        )

    def forget(self) -> None:
        """Drops embeddings that a training step has made untrue."""
        self.known = {place: value for place, value in self.known.items() if place[0] not in self.trained}

    def release(self, *keys: str) -> None:
        """Frees encoders: these, or all of them."""
        self.streamed -= set(keys or self.tokenizers)
        self.components.free(*(self.family.text_encoders[key][1] for key in keys or self.tokenizers))


def fill_text_cache(run: Run) -> None:
    """Encodes every prompt that can come up with the encoders that aren't trained, and frees these."""
    args, prompts = run.args, run.prompts
    if args.captions_vary:
        if args.offload:
            print_status(
                "note: the text encoders stay on the GPU: shuffled or dropped tags make new captions all the time"
            )
        return
    captions = [prepend_trigger(c, e.set_args.trigger_word) for e in run.data.examples for c in e.captions]
    captions += (
        [class_caption(c, args.preserve_class, (*args.triggers, *run.abstractions)) for c in captions]
        if args.preserve_class
        else []
    )
    captions += [c for e in run.data.class_examples for c in e.captions]
    captions = [insert_tokens(c, run.abstractions) for c in captions]
    for key in prompts.tokenizers:
        if key not in prompts.trained:
            negatives = [
                prompts.unskipped + own.get("negative_prompt", "") for own in (*args.prompt_settings, {})
            ]
            wanted = list(
                dict.fromkeys([*captions, *run.sample_prompts, *run.control_prompts, *negatives, ""])
            )
            prompts.remember(
                key, distribute(f"captions for {key}", wanted, functools.partial(prompts.kept, key))
            )
            prompts.release(key)
