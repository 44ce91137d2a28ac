#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0", "peft==0.21.2",
#   "accelerate==1.15.0", "bitsandbytes==0.50.2", "safetensors==0.8.0", "pillow==13.0.0",
#   "pydantic==2.14.3", "pyyaml==6.0.3",
# ]
# ///
"""Draws images with a trained LoRA, as a YAML file says.

    python infer_lora.py                                       # config/lora_infer.yaml
    python infer_lora.py --config my.yaml --prompt "sks, a cat" --adapter_scale 0.8 --resolution.width 768

Every key of the YAML can be given on the command line, nested ones with a dot; values are read as YAML, so
`--prompt '["a", "b"]'` is a list. The keys are explained in config/lora_infer.yaml. Token embeddings (`*_emb.safetensors`)
that lie beside the LoRA are loaded by themselves. Each run writes its images, with the settings in the PNG text, and the
configuration used into a folder of its own in `paths.infer_path`.

This file runs alone (`uv run infer_lora.py …` on a copy of it brings its packages). It needs the rest of the project only to
read a base that is a single checkpoint file, and other tools' LoRA files for SD3 and FLUX.1; it says so where that is missing.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake that a person can mend; ends the program with its message as one line and exit code 2."""


def build_schema():
    """The pydantic model of the YAML file. Built in a function: pydantic takes as long to import as this file's help."""
    from pydantic import BaseModel, ConfigDict, Field, PositiveInt

    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=False)

    class Adapter(Strict):
        path: str
        weight: float = 1.0

    class Paths(Strict):
        base_model_path: str
        lora_weights_path: str | list[str | Adapter] | None = None
        pretrained_vae_model_name_or_path: str | None = None
        infer_path: str = "output/infer"

    class Resolution(Strict):
        width: PositiveInt | None = None
        height: PositiveInt | None = None

    class Settings(Strict):
        paths: Paths
        prompt: str | list[str]
        negative_prompt: str | list[str] | None = None
        adapter_scale: float | list[float] = 1.0
        resolution: Resolution = Field(default_factory=Resolution)
        num_generations: PositiveInt = 1
        num_images_per_prompt: PositiveInt = 1
        batch_size: PositiveInt = 4
        guidance_scale: float | None = None
        true_cfg_scale: float | None = None
        num_inference_steps: PositiveInt | None = None
        max_sequence_length: PositiveInt | None = None
        seed: int | None = None
        scheduler: str | None = None
        compare_base: bool = False
        grid: bool = True
        fuse: bool = False
        dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
        device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
        offload: Literal["none", "model", "sequential"] = "none"
        quantize: Literal["none", "nf4", "int8"] = "none"
        compile: bool = False

    return Settings


def known_keys(schema, prefix: str = "") -> dict[str, object]:
    """{dotted key: field} of every key in the YAML."""
    out = {}
    for name, field in schema.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and hasattr(inner, "model_fields"):
            out |= known_keys(inner, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = field
    return out


def read_settings(argv: list[str] | None):
    """The YAML file with the command line on top, checked. Errors: UserError that names the key."""
    parser = argparse.ArgumentParser(
        description="Draws images with a trained LoRA, as a YAML file says.",
        epilog='Every key of the YAML is a flag too: --seed 3, --paths.infer_path out, --prompt \'["a", "b"]\'.',
    )
    parser.add_argument(
        "--config", default=str(ROOT / "config" / "lora_infer.yaml"), help="YAML file (config/lora_infer.yaml)"
    )
    known, rest = parser.parse_known_args(argv)
    import yaml
    from pydantic import ValidationError

    try:
        values = yaml.safe_load(Path(known.config).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {known.config}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {known.config}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {known.config}: expected keys and values")
    schema = build_schema()
    keys = known_keys(schema)
    apply_overrides(values, rest, keys)
    try:
        settings = schema.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(p) for p in problem["loc"] if not str(p).startswith(("list[", "str", "Adapter", "float")))
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)[0]
            raise UserError(f"{known.config}: unknown key {key}; the nearest is {near}") from None
        raise UserError(f"{known.config}: {key}: {problem['msg'].lower()}, found {problem['input']!r}") from None
    check_settings(settings, known.config)
    return settings


def apply_overrides(values: dict, words: list[str], keys: dict) -> None:
    """Puts `--a.b value` and `--a.b=value` from the command line into the nested values."""
    import yaml

    place = 0
    while place < len(words):
        word = words[place]
        if not word.startswith("--"):
            raise UserError(f"unexpected word {word!r}; flags are --KEY VALUE")
        key, equals, text = word[2:].partition("=")
        if not equals:
            place += 1
            if place >= len(words):
                raise UserError(f"--{key} needs a value")
            text = words[place]
        place += 1
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown flag --{key}; the nearest is --{near}")
        *parents, leaf = key.split(".")
        inside = values
        for parent in parents:
            inside = inside.setdefault(parent, {})
        inside[leaf] = text if key.endswith("prompt") and not text.startswith("[") else yaml.safe_load(text)


def check_settings(settings, source: str) -> None:
    """Files and combinations, before a model is loaded."""
    paths = settings.paths
    for key in ("base_model_path", "pretrained_vae_model_name_or_path"):
        value = getattr(paths, key)
        if value and value.startswith((".", "/", "~", "assets", "output")) and not Path(value).exists():
            raise UserError(f"{source}: paths.{key}: no such file or folder: {value}")
    for path, _ in adapters_of(settings):
        adapter_files(path)
    prompts = prompts_of(settings)
    negative = settings.negative_prompt
    if isinstance(negative, list) and len(negative) != len(prompts):
        raise UserError(
            f"{source}: negative_prompt: {len(negative)} of them for {len(prompts)} prompts; give one, or as many"
        )
    index = Path(paths.base_model_path) / "model_index.json"
    if index.is_file():
        flux = json.loads(index.read_text(encoding="utf-8")).get("_class_name") == "FluxPipeline"
        if settings.true_cfg_scale is not None and not flux:
            raise UserError(f"{source}: true_cfg_scale is for FLUX.1 alone; other families have guidance_scale")
        if settings.negative_prompt and flux and (settings.true_cfg_scale or 0) <= 1:
            raise UserError(f"{source}: negative_prompt has no effect on FLUX.1 without true_cfg_scale above 1")
    if not adapters_of(settings) and (settings.compare_base or settings.fuse):
        raise UserError(f"{source}: compare_base and fuse need paths.lora_weights_path")
    if settings.fuse and (settings.compare_base or isinstance(settings.adapter_scale, list)):
        raise UserError(f"{source}: fuse bakes one scale into the base: no compare_base and no list in adapter_scale")
    if settings.quantize != "none" and settings.fuse:
        raise UserError(f"{source}: fuse can't be combined with quantize")


def adapters_of(settings) -> list[tuple[str, float]]:
    """(path, weight) of each LoRA."""
    value = settings.paths.lora_weights_path
    entries = value if isinstance(value, list) else [value] if value else []
    return [(e, 1.0) if isinstance(e, str) else (e.path, e.weight) for e in entries]


def prompts_of(settings) -> list[str]:
    """The prompts as a list."""
    return settings.prompt if isinstance(settings.prompt, list) else [settings.prompt]


def adapter_files(path: str) -> tuple[Path | None, Path | None]:
    """(LoRA file, embeddings file) of a path to a training's folder or to one file. Errors: UserError if neither is there."""
    place = Path(path)
    if place.is_dir():
        lora = place / "pytorch_lora_weights.safetensors"
        embeddings = sorted(place.glob("*_emb.safetensors"))
        if not lora.is_file() and not embeddings:
            raise UserError(
                f"paths.lora_weights_path: no pytorch_lora_weights.safetensors or *_emb.safetensors in {path}"
            )
        return lora if lora.is_file() else None, embeddings[0] if embeddings else None
    if not place.is_file():
        raise UserError(
            f"paths.lora_weights_path: no such file or folder: {path}; train one first: bash run_lora_train.sh"
        )
    if place.suffix != ".safetensors":
        raise UserError(
            f"paths.lora_weights_path: {path}: only .safetensors files are read; others can run code when they are opened"
        )
    if place.name.endswith("_emb.safetensors"):
        return None, place
    beside = sorted(place.parent.glob("*_emb.safetensors"))
    return place, beside[0] if beside else None


def load_pipeline(settings):
    """The base with its LoRAs and embeddings. Returns (pipeline, {adapter name: weight})."""
    import logging

    import torch

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = (
        getattr(torch, settings.dtype)
        if settings.dtype != "auto"
        else {"cuda": torch.bfloat16}.get(device, torch.float32)
    )
    options = {}
    if settings.paths.pretrained_vae_model_name_or_path:
        options["vae"] = load_vae(settings.paths.pretrained_vae_model_name_or_path, dtype)
    if settings.quantize != "none":
        options["quantization_config"] = quantization(settings.quantize, dtype)
    base = settings.paths.base_model_path
    try:
        folder = str(unpacked(base)) if Path(base).is_file() else base
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"paths.base_model_path: {base}: {' '.join(str(error).split())[:300]}") from None
    if settings.scheduler:
        pipeline.scheduler = pick_scheduler(pipeline, settings.scheduler)
    weights = add_adapters(pipeline, settings)
    if settings.compile:
        denoiser_of(pipeline).compile_repeated_blocks()
    if settings.offload == "model":
        pipeline.enable_model_cpu_offload()
    elif settings.offload == "sequential":
        pipeline.enable_sequential_cpu_offload()
    else:
        pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, weights


def load_vae(name: str, dtype):
    """Another VAE, from a folder of its own or a pipeline's folder."""
    from diffusers import AutoencoderKL

    inside = {"subfolder": "vae"} if (Path(name) / "vae" / "config.json").is_file() else {}
    return AutoencoderKL.from_pretrained(name, dtype=dtype, **inside)


def quantization(kind: str, dtype):
    """diffusers' configuration for a quantised denoiser."""
    from diffusers import PipelineQuantizationConfig

    if kind == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    else:
        options = {"load_in_8bit": True}
    return PipelineQuantizationConfig(
        quant_backend=f"bitsandbytes_{'4' if kind == 'nf4' else '8'}bit",
        quant_kwargs=options,
        components_to_quantize=["unet", "transformer"],
    )


def add_scripts_to_path(what: str) -> None:
    """Lets the modules of scripts/ be imported. Errors: UserError if this file was copied without them."""
    if not (ROOT / "scripts").is_dir():
        raise UserError(f"{what} needs scripts/ of this project beside infer_lora.py; a diffusers folder needs nothing")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))


def unpacked(base: str) -> Path:
    """The diffusers folder that the training script of its family makes of a .safetensors or .ckpt checkpoint, once."""
    add_scripts_to_path(f"paths.base_model_path: {base}: a single file")
    from scripts.parts.base_family import detect
    from scripts.parts.training_scripts import load_script

    try:
        family = detect(base)
    except Exception as error:  # a checkpoint that holds more than tensors, or is none: torch raises many kinds
        raise UserError(f"paths.base_model_path: {base}: {' '.join(str(error).split())[:200]}") from None
    if family is None:
        raise UserError(f"paths.base_model_path: {base}: not a base of Stable Diffusion 1.x/2.x, SDXL, SD3 or FLUX.1")
    script = load_script(family)
    try:
        return script.unpack_single_file(Path(base), argparse.Namespace(cache_dir=None))
    except script.UserError as error:
        raise UserError(str(error).replace("--pretrained_model_name_or_path", "paths.base_model_path")) from None


def pick_scheduler(pipeline, name: str):
    """A scheduler of diffusers by class name, with the base's settings."""
    import diffusers

    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    full = next((n for n in names if n.lower() in (name.lower(), name.lower() + "scheduler")), None)
    if full is None:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.2)
        raise UserError(f"scheduler: {name} is not in diffusers; near it are {', '.join(near)}")
    return getattr(diffusers, full).from_config(pipeline.scheduler.config)


def denoiser_of(pipeline):
    """The UNet or the transformer."""
    return pipeline.unet if "unet" in pipeline.components else pipeline.transformer


def add_adapters(pipeline, settings) -> dict[str, float]:
    """Loads LoRAs and the embeddings beside them; returns {adapter name: weight}."""
    weights = {}
    for number, (path, weight) in enumerate(adapters_of(settings)):
        lora, embeddings = adapter_files(path)
        if embeddings is not None:
            load_embeddings(pipeline, embeddings)
        if lora is not None:
            name = f"lora{number}"
            try:
                load_lora(pipeline, lora, name, settings.paths.base_model_path)
            except (ValueError, RuntimeError, KeyError) as error:
                text = " ".join(str(error).split())[:200]
                raise UserError(
                    f"paths.lora_weights_path: {lora} does not fit {type(pipeline).__name__}: {text}"
                ) from None
            loaded = {n for names in pipeline.get_list_adapters().values() for n in names}
            if name not in loaded:  # diffusers only warns when no key fits
                raise UserError(
                    f"paths.lora_weights_path: {lora}: none of its keys fits {type(pipeline).__name__};"
                    " scripts/lora/inspect_lora.py says what it is for"
                )
            weights[name] = weight
    return weights


def load_lora(pipeline, file: Path, name: str, base: str) -> None:
    """Loads a LoRA file as an adapter. diffusers reads other tools' files for SD3 not at all, and for FLUX.1 of one width
    alone, so those are converted first.
    """
    from safetensors import safe_open

    family = {"StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux"}.get(type(pipeline).__name__)
    with safe_open(file, "pt") as opened:
        foreign = any(key.startswith(("lora_unet_", "lora_te")) for key in opened.keys())  # noqa: SIM118
    if not foreign or family is None:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        return
    import tempfile

    add_scripts_to_path(f"paths.lora_weights_path: {file}: another tool's file for this family")
    from scripts.lora.parts.lora_files import FileError, read_lora, write_diffusers

    with tempfile.TemporaryDirectory() as folder:
        try:
            lora = read_lora(file, family, base if (Path(base) / "model_index.json").is_file() else None)
            write_diffusers(lora, Path(folder) / file.name)
        except FileError as error:
            raise UserError(f"paths.lora_weights_path: {error}") from None
        pipeline.load_lora_weights(folder, weight_name=file.name, adapter_name=name)


def load_embeddings(pipeline, file: Path) -> None:
    """Adds a training's new tokens to the pipeline's encoders: `<s0>`, `<s1>`, … in order."""
    from safetensors.torch import load_file

    places = {
        "clip_l": ("tokenizer", "text_encoder"),
        "clip_g": ("tokenizer_2", "text_encoder_2"),
        "t5": ("tokenizer_3", "text_encoder_3"),
    }
    if type(pipeline).__name__.startswith("Flux"):
        places["t5"] = ("tokenizer_2", "text_encoder_2")
    for key, table in load_file(file).items():
        tokenizer, encoder = (getattr(pipeline, name) for name in places[key])
        begin = 0
        while f"<s{begin}>" in tokenizer.get_vocab():  # a second file's tokens count on
            begin += 1
        tokens = [f"<s{begin + i}>" for i in range(len(table))]
        tokenizer.add_tokens(tokens)
        if len(tokenizer) > encoder.get_input_embeddings().num_embeddings:
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        rows = encoder.get_input_embeddings().weight.data  # SD3's pipeline has no loader of its own for embeddings
        rows[tokenizer.convert_tokens_to_ids(tokens)] = table.to(rows.device, rows.dtype)
        print(f"{file.name}: {key} knows {''.join(tokens)}")


def size_of(pipeline, settings) -> tuple[int, int]:
    """(width, height): as set, else the base's own. Errors: UserError if the base can't draw that size."""
    own = (
        pipeline.unet.config.sample_size
        if "unet" in pipeline.components
        else getattr(pipeline, "default_sample_size", 128)
    )
    own *= pipeline.vae_scale_factor
    width, height = settings.resolution.width or own, settings.resolution.height or own
    step = pipeline.vae_scale_factor * (1 if "unet" in pipeline.components else 2)
    for key, side in (("width", width), ("height", height)):
        if side % step:
            raise UserError(
                f"resolution.{key}: {side} is not divisible by {step}, as {type(pipeline).__name__} needs; try {side // step * step or step}"
            )
    return width, height


def draw(pipeline, settings, weights: dict[str, float], folder: Path) -> dict[tuple, object]:
    """Draws every prompt at every scale with every seed, saves and returns the images: {(prompt, scale, number): image}."""
    import torch
    from PIL import PngImagePlugin
    from tqdm.auto import tqdm

    prompts = prompts_of(settings)
    scales = settings.adapter_scale if isinstance(settings.adapter_scale, list) else [settings.adapter_scale]
    if settings.compare_base:
        scales = [0.0, *(s for s in scales if s != 0.0)]
    width, height = size_of(pipeline, settings)
    count = settings.num_generations * settings.num_images_per_prompt
    fixed = {"width": width, "height": height}
    for key in ("guidance_scale", "true_cfg_scale", "num_inference_steps", "max_sequence_length"):
        if getattr(settings, key) is not None:
            fixed[key] = getattr(settings, key)
    if settings.fuse:
        pipeline.set_adapters(list(weights), list(weights.values()))
        pipeline.fuse_lora(lora_scale=scales[0])
        pipeline.unload_lora_weights()
    images, bar = {}, tqdm(total=len(prompts) * len(scales) * count, desc="images", disable=not sys.stderr.isatty())
    for scale in scales:
        if weights and not settings.fuse:
            set_scale(pipeline, weights, scale)
        for p, prompt in enumerate(prompts):
            negative = (
                settings.negative_prompt[p] if isinstance(settings.negative_prompt, list) else settings.negative_prompt
            )
            for begin in range(0, count, settings.batch_size):
                numbers = range(begin, min(begin + settings.batch_size, count))
                seeds = [image_seed(settings.seed, k) for k in numbers]
                drawn = pipeline(
                    [prompt] * len(seeds),
                    **({"negative_prompt": [negative] * len(seeds)} if negative else {}),
                    generator=[torch.Generator("cpu").manual_seed(s) for s in seeds],
                    **fixed,
                ).images
                for k, seed, image in zip(numbers, seeds, drawn, strict=True):
                    text = PngImagePlugin.PngInfo()
                    for key, value in {
                        "prompt": prompt,
                        "negative_prompt": negative or "",
                        "seed": seed,
                        "adapter_scale": scale,
                        **fixed,
                    }.items():
                        text.add_text(key, str(value))
                    file = folder / f"{p:03d}_scale{scale:g}_{k:03d}.png"
                    image.save(file, pnginfo=text)
                    images[p, scale, k] = image
                    bar.update()
                    tqdm.write(f"{file}  seed {seed}  scale {scale:g}  {prompt!r}")
    bar.close()
    return images


def set_scale(pipeline, weights: dict[str, float], scale: float) -> None:
    """Scales every LoRA by its own weight times `scale`; at 0 the base draws alone."""
    if scale == 0:
        pipeline.disable_lora()
    else:
        pipeline.enable_lora()
        pipeline.set_adapters(list(weights), [w * scale for w in weights.values()])


def image_seed(seed: int, number: int) -> int:
    """The seed of image `number`: the same for every prompt and scale, so that rows of the grid can be compared."""
    return seed + number


def make_grid(images: dict[tuple, object], prompts: list[str]):
    """A labelled sheet: a row per prompt and scale, a column per seed."""
    from PIL import Image, ImageDraw, ImageFont

    rows = sorted({(p, s) for p, s, _ in images})
    columns = sorted({k for _, _, k in images})
    first = next(iter(images.values()))
    factor = max(1, round(224 / max(first.size))) if max(first.size) < 224 else min(1.0, 384 / max(first.size))
    tile = round(first.width * factor), round(first.height * factor)
    font, small = ImageFont.load_default(20), ImageFont.load_default(16)
    margin, label, head = 10, 110, 34
    heads = len({p for p, _ in rows})
    sheet = Image.new(
        "RGB",
        (max(480, label + len(columns) * (tile[0] + margin)), heads * head + len(rows) * (tile[1] + margin) + margin),
        "white",
    )
    pen, y, last = ImageDraw.Draw(sheet), margin, None
    for p, scale in rows:
        if p != last:
            text = prompts[p]
            while pen.textlength(text, font=font) > sheet.width - 2 * margin:
                text = text.rstrip("…")[:-3].rstrip() + "…"
            pen.text((margin, y), text, fill="black", font=font)
            y, last = y + head, p
        pen.text(
            (margin, y + tile[1] // 2 - 10), f"scale {scale:g}" if scale else "base alone", fill="#444", font=small
        )
        for c, k in enumerate(columns):
            resample = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
            sheet.paste(images[p, scale, k].resize(tile, resample), (label + c * (tile[0] + margin), y))
        y += tile[1] + margin
    return sheet


def run_folder(settings) -> Path:
    """A new folder for this run: date, time and a hash of the settings."""
    digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:6]
    folder = Path(settings.paths.infer_path) / f"{time.strftime('%Y%m%d-%H%M%S')}-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"paths.infer_path: {folder} can't be made: {error.strerror}") from None
    return folder


def main(argv: list[str] | None = None) -> int:
    """Draws as the configuration says; returns the exit code."""
    try:
        settings = read_settings(argv)
        if settings.seed is None:
            settings.seed = time.time_ns() % 2**31
            print(f"seed {settings.seed}")
        pipeline, weights = load_pipeline(settings)
        folder = run_folder(settings)
        import yaml

        (folder / "config.yaml").write_text(
            yaml.safe_dump(json.loads(settings.model_dump_json()), sort_keys=False), encoding="utf-8"
        )
        images = draw(pipeline, settings, weights, folder)
        if settings.grid and len(images) > 1:
            make_grid(images, prompts_of(settings)).save(folder / "grid.png")
            print(f"{folder / 'grid.png'}")
    except UserError as error:
        print(f"infer_lora.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
