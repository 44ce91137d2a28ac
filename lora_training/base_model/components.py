"""The parts of a base, each loaded when it is first needed and freed afterwards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_training.base_model.quantized import load_quantized
from lora_training.base_model.reading import fingerprint, import_class, read_json, reading_base
from lora_training.base_model.sources import download_vae
from lora_training.console import QUIET, progress
from lora_training.errors import UserError
from lora_training.memory.block_swap import swap_blocks

if TYPE_CHECKING:
    import argparse

IDENTITY_SUFFIXES = (".safetensors", ".json", ".txt", ".model")  # of files that a part's results depend on


class Components:
    """The parts of a base, each loaded when it is first asked for and freed when nothing needs it any more.

    sharded: the frozen denoiser is split over the processes (FSDP2), each part whole on every GPU only while
    it works.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, dtype, device, sharded: bool = False) -> None:
        self.folder, self.args, self.family = folder, args, args.family
        self.dtype, self.device, self.sharded = dtype, device, sharded
        self.index = read_json(folder / "model_index.json")
        for flag, names in self.family.dropped_parts.items():
            if vars(args)[flag]:
                self.index |= dict.fromkeys(names)
        self.loaded: dict[str, object] = {}
        self.configs: dict[str, dict] = {}
        vae = args.pretrained_vae_model_name_or_path
        self.has_own_vae = not vae
        self.vae_folder = self.resolve_vae(vae) if vae else folder / "vae"
        if vae and not self.has("vae"):
            self.index["vae"] = ["diffusers", "AutoencoderKL"]

    def resolve_vae(self, name: str) -> Path:
        """The folder of --pretrained_vae_model_name_or_path."""
        flag = "--pretrained_vae_model_name_or_path"
        for path in (Path(name), Path(name) / "vae"):
            if (path / "config.json").is_file():
                return path
        if Path(name).exists() or name.startswith((".", "/", "~")):
            raise UserError(f"{flag} {name}: no config.json of a VAE there")
        return download_vae(name, flag, self.args.cache_dir)

    def has(self, name: str) -> bool:
        """Whether the base has the part at all: SD3 comes without its T5, too."""
        return self.index.get(name) not in (None, [None, None])

    def folder_of(self, name: str) -> Path:
        """Where a part's files are."""
        return self.vae_folder if name == "vae" else self.folder / name

    def config(self, name: str) -> dict:
        """A part's configuration, without loading its weights."""
        if name not in self.configs:
            file = "scheduler_config.json" if name == "scheduler" else "config.json"
            self.configs[name] = read_json(self.folder_of(name) / file)
        return self.configs[name]

    def identity(self, name: str) -> str:
        """A hash of a part's weights and configuration, for cache keys."""
        with reading_base(name):
            files = self.folder_of(name).iterdir()
            return fingerprint(sorted(file for file in files if file.suffix in IDENTITY_SUFFIXES))

    def get(self, name: str, dtype=None, device=None):
        """The part `name`, loaded in `dtype` (default: the base's) onto the device (default: the run's)."""
        if name not in self.loaded:
            with reading_base(name):
                if "tokenizer" in name:
                    self.loaded[name] = self.load_tokenizer(name)
                elif name == "scheduler":
                    self.loaded[name] = self.load_scheduler()
                else:
                    self.loaded[name] = self.load_model(name, dtype or self.dtype, device or self.device)
        return self.loaded[name]

    def load_tokenizer(self, name: str):
        """A tokenizer. Errors: ValueError for a CLIP's that doesn't say how much it reads."""
        tokenizer = import_class(*self.index[name]).from_pretrained(self.folder_of(name))
        if "CLIP" in type(tokenizer).__name__ and tokenizer.model_max_length > 1000:
            raise ValueError("its configuration has no model_max_length")
        return tokenizer

    def load_scheduler(self):
        """The base's scheduler as --prediction_type and --rescale_betas_zero_snr want it."""
        scheduler = import_class(*self.index["scheduler"]).from_pretrained(self.folder_of("scheduler"))
        settings = {name: vars(self.args)[name] for name in self.family.scheduler_settings}
        changes = {name: value for name, value in settings.items() if value}
        if not changes:
            return scheduler
        scheduler_class = type(scheduler)
        if "rescale_betas_zero_snr" in changes:
            changes["timestep_spacing"] = "trailing"  # so that pictures begin where the signal is zero
            if "rescale_betas_zero_snr" not in scheduler.config:
                scheduler_class = import_class("diffusers", "DDIMScheduler")
        return scheduler_class.from_config(scheduler.config, **changes)

    def load_model(self, name: str, dtype, device):
        """A model, frozen, in evaluation mode. Errors: UserError for weights that are missing."""
        folder, variant = self.folder_of(name), self.args.variant
        if variant and not any(variant in file.name for file in folder.iterdir()):
            variant = None  # a part that comes in one precision only
        options = {"variant": variant, "dtype": dtype, "output_loading_info": True}
        with progress(f"loading {name}"):
            model, report = import_class(*self.index[name]).from_pretrained(folder, **options)
        if missing := sorted(report["missing_keys"]):  # the libraries would draw them at random
            raise UserError(f"{len(missing)} of its weights are missing, such as {missing[0]}")
        return model.requires_grad_(False).eval().to(device)

    def training_scheduler(self):
        """The scheduler whose noise is trained on."""
        scheduler_class = import_class("diffusers", self.family.training_scheduler)
        return scheduler_class.from_config(self.get("scheduler").config)

    def free(self, *names: str) -> None:
        """Drops parts and gives their memory back."""
        from diffusers.training_utils import free_memory

        for name in names:
            self.loaded.pop(name, None)
        free_memory()

    def vae(self):
        """The VAE, in float32 where the base's own overflows in half precision."""
        needs_float32 = self.family.vae_float32 and self.has_own_vae
        vae = self.get("vae", torch.float32 if needs_float32 else None)
        vae.enable_slicing()
        return vae

    def pipeline(self, denoiser):
        """A pipeline for prompt embeddings that are already there: no text encoder in it."""
        family = self.family
        absent = dict.fromkeys(name for pair in family.text_encoders.values() for name in pair)
        parts = {family.denoiser: denoiser, "vae": self.vae(), "scheduler": self.get("scheduler")}
        pipeline_class = import_class("diffusers", family.pipeline_class)
        pipeline = pipeline_class(**parts, **absent, **family.pipeline_options)
        bar = {"desc": "steps", "delay": 2, "leave": False}  # of pictures that take long
        pipeline.set_progress_bar_config(disable=QUIET or not sys.stderr.isatty(), **bar)
        return pipeline

    def denoiser(self):
        """The frozen denoiser, quantised and with blocks swapped as the flags say."""
        args, name = self.args, self.family.denoiser
        is_loaded = name in self.loaded
        device = torch.device("cpu") if self.sharded or args.blocks_to_swap else self.device
        if args.quantize_base and not is_loaded:
            with reading_base(name):
                model_class, folder = import_class(*self.index[name]), self.folder / name
                settings = (args.quantize_base, self.dtype, self.device, args.variant, device)
                self.loaded[name] = load_quantized(model_class, folder, *settings)
        denoiser = self.get(name, device=device)
        if args.blocks_to_swap and not is_loaded:
            swap_blocks(denoiser, args.blocks_to_swap, self.device)
        if args.enable_xformers_memory_efficient_attention:
            denoiser.enable_xformers_memory_efficient_attention()
        return denoiser
