"""The parts of a base, each loaded when it is first needed and freed afterwards."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from lora_training.base_model.quantized import load_quantized
from lora_training.base_model.reading import fingerprint, import_class, read_json, reading_base
from lora_training.base_model.sources import download
from lora_training.console import QUIET, progress
from lora_training.errors import UserError
from lora_training.memory.block_swap import swap_blocks

if TYPE_CHECKING:
    import argparse


class Components:
    """The parts of a base, each loaded when it is first asked for and freed when nothing needs it any more.

    sharded: the frozen denoiser is split over the processes (FSDP2), each part whole on every GPU only while
    it works.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, dtype, device, sharded: bool = False) -> None:
        self.folder, self.args, self.dtype, self.device, self.sharded = folder, args, dtype, device, sharded
        self.family = args.family
        self.index = read_json(folder / "model_index.json")
        self.index |= dict.fromkeys(
            n for flag, names in args.family.dropped_parts.items() if vars(args)[flag] for n in names
        )
        self.loaded: dict[str, object] = {}
        self.configs: dict[str, dict] = {}
        self.own_vae = not args.pretrained_vae_model_name_or_path
        self.vae_folder = (
            folder / "vae" if self.own_vae else self.resolve_vae(args.pretrained_vae_model_name_or_path)
        )
        if not self.own_vae and not self.has("vae"):
            self.index["vae"] = ["diffusers", "AutoencoderKL"]

    def resolve_vae(self, name: str) -> Path:
        """The folder of --pretrained_vae_model_name_or_path."""
        for path in (Path(name), Path(name) / "vae"):
            if (path / "config.json").is_file():
                return path
        if Path(name).exists() or name.startswith((".", "/", "~")):
            raise UserError(f"--pretrained_vae_model_name_or_path {name}: no config.json of a VAE there")
        return download(
            name, "--pretrained_vae_model_name_or_path", ["config.json", "*.safetensors"], self.args
        )

    def has(self, name: str) -> bool:
        """Whether the base has the part at all: SD3 comes without its T5, too."""
        return self.index.get(name) not in (None, [None, None])

    def folder_of(self, name: str) -> Path:
        """Where a part's files are."""
        return self.vae_folder if name == "vae" else self.folder / name

    def config(self, name: str) -> dict:
        """A part's configuration, without loading its weights."""
        if name not in self.configs:
            file = self.folder_of(name) / ("scheduler_config.json" if name == "scheduler" else "config.json")
            self.configs[name] = read_json(file)
        return self.configs[name]

    def identity(self, name: str) -> str:
        """A hash of a part's weights and configuration, for cache keys."""
        suffixes = (".safetensors", ".json", ".txt", ".model")
        with reading_base(name):
            return fingerprint(sorted(f for f in self.folder_of(name).iterdir() if f.suffix in suffixes))

    def get(self, name: str, dtype=None, device=None):
        """The part `name`, loaded in `dtype` (default: the base's) onto the device (default: the run's)."""
        if name in self.loaded:
            return self.loaded[name]
        folder, variant = self.folder_of(name), self.args.variant
        with reading_base(name):
            kind = import_class(*self.index[name])
            if "tokenizer" in name:
                part = kind.from_pretrained(folder)
                if "CLIP" in kind.__name__ and part.model_max_length > 1000:
                    raise ValueError("its configuration has no model_max_length")
            elif name == "scheduler":
                part = self.adjusted(kind.from_pretrained(folder))
            else:
                if variant and not any(variant in f.name for f in folder.iterdir()):
                    variant = None  # a part that comes in one precision only
                with progress(f"loading {name}"):
                    part = kind.from_pretrained(folder, variant=variant, dtype=dtype or self.dtype)
                files = [safe_open(file, framework="pt") for file in folder.glob("*.safetensors")]
                stored = sum(math.prod(f.get_slice(key).get_shape()) for f in files for key in f.keys())  # noqa: SIM118
                missing = sum(p.numel() for p in part.parameters()) - stored
                if files and missing > 0:  # the libraries would draw them at random
                    raise UserError(f"{missing:,} of its weights are missing")
            if "tokenizer" not in name and name != "scheduler":
                part = part.requires_grad_(False).eval().to(device or self.device)
        self.loaded[name] = part
        return part

    def adjusted(self, scheduler):
        """The base's scheduler as --prediction_type and --rescale_betas_zero_snr want it."""
        changes = {k: v for k in self.family.scheduler_settings if (v := vars(self.args)[k])}
        kind = type(scheduler)
        if "rescale_betas_zero_snr" in changes:
            changes["timestep_spacing"] = "trailing"  # so that pictures begin where the signal is zero
            kind = (
                kind
                if "rescale_betas_zero_snr" in scheduler.config
                else import_class("diffusers", "DDIMScheduler")
            )
        return kind.from_config(scheduler.config, **changes) if changes else scheduler

    def training_scheduler(self):
        """The scheduler whose noise is trained on."""
        return import_class("diffusers", self.family.training_scheduler).from_config(
            self.get("scheduler").config
        )

    def free(self, *names: str) -> None:
        """Drops parts and gives their memory back."""
        from diffusers.training_utils import free_memory

        for name in names:
            self.loaded.pop(name, None)
        free_memory()

    def vae(self):
        """The VAE, in float32 where the base's own overflows in half precision."""
        vae = self.get("vae", torch.float32 if self.family.vae_float32 and self.own_vae else None)
        vae.enable_slicing()
        return vae

    def pipeline(self, denoiser):
        """A pipeline for prompt embeddings that are already there: no text encoder in it."""
        texts = dict.fromkeys(name for pair in self.family.text_encoders.values() for name in pair)
        parts = {self.family.denoiser: denoiser, "vae": self.vae(), "scheduler": self.get("scheduler")}
        pipeline = import_class("diffusers", self.family.pipeline_class)(
            **parts, **texts, **self.family.pipeline_options
        )
        steps = {"desc": "steps", "delay": 2, "leave": False}  # of pictures that take long
        pipeline.set_progress_bar_config(disable=QUIET or not sys.stderr.isatty(), **steps)
        return pipeline

    def denoiser(self):
        """The frozen denoiser, quantised and with blocks swapped as the flags say."""
        args, name = self.args, self.family.denoiser
        fresh = name not in self.loaded
        home = torch.device("cpu") if self.sharded or args.blocks_to_swap else self.device
        if args.quantize_base and fresh:
            place = (
                self.folder / name,
                args.quantize_base,
                self.dtype,
                self.device,
                args.variant,
                home,
            )
            with reading_base(name):
                self.loaded[name] = load_quantized(import_class(*self.index[name]), *place)
        denoiser = self.get(name, device=home)
        if args.blocks_to_swap and fresh:
            swap_blocks(denoiser, args.blocks_to_swap, self.device)
        if args.enable_xformers_memory_efficient_attention:
            denoiser.enable_xformers_memory_efficient_attention()
        return denoiser
