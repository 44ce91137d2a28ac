#!/usr/bin/env python
"""Draws images with a trained LoRA.

    python infer_lora.py output/mine                                    # as the training's own files say
    python infer_lora.py output/mine --prompt "a TOK cat" "another" --adapter_scale 0.8
    python infer_lora.py output/mine --checkpoints all                  # which step is the good one?
    python infer_lora.py                                                # as config/lora_infer.yaml says
    python infer_lora.py --config my.yaml --seed 3 --resolution.width 768

A training's folder (or a LoRA file) says by itself which base it is for, and the size, steps, guidance and
prompts it was validated with: its config.yaml, else its model card and the LoRA file's metadata. A word that
stands for new tokens (TOK) becomes them. A YAML file and the command line win over that, the command line
over the file.

Every key of the YAML can be given on the command line, nested ones with a dot; null is none. `--help` lists
the keys, config/lora_infer.yaml explains them. Token embeddings (`*_emb.safetensors`) that lie
beside the LoRA are loaded by themselves. Each run writes its images, with the settings in the PNG text, and
the configuration used into a folder of its own in `paths.infer_path`.

Read it from the top: which settings hold, how base and LoRAs are put together, what prompts become, and which
pictures are drawn in which order stands here; how, in lora_training/inference/. It needs the library
lora_training, beside it or installed. Exit codes: 0 done, 1 failed, 2 wrong arguments or input, 128 + the
number of a signal (Ctrl-C: 130).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import lazy_loader as lazy

    from lora_training import require_interface

    require_interface(1)
except ImportError as error:
    way_out = "`pip install` the project's folder, or copy lora_training from it along"
    sys.exit(f"{Path(__file__).name}: error: {error}: {way_out}")

from lora_training.signals import end_at_once_on_signals

if __name__ == "__main__":  # before what takes time to import
    end_at_once_on_signals("finished images are kept")

import time
import warnings
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from lora_training import exits, inference, text
from lora_training.console import print_status
from lora_training.data.captions import TRIGGER_MARK, contains_word
from lora_training.data.emphasis import prompt_chunks
from lora_training.errors import UserError, is_out_of_memory, one_line
from lora_training.files import read_config_file
from lora_training.settings import SettingsParser, file_values, validate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image

    from lora_training.inference import Training

np = lazy.load("numpy")
torch = lazy.load("torch")

ROOT = Path(__file__).resolve().parent
USUAL_CONFIG = ROOT / "config" / "lora_infer.yaml"  # what is drawn where the command line names no LoRA
MEMORY_ADVICE = "a lower batch_size or resolution, offload: model, quantize: nf4"


def main(argv: list[str] | None = None) -> int:
    """Draws as the configuration says; returns the exit code."""
    with exits.exit_code("infer_lora.py") as outcome:
        outcome.crash_log = f"crash-{time.strftime('%Y%m%d-%H%M%S')}.log"
        settings = read_settings(argv)
        outcome.output_dir = Path(settings.paths.infer_path)
        try:
            with warnings.catch_warnings(action="ignore"):  # the libraries' own, which are for programmers
                draw_all(settings)
        except Exception as error:
            if is_out_of_memory(error):
                raise UserError(f"the memory does not suffice; in this order, try {MEMORY_ADVICE}") from None
            raise
    return outcome.code


def draw_all(settings) -> None:
    """Everything after the settings are known, in the order in which it happens."""
    if settings.seed is None:
        settings.seed = time.time_ns() % 2**31
        print_status(f"seed {settings.seed}")
    inference.check_infer_path(settings)
    trainings = inference.read_trainings(settings)
    insert_tokens(settings, trainings)
    base = resolve_base(settings, trainings)
    pipeline = load_pipeline(settings, base)
    weights = {} if settings.checkpoints else add_adapters(pipeline, trainings, base)
    inference.report_cut_prompts(pipeline, settings)
    inference.place_pipeline(pipeline, settings)
    folder = inference.new_run_folder(settings)
    inference.save_settings(settings, folder)
    images = draw(pipeline, settings, trainings, weights, base, folder)
    if settings.grid and len(images) > 1:
        grid = inference.draw_grid(images, inference.list_prompts(settings))
        inference.save_picture(grid, folder / "grid.png")
        print_status(str(folder / "grid.png"))


# ---- settings ----------------------------------------------------------------------------------------------


def read_settings(argv: list[str] | None):
    """The settings, checked: of the training's files, the YAML file and the command line; the last wins."""
    args, flags = command_line().read(argv)
    values, source = {}, args.config
    if args.config or not args.lora:
        source = args.config or str(USUAL_CONFIG)
        values = file_values(read_config_file(source), inference.Settings, source)
    if args.lora:
        source = source or args.lora[0]
        flags["paths.lora_weights_path"] = args.lora[0] if len(args.lora) == 1 else args.lora
        explicit = {key: value for key, value in (values | flags).items() if value is not None}
        values = inference.settings_of_training(args.lora[0], explicit, ROOT) | explicit
    settings = validate(inference.Settings, {"paths": {}} | values | flags, source, flags)
    inference.check_settings(settings)
    return settings


def command_line() -> SettingsParser:
    """The flags, one for each setting, and the LoRAs that come first."""
    parser = SettingsParser(
        inference.Settings,
        prog="infer_lora.py",
        usage="%(prog)s [LORA ...] [--config FILE] [--KEY VALUE ...]",
        description="Draws images with a trained LoRA. LORA, a training's folder or a LoRA file, says by"
        " itself which base, size, steps and prompts it needs; without it, config/lora_infer.yaml says what"
        " is drawn. Every key of the YAML is a flag.",
    )
    parser.add_argument("lora", nargs="*", metavar="LORA", help="a training's folder or a LoRA file")
    parser.add_argument("--infer_config", dest="config", help=argparse.SUPPRESS)
    return parser


# ---- base and LoRAs ----------------------------------------------------------------------------------------


def resolve_base(settings, trainings: list[Training]) -> str:
    """The base as a folder or a hub id. Errors: UserError if LoRAs or settings are for another family."""
    own_vae = settings.paths.pretrained_vae_model_name_or_path is None
    base = inference.find_base_folder(settings.paths.base_model_path, own_vae)
    inference.check_family(settings, trainings, inference.family_of_base(base))
    return base


def load_pipeline(settings, base: str):
    """The base's pipeline, on the CPU, with the VAE, precision and scheduler that the settings name."""
    print_status(f"loading {base}")
    inference.silence_libraries()
    _, dtype = inference.device_and_dtype(settings)
    paths, options = settings.paths, {}
    if paths.pretrained_vae_model_name_or_path:
        options["vae"] = inference.load_vae(paths.pretrained_vae_model_name_or_path, dtype)
    if settings.quantize != "none":
        options["quantization_config"] = inference.quantization_config(settings.quantize, dtype)
    pipeline = inference.load_base(base, paths.base_model_path, dtype, **options)
    inference.change_scheduler(pipeline, settings)
    return pipeline


def add_adapters(pipeline, trainings: list[Training], base: str) -> dict[str, float]:
    """Loads embeddings and LoRAs; returns {adapter name: weight}. Errors: UserError for a file of no use."""
    weights = {}
    for number, training in enumerate(trainings):
        if training.embeddings is not None:
            inference.load_embeddings(pipeline, training.embeddings, training.first_token)
        if training.lora is not None:
            inference.load_adapter(pipeline, training.lora, f"lora{number}", base)
            weights[f"lora{number}"] = training.weight
    return weights


# ---- prompts -----------------------------------------------------------------------------------------------


def insert_tokens(settings, trainings: list[Training]) -> None:
    """Puts new tokens and trigger words into the prompts ("a TOK" -> "a <s0><s1>"; [trigger] is the first
    LoRA's), and says which prompts call no LoRA.
    """
    abstractions = {word: tokens for t in trainings for word, tokens in t.abstractions.items()}
    triggers = [word for training in trainings for word in training.triggers]

    def insert(prompt: str) -> str:
        return text.insert_tokens(prompt.replace(TRIGGER_MARK, (*triggers, TRIGGER_MARK)[0]), abstractions)

    for key in ("prompt", "negative_prompt"):
        value = getattr(settings, key)
        if isinstance(value, list):
            setattr(settings, key, list(map(insert, value)))
        elif value:
            setattr(settings, key, insert(value))
    for training in trainings[:1] if settings.checkpoints else trainings:
        calls = training.triggers + [token for tokens in training.abstractions.values() for token in tokens]
        for prompt in inference.list_prompts(settings):
            if calls and not contains_word(prompt, calls):
                words = " or ".join([*training.triggers, *training.abstractions])
                print_status(f"note: no {words} in {prompt!r}: nothing calls {training.path}")


def text_arguments(pipeline, prompt: str, negative: str | None, settings) -> dict[str, object]:
    """The pipeline's arguments for one prompt: text, or embeddings where layers are skipped, text is long or
    weighted.

    The pipelines' own clip_skip needs an older transformers; as there, the negative half of guidance skips no
    layers. Errors: UserError for more layers than there are.
    """
    clip_skip, length = settings.clip_skip or 0, settings.max_token_length or 75
    if length not in (75, 150, 225):
        raise UserError(f"max_token_length: {length} is none of 75, 150, 225")
    weighted, chunks = bool(settings.prompt_weighting), length // 75
    if not clip_skip and length == 75 and not weighted:
        return {"prompt": prompt} | ({"negative_prompt": negative} if negative else {})
    if weighted:  # as many as it takes
        needed = [len(prompt_chunks(pipeline.tokenizer, text or "", 75)) for text in (prompt, negative)]
        chunks = max(chunks, *needed)
    embeds = encode_prompt(pipeline, prompt, clip_skip, chunks, weighted)
    if negative is None and pipeline.config.get("force_zeros_for_empty_prompt"):
        negative_embeds = {key: torch.zeros_like(value) for key, value in embeds.items()}
    else:
        negative_embeds = encode_prompt(pipeline, negative or "", 0, chunks, weighted)
    return embeds | {f"negative_{key}": value for key, value in negative_embeds.items()}


def encode_prompt(
    pipeline, prompt: str, clip_skip: int, chunks: int, weighted: bool
) -> dict[str, torch.Tensor]:
    """{"prompt_embeds": (1, 75 * chunks + 2, D)}, of SDXL also {"pooled_prompt_embeds": (1, P)}.

    The same as the training scripts' encode_prompts.
    """
    parts = pipeline.components
    is_sdxl = "text_encoder_2" in parts
    hidden, pooled = [], {}
    for ending in ("", "_2") if is_sdxl else ("",):
        tokenizer, encoder = parts[f"tokenizer{ending}"], parts[f"text_encoder{ending}"]
        layers = encoder.config.num_hidden_layers
        if clip_skip >= layers:
            raise UserError(f"clip_skip: {clip_skip}: the text encoder has {layers} layers")
        ids, weights = text.chunk_ids(tokenizer, [prompt], chunks, weighted)
        with torch.no_grad():
            output = encoder(ids.to(pipeline._execution_device), output_hidden_states=True)
            states = output.hidden_states[-(clip_skip + (2 if is_sdxl else 1))]
            states = states if is_sdxl else encoder.final_layer_norm(states)
        hidden.append(text.join_chunks(text.weigh(states, weights), chunks))
        if ending:
            pooled["pooled_prompt_embeds"] = output.text_embeds[:1]
    return {"prompt_embeds": torch.cat(hidden, dim=-1)} | pooled


# ---- pictures ----------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """How a row of the grid is drawn: with which checkpoint ("" if there is no choice), at which scale."""

    checkpoint: str
    scale: float

    @property
    def label(self) -> str:
        """What stands before the row."""
        if self.scale == 0:
            return "base alone"
        if self.checkpoint and self.scale == 1:
            return self.checkpoint
        return f"{self.checkpoint} scale {self.scale:g}".strip()

    @property
    def settings(self) -> dict[str, object]:
        """What a picture's text says of the row."""
        return {"adapter_scale": self.scale} | ({"checkpoint": self.checkpoint} if self.checkpoint else {})

    def file_name(self, prompt: int, number: int) -> str:
        """The name of a picture in this row."""
        step = f"_{self.checkpoint.replace(' ', '_')}" if self.checkpoint and self.scale else ""
        return f"{prompt:03d}{step}_scale{self.scale:g}_{number:03d}.png"


def list_rows(settings, trainings: list[Training]) -> list[Row]:
    """The rows of each prompt: the base alone if asked for, then every checkpoint at every scale."""
    scales = settings.adapter_scale if isinstance(settings.adapter_scale, list) else [settings.adapter_scale]
    checkpoints = [training.checkpoint for training in trainings] if settings.checkpoints else [""]
    pairs = [(checkpoint, scale) for checkpoint in checkpoints for scale in sorted(set(scales))]
    rows = [Row(*pair) for pair in pairs]
    if settings.compare_base:
        rows = [Row(checkpoints[0], 0.0), *(row for row in rows if row.scale)]
    return rows


def size_of(pipeline, settings) -> tuple[int, int]:
    """(width, height): as set, else the base's own. Errors: UserError if the base can't draw that size."""
    has_unet, factor = "unet" in pipeline.components, pipeline.vae_scale_factor
    if has_unet:
        side = pipeline.unet.config.sample_size * factor
    else:
        side = getattr(pipeline, "default_sample_size", 128) * factor
    size = settings.resolution.width or side, settings.resolution.height or side
    step = factor * (1 if has_unet else 2)
    for key, side in zip(("width", "height"), size, strict=True):
        if side % step:
            reason = f"{side} is not divisible by {step}, as {type(pipeline).__name__} needs"
            raise UserError(f"resolution.{key}: {reason}; try {side // step * step or step}")
    return size


def draw(
    pipeline, settings, trainings: list[Training], weights: dict[str, float], base: str, folder: Path
) -> dict[tuple[int, Row, int], Image]:
    """Draws every prompt in every row with every seed, and saves the images.

    A row of another checkpoint loads that first; weights: {adapter name: weight} of what is loaded now.
    Returns {(prompt's number, row, image's number): image}.
    """
    prompts, rows = inference.list_prompts(settings), list_rows(settings, trainings)
    negatives = settings.negative_prompt
    negatives = negatives if isinstance(negatives, list) else [negatives] * len(prompts)
    options = sampling_options(pipeline, settings)
    if settings.fuse and weights:  # none with new tokens alone
        inference.fuse_adapters(pipeline, weights, rows[0].scale)
    count = settings.num_generations * settings.num_images_per_prompt
    bar = tqdm(total=len(prompts) * len(rows) * count, desc="images", disable=not sys.stderr.isatty())
    images, loaded_checkpoint = {}, ""
    for row in rows:
        if row.checkpoint != loaded_checkpoint:
            pipeline.unload_lora_weights()
            weights = add_adapters(pipeline, [t for t in trainings if t.checkpoint == row.checkpoint], base)
            loaded_checkpoint = row.checkpoint
        if weights and not settings.fuse:
            inference.set_scale(pipeline, weights, row.scale)
        for p, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
            for k, image in draw_prompt(pipeline, settings, prompt, negative, count, options):
                file, seed = folder / row.file_name(p, k), image_seed(settings.seed, k)
                about = {"prompt": prompt, "negative_prompt": negative or "", "seed": seed}
                inference.save_picture(image, file, about | row.settings | options)
                images[p, row, k] = image
                bar.update()
                tqdm.write(f"{file}  seed {seed}  {row.label}  {prompt!r}")
    bar.close()
    return images


def sampling_options(pipeline, settings) -> dict[str, object]:
    """The pipeline's arguments that are the same for every picture."""
    width, height = size_of(pipeline, settings)
    keys = ("guidance_scale", "true_cfg_scale", "num_inference_steps", "max_sequence_length")
    values = {key: getattr(settings, key) for key in keys}
    return {"width": width, "height": height} | {k: v for k, v in values.items() if v is not None}


def image_seed(seed: int, number: int) -> int:
    """The seed of image `number`: the same in every row and for every prompt, so that they compare."""
    return seed + number


def draw_prompt(
    pipeline, settings, prompt: str, negative: str | None, count: int, options: dict[str, object]
) -> Iterator[tuple[int, Image]]:
    """Draws `count` images of a prompt, in batches, each from the noise of its seed: (number, image)."""
    arguments = text_arguments(pipeline, prompt, negative, settings)
    for begin in range(0, count, settings.batch_size):
        numbers = range(begin, min(begin + settings.batch_size, count))
        seeds = [image_seed(settings.seed, k) for k in numbers]
        try:
            pixels = pipeline(
                **{key: repeat(value, len(seeds)) for key, value in arguments.items()},
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                output_type="np",
                **options,
            ).images
        except Exception as error:  # the libraries' work, on a base and arguments that are a person's
            if is_out_of_memory(error):
                raise
            base = f"{settings.paths.base_model_path} ({type(pipeline).__name__})"
            cause = f"scheduler: {settings.scheduler}" if settings.scheduler else base
            raise UserError(f"{cause} can't draw this: {one_line(error)}") from None
        yield from zip(numbers, to_images(pipeline, pixels, settings), strict=True)


def repeat(value: str | torch.Tensor, times: int):
    """A prompt, or its embeddings (1, …), for `times` images."""
    return [value] * times if isinstance(value, str) else value.repeat_interleave(times, dim=0)


def to_images(pipeline, pixels: np.ndarray, settings) -> list[Image]:
    """Pictures (B, H, W, 3) from 0 to 1 as images. Errors: UserError for one that would be black."""
    if not np.isfinite(pixels).all():
        advice = "a smaller adapter_scale, or another base or VAE"
        if settings.dtype == "float16":
            advice = "dtype: float32 or bfloat16"
        raise UserError(f"the picture has NaN in it and would be black; try {advice}")
    return pipeline.image_processor.numpy_to_pil(pixels)


if __name__ == "__main__":
    sys.exit(main())
