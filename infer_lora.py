#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0", "peft==0.21.2",
#   "accelerate==1.15.0", "bitsandbytes==0.50.2", "safetensors==0.8.0", "pillow==13.0.0",
#   "pydantic==2.14.3", "pyyaml==6.0.3",
# ]
# ///
"""Draws images with a trained LoRA.

    python infer_lora.py output/mine                                    # as the training's own files say
    python infer_lora.py output/mine --prompt "a TOK cat" "another" --adapter_scale 0.8
    python infer_lora.py output/mine --checkpoints all                  # which step is the good one?
    python infer_lora.py                                                # as config/lora_infer.yaml says
    python infer_lora.py --config my.yaml --seed 3 --resolution.width 768

A training's folder (or a LoRA file) says by itself which base it is for, and the size, steps, guidance and prompts it
was validated with: its config.yaml, else its model card and the LoRA file's metadata. A word that stands for new tokens
(TOK) becomes them. A YAML file and the command line win over that, the command line over the file.

Every key of the YAML can be given on the command line, nested ones with a dot; values are read as YAML. `--help` lists
the keys, config/lora_infer.yaml explains them. Token embeddings (`*_emb.safetensors`) that lie beside the LoRA are
loaded by themselves. Each run writes its images, with the settings in the PNG text, and the configuration used into a
folder of its own in `paths.infer_path`.

This file runs alone (`uv run infer_lora.py …` on a copy of it brings its packages). It needs the rest of the project
only to read a base that is a single checkpoint file, other tools' LoRA files for SD3 and FLUX.1, and their DoRA files;
it says so where that is missing.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # answered from the start, with a line as soon as there is one to say
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os._exit(128 + number))

import argparse
import contextlib
import difflib
import hashlib
import io
import json
import re
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent

# {group: {key: (kind, default, help)}}: what --help shows and what a YAML file is checked against; a kind is one of
# those in build_schema, or the words that are allowed
KEYS = {
    "files": {
        "paths.base_model_path": ("text", "the training's", "hub id, diffusers folder, or .safetensors/.ckpt file"),
        "paths.lora_weights_path": ("loras", None, "a training's folder or LoRA file, or [{path: …, weight: 0.8}, …]"),
        "paths.pretrained_vae_model_name_or_path": ("text", None, "another VAE"),
        "paths.infer_path": ("text", "output/infer", "each run makes a folder of its own in here"),
        "checkpoints": ("checkpoints", None, "all, or numbers: a grid over the checkpoints of the training's folder"),
    },
    "pictures": {
        "prompt": ("texts", "the training's", "one or several"),
        "negative_prompt": ("texts", None, "one, or one per prompt"),
        "adapter_scale": ("numbers", 1.0, "strength of the LoRA; several draw every prompt at each"),
        "compare_base": ("switch", False, "also without the LoRA, with the same seeds"),
        "resolution.width": ("pixels", None, "(null: the base's own)"),
        "resolution.height": ("pixels", None, "(null: the base's own)"),
        "num_generations": ("count", 1, "images per prompt and scale, each with its own seed …"),
        "num_images_per_prompt": ("count", 1, "… times this"),
        "seed": ("seed", None, "image k has seed + k; null draws one and prints it"),
        "grid": ("switch", True, "grid.png: prompts x scales or checkpoints x seeds"),
    },
    "sampling": {
        "num_inference_steps": ("count", None, "(null: the pipeline's usual number)"),
        "guidance_scale": ("amount", None, "(null: the pipeline's usual)"),
        "true_cfg_scale": ("amount", None, "FLUX.1: above 1, negative prompts work, at twice the time"),
        "max_sequence_length": ("count", None, "T5 tokens (SD3, FLUX.1); as in training"),
        "clip_skip": ("layers", None, "SD 1.x/2.x, SDXL: text layers skipped, as in training (null or 0: none)"),
        "max_token_length": ("count", None, "75, 150 or 225; SD 1.x/2.x, SDXL: tokens of a prompt that are read, as in training"),
        "scheduler": ("text", None, "such as EulerDiscreteScheduler (null: the base's own)"),
        "prediction_type": (("epsilon", "v_prediction", "sample"), None, "as in training (null: the base's own)"),
        "rescale_betas_zero_snr": ("switch", None, "zero terminal SNR, as in training (null: the base's own)"),
    },
    "machine": {
        "batch_size": ("count", 4, "images drawn at a time: lower it if the memory does not suffice"),
        "fuse": ("switch", False, "bake the LoRA into the base before drawing: a little faster"),
        "dtype": (("auto", "float32", "float16", "bfloat16"), "auto", "bfloat16 where the GPU computes in it, else float32"),
        "device": (("auto", "cuda", "mps", "xpu", "cpu"), "auto", "AMD's GPUs (ROCm) are cuda too"),
        "offload": (("none", "model", "sequential"), "none", "to the CPU: a part at a time, or each layer (slow)"),
        "quantize": (("none", "nf4", "int8"), "none", "the denoiser in 4 or 8 bits (GPU)"),
        "compile": ("switch", False, "torch.compile of the repeated blocks: slow first image, then faster"),
    },
}  # fmt: skip
FIELDS = {key: spec for group in KEYS.values() for key, spec in group.items()}
# what a training's config.yaml says, by the names of its flags
OF_TRAINING = {
    "paths.pretrained_vae_model_name_or_path": "pretrained_vae_model_name_or_path",
    "num_inference_steps": "validation_inference_steps",
    "guidance_scale": "validation_guidance_scale",
    **{
        key: key
        for key in (
            "max_sequence_length",
            "max_token_length",
            "clip_skip",
            "prediction_type",
            "rescale_betas_zero_snr",
            "seed",
        )
    },
}
ONLY_UNET = (
    "clip_skip",
    "max_token_length",
    "prediction_type",
    "rescale_betas_zero_snr",
)  # what SD3 and FLUX.1 have not


class Family(NamedTuple):
    """A model family: its pipeline, its name for people, and the base that LoRAs of it are usually trained on."""

    pipeline: str
    title: str
    base: str


FAMILIES = {
    "sd15": Family(
        "StableDiffusionPipeline", "Stable Diffusion 1.x/2.x", "stable-diffusion-v1-5/stable-diffusion-v1-5"
    ),
    "sdxl": Family("StableDiffusionXLPipeline", "SDXL", "stabilityai/stable-diffusion-xl-base-1.0"),
    "sd3": Family("StableDiffusion3Pipeline", "SD3", "stabilityai/stable-diffusion-3-medium-diffusers"),
    "flux": Family("FluxPipeline", "FLUX.1", "black-forest-labs/FLUX.1-dev"),
}


class UserError(Exception):
    """A mistake that a person can mend; ends the program with its message as one line and exit code 2."""


def main(argv: list[str] | None = None) -> int:
    """Draws as the configuration says; returns the exit code."""
    crash_folder = Path(FIELDS["paths.infer_path"][1])
    try:
        settings = read_settings(argv)
        crash_folder = Path(settings.paths.infer_path)
        with warnings.catch_warnings(action="ignore"):  # the libraries' own, which are for programmers
            draw_all(settings)
        return 0
    except UserError as error:
        print(f"infer_lora.py: error: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # the net under everything: what is left is this program's fault, or the memory
        if out_of_memory(error):
            advice = "a lower batch_size or resolution, offload: model, quantize: nf4"
            print(f"infer_lora.py: error: the memory does not suffice; in this order, try {advice}", file=sys.stderr)
            return 2
        log = write_crash_log(crash_folder)
        what = one_line(f"{type(error).__name__}: {error}", 120)
        print(f"infer_lora.py: this is a fault of the program ({what}); {log} holds the details", file=sys.stderr)
        return 1


def draw_all(settings) -> None:
    """Everything after the settings are known, in the order in which it happens."""
    if settings.seed is None:
        settings.seed = time.time_ns() % 2**31
        print(f"seed {settings.seed}")
    check_infer_path(settings)
    trainings = look_at_trainings(settings)
    insert_tokens(settings, trainings)
    base = base_folder(settings, trainings)
    pipeline = load_pipeline(settings, base)
    weights = {} if settings.checkpoints else add_adapters(pipeline, trainings, base)
    place_pipeline(pipeline, settings)
    folder = run_folder(settings)
    import yaml

    write(folder / "config.yaml", yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False).encode())
    images = draw(pipeline, settings, trainings, weights, base, folder)
    if settings.grid and len(images) > 1:
        write(folder / "grid.png", as_png(make_grid(images, prompts_of(settings))))
        print(folder / "grid.png")


def out_of_memory(error: Exception) -> bool:
    """Whether an error is about memory, the GPU's or the CPU's."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|can't allocate memory", str(error)))


def end_at_once(number: int, frame: object) -> None:
    """Answers Ctrl-C and SIGTERM with a line and exit code 130 or 143.

    Nothing is raised, because libraries swallow what is raised while they are imported; no file is ever half written,
    so nothing has to be cleaned up.
    """
    os.write(2, f"infer_lora.py: stopped by {signal.Signals(number).name}; finished images are kept\n".encode())
    os._exit(128 + number)


def write_crash_log(folder: Path) -> Path:
    """Puts the traceback of the exception being handled into a file in `folder`, or where one can be written."""
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}.log"
    text = f"{sys.argv}\nPython {sys.version}\n\n{traceback.format_exc()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name
    except OSError:
        file = Path(tempfile.gettempdir()) / name
        file.write_text(text, encoding="utf-8")
        return file


def one_line(text: object, limit: int = 300) -> str:
    """A library's message as one line."""
    words = " ".join(str(text).split())
    return words if len(words) <= limit else words[:limit] + " …"


# ---- settings: command line, YAML file, the training's own files -----------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors that name the flag and the nearest known one."""

    def error(self, message: str) -> None:
        if "expected" in message:
            raise UserError(f"{message.split()[1].rstrip(':').split('/')[0]} needs a value")
        wrong = message.split(":", 1)[1].split()[0].split("=")[0]
        near = difflib.get_close_matches(wrong.lstrip("-"), FIELDS, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown flag {wrong}; the nearest is --{near}")


def parse_words(argv: list[str] | None) -> argparse.Namespace:
    """The command line; keys are attributes under their dotted names, as text, or None."""
    parser = Parser(
        prog="infer_lora.py",
        usage="%(prog)s [LORA ...] [--config FILE] [--KEY VALUE ...]",
        description="Draws images with a trained LoRA. LORA, a training's folder or a LoRA file, says by itself which"
        " base, size, steps and prompts it needs; without it, config/lora_infer.yaml says what is drawn. Every key of"
        " the YAML is a flag.",
        allow_abbrev=False,
    )
    parser.add_argument("lora", nargs="*", metavar="LORA", help="a training's folder or a LoRA file")
    parser.add_argument(
        "--config", "--infer_config", metavar="FILE", help="YAML file of the keys below (config/lora_infer.yaml)"
    )
    for group, keys in KEYS.items():
        add = parser.add_argument_group(group).add_argument
        for key, (kind, default, text) in keys.items():
            several = kind in ("texts", "numbers", "checkpoints")
            many = {"nargs": "?", "const": "true"} if kind == "switch" else {"nargs": "+"} if several else {}
            choices = "{" + ",".join(kind) + "}" if isinstance(kind, tuple) else "VALUE"
            shown = text if "null" in text or default is None else f"{text} ({str(default).lower()})".strip()
            add(f"--{key}", metavar=choices, help=shown, **many)
    return parser.parse_intermixed_args(argv)


def read_settings(argv: list[str] | None):
    """The settings, checked: the training's own files, then the YAML file, then the command line; the last wins."""
    words = parse_words(argv)
    given = {key: value_of(key, vars(words)[key]) for key in FIELDS if vars(words)[key] is not None}
    for prompt in words.prompt or []:
        if prompt.endswith(".safetensors") or exists(f"{prompt}/pytorch_lora_weights.safetensors"):
            raise UserError(f"--prompt: {prompt} is a LoRA; it comes first: infer_lora.py {prompt} --prompt …")
    source, values = words.config or str(ROOT / "config" / "lora_infer.yaml"), {}
    if words.config or not words.lora:
        values = read_yaml(source)
    if words.lora:
        given["paths.lora_weights_path"] = words.lora[0] if len(words.lora) == 1 else words.lora
        said = {key: value for key, value in (values | given).items() if value is not None}
        values = settings_of_training(words.lora[0], said) | said
    settings = validated(values | given, words.config or (words.lora or [source])[0], given)
    check_settings(settings)
    return settings


def value_of(key: str, words: str | list[str]):
    """What a flag's words mean: prompts and paths as they stand, all else as YAML. Errors: UserError."""
    import yaml

    kind = FIELDS[key][0]
    if isinstance(words, list):
        if len(words) > 1 and kind == "texts":
            return words
        values = [value_of(key, word) for word in words]
        return values if len(values) > 1 else values[0]
    if kind == "texts" and not words.startswith("["):
        return words
    try:
        value = yaml.safe_load(words)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if kind == "texts":
            return words  # such as "[a] cat"
        raise UserError(f"--{key}: {one_line(error, 150)}") from None
    textual = kind in ("text", "texts", "loras") and not isinstance(value, list | dict)
    return words if textual and value is not None else value


def read_yaml(file: str) -> dict[str, object]:
    """A YAML file's values by their dotted keys. Errors: UserError for what is no file of known keys and values."""
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {file}: not UTF-8 text") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config {file}: not YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {file}: expected keys and values")
    flat = {}
    for key, value in values.items():
        if any(known.startswith(f"{key}.") for known in FIELDS):
            if not isinstance(value, dict | None):
                raise UserError(f"{file}: {key}: expected keys and values, found {one_line(repr(value), 80)}")
            flat |= {f"{key}.{inner}": v for inner, v in (value or {}).items()}
        else:
            flat[str(key)] = value
    for key in flat:
        if key not in FIELDS:
            near = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.0)[0]
            raise UserError(f"{file}: unknown key {key}; the nearest is {near}")
    return flat


# what a kind takes, where pydantic's message names only one of several possibilities
EXPECTED = {
    "texts": "a text or a list of texts",
    "numbers": "a finite number or a list of them",
    "loras": "a path, or a list of paths or {path: …, weight: 0.8}",
    "checkpoints": "all, or numbers of checkpoints from 1 on",
}


def validated(values: dict[str, object], source: str, given: dict[str, object]):
    """Values by dotted key -> the settings, with their types. Errors: UserError that names the key or the flag."""
    from pydantic import ValidationError

    nested: dict = {"paths": {}}
    for key, value in values.items():
        parent, _, leaf = key.rpartition(".")
        (nested.setdefault(parent, {}) if parent else nested)[leaf] = value
    try:
        return build_schema().model_validate(nested)
    except ValidationError as error:
        problem = error.errors()[0]
    place = [str(part) for part in problem["loc"]]
    key = next(key for key in FIELDS if key.split(".") == place[: key.count(".") + 1])
    where = f"--{key}" if key in given else f"{source}: {key}"
    if problem["type"] == "missing" and key not in values:
        raise UserError(f"{where} is missing")
    message = f"expected {EXPECTED[FIELDS[key][0]]}" if FIELDS[key][0] in EXPECTED else problem["msg"]
    raise UserError(f"{where}: {message[0].lower() + message[1:]}, found {one_line(repr(values[key]), 80)}")


def build_schema():
    """The pydantic model of the settings. Built in a function: pydantic takes longer to import than --help may take."""
    from typing import Annotated, Literal

    from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid")

    def no_switch(value):
        if isinstance(value, bool):
            raise ValueError("input should be a number")
        return value

    number = Annotated[float, BeforeValidator(no_switch), Field(allow_inf_nan=False)]

    class Adapter(Strict):
        path: str
        weight: number = 1.0

    whole = {"count": (1, 10**5), "pixels": (8, 2**14), "layers": (0, 100), "seed": (-(2**62), 2**62)}
    bounds = {kind: Field(ge=low, le=high) for kind, (low, high) in whole.items()}
    kinds = {kind: Annotated[int, BeforeValidator(no_switch), bound] for kind, bound in bounds.items()}
    count = kinds["count"]
    kinds |= {
        "text": Annotated[str, Field(min_length=1)],
        "texts": str | Annotated[list[str], Field(min_length=1)],
        "loras": str | list[str | Adapter],
        "numbers": number | Annotated[list[number], Field(min_length=1)],
        "amount": Annotated[number, Field(ge=0)],
        "checkpoints": Literal["all"] | count | Annotated[list[count], Field(min_length=1)],
        "switch": bool,
    }
    fields: dict[str, dict] = {}
    for key, (kind, default, _) in FIELDS.items():
        parent, _, leaf = key.rpartition(".")
        type_ = Literal[kind] if isinstance(kind, tuple) else kinds[kind]
        required = default == "the training's"
        type_ = type_ if required or default is not None else type_ | None
        fields.setdefault(parent, {})[leaf] = (type_, ... if required else default)
    inner = {name: create_model(name, __base__=Strict, **own) for name, own in fields.items() if name}
    groups = {name: (model, ... if name == "paths" else Field(default_factory=model)) for name, model in inner.items()}
    return create_model("Settings", __base__=Strict, **groups, **fields[""])


def check_settings(settings) -> None:
    """Files and combinations, before a library is loaded. Errors: UserError that names the key."""
    paths = settings.paths
    for key in ("base_model_path", "pretrained_vae_model_name_or_path"):
        value = getattr(paths, key)
        if value and value.startswith((".", "/", "~", "assets", "output")) and not exists(value):
            raise UserError(f"paths.{key}: no such file or folder: {one_line(value)}")
    for path, _ in adapters_of(settings):
        adapter_files(path)
    prompts, negative = prompts_of(settings), settings.negative_prompt
    if isinstance(negative, list) and len(negative) != len(prompts):
        raise UserError(f"negative_prompt: {len(negative)} of them for {len(prompts)} prompts; give one, or as many")
    if not adapters_of(settings) and (settings.compare_base or settings.fuse or settings.checkpoints):
        raise UserError("compare_base, fuse and checkpoints need paths.lora_weights_path")
    if settings.fuse and (settings.compare_base or isinstance(settings.adapter_scale, list)):
        raise UserError("fuse bakes one scale into the base: no compare_base and no list in adapter_scale")
    if settings.quantize != "none" and settings.fuse:
        raise UserError("fuse can't be combined with quantize")
    if settings.checkpoints:
        if len(adapters_of(settings)) != 1:
            raise UserError("checkpoints are those of one training: give one folder in paths.lora_weights_path")
        if settings.fuse or settings.compile or settings.offload == "sequential":
            raise UserError("checkpoints are loaded one after the other: no fuse, compile or offload: sequential")
        checkpoint_folders(settings)


def check_infer_path(settings) -> None:
    """Whether pictures can be written, before a base is loaded."""
    folder = Path(settings.paths.infer_path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"paths.infer_path: {one_line(folder)} can't be written: {reason}") from None


def exists(path: str) -> bool:
    """Whether there is such a file or folder; a name that no file can have has none."""
    try:
        return Path(path).exists()
    except OSError:  # a name that is too long
        return False


def adapters_of(settings) -> list[tuple[str, float]]:
    """(path, weight) of each LoRA."""
    value = settings.paths.lora_weights_path
    entries = value if isinstance(value, list) else [value] if value else []
    return [(e, 1.0) if isinstance(e, str) else (e.path, e.weight) for e in entries]


def prompts_of(settings) -> list[str]:
    """The prompts as a list."""
    return settings.prompt if isinstance(settings.prompt, list) else [settings.prompt]


# ---- what a training left: files, what they say, its tokens ----------------------------------------------------------


@dataclass
class Training:
    """A LoRA with what its training says of itself."""

    path: str
    weight: float
    lora: Path | None
    embeddings: Path | None
    about: dict[str, object]  # by the training's own flag names
    family: str | None
    first: int = 0  # number of its first new token
    words: dict[str, list[str]] = field(default_factory=dict)  # {"TOK": ["<s0>", "<s1>"]}


def adapter_files(path: str) -> tuple[Path | None, Path | None]:
    """(LoRA file, embeddings file) of a training's folder or of one file. Errors: UserError if neither is there."""
    place = Path(path)
    if not exists(path):
        raise UserError(
            f"paths.lora_weights_path: no such file or folder: {one_line(path)}; train one first:"
            " bash run_lora_train.sh"
        )
    folder = place if place.is_dir() else place.parent
    own = f"{folder.resolve().name if place.is_dir() else place.stem}_emb.safetensors"
    embeddings = sorted(folder.glob("*_emb.safetensors"), key=lambda file: (file.name != own, file.name))
    if place.is_dir():
        lora = place / "pytorch_lora_weights.safetensors"
        if not lora.is_file() and not embeddings:
            advice = "; a checkpoint's folder has one" if checkpoints_in(place) else ""
            raise UserError(
                f"paths.lora_weights_path: no pytorch_lora_weights.safetensors or *_emb.safetensors in {path}{advice}"
            )
        return lora if lora.is_file() else None, embeddings[0] if embeddings else None
    if place.suffix != ".safetensors":
        raise UserError(
            f"paths.lora_weights_path: {path}: only .safetensors files are read; others can run code when they are"
            " opened"
        )
    if place.name.endswith("_emb.safetensors"):
        return None, place
    return place, embeddings[0] if embeddings else None


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """{step: folder} of a training's checkpoints, in order."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return dict(sorted((int(p.name.split("-")[1]), p) for p in found))


def checkpoint_folders(settings) -> dict[str, Path]:
    """{label: folder} of the checkpoints to draw; of all, also the training's result where it is not one of them."""
    ((path, _),) = adapters_of(settings)
    there, wanted = checkpoints_in(Path(path)), settings.checkpoints
    if not there:
        raise UserError(f"checkpoints: no checkpoint-N in {path}")
    if wanted != "all":
        wanted = wanted if isinstance(wanted, list) else [wanted]
        missing = [step for step in wanted if step not in there]
        if missing:
            raise UserError(
                f"checkpoints: no checkpoint-{missing[0]} in {path}; there are {', '.join(map(str, there))}"
            )
        return {f"step {step}": there[step] for step in dict.fromkeys(wanted)}
    out = {f"step {step}": folder for step, folder in there.items()}
    finished = (Path(path) / "pytorch_lora_weights.safetensors").is_file()
    if finished and about_training(path).get("max_train_steps") not in there:
        out["the result"] = Path(path)
    return out


def header_of(file: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """(metadata, {key: shape}) of a .safetensors file, its tensors unread. Errors: UserError if it is none, or cut."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
            metadata = dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file, or damaged ({one_line(error, 100)})") from None
    if not shapes:
        raise UserError(f"{file}: holds no tensors")
    return metadata, shapes


def about_training(path: str) -> dict[str, object]:
    """What a training says of itself, by its flags' names: config.yaml, else the model card and the file's metadata."""
    import yaml

    place = Path(path)
    folder = (place if place.is_dir() else place.parent).resolve()
    files = sorted(folder.glob("*.safetensors")) if place.is_dir() else [place]
    out: dict[str, object] = {}
    for file in files:
        with contextlib.suppress(UserError):  # the one that is drawn with is looked at later
            out |= header_of(file)[0]
    if re.fullmatch(r"checkpoint-\d+", folder.name):
        folder = folder.parent
    unreadable = (
        OSError,
        ValueError,
        IndexError,
        AttributeError,
        RecursionError,
        yaml.YAMLError,
    )  # any text may stand there
    with contextlib.suppress(*unreadable):
        card = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])
        out["pretrained_model_name_or_path"] = card.get("base_model")
        out["instance_prompt"] = card.get("instance_prompt")
    file = folder / "config.yaml"
    if file.is_file():
        with contextlib.suppress(*unreadable):
            said = yaml.safe_load(file.read_text(encoding="utf-8"))
            if isinstance(said, dict) and "pretrained_model_name_or_path" in said:
                return out | said
        print(f"note: {file} is not a training's configuration: the LoRA's own files say what they can")
    return out


def settings_of_training(path: str, said: dict[str, object]) -> dict[str, object]:
    """A training's settings by this file's keys, but those `said` otherwise. Errors: UserError without a prompt."""
    lora, embeddings = adapter_files(path)
    about = about_training(path)
    said_there = {key: about.get(flag) for key, flag in OF_TRAINING.items()}
    out = {
        key: value for key, value in said_there.items() if value is not None and value is not False
    }  # False: not set
    if family_of_lora(lora, about) in ("sd3", "flux"):
        out = {key: value for key, value in out.items() if key not in ONLY_UNET}
    size = about.get("resolution") or re.findall(r"\d+", str(about.get("modelspec.resolution", "")))
    if size:
        sides = (size if isinstance(size, list) else [size]) * 2
        out |= {"resolution.width": sides[0], "resolution.height": sides[1]}
    if "paths.base_model_path" not in said:
        out["paths.base_model_path"] = find_base(path, about, family_of_lora(lora, about))
    if "prompt" not in said:
        words = str(about.get("token_abstraction") or "TOK").split(",") if embeddings else []
        known = [about.get(key) for key in ("validation_prompt", "instance_prompt", "trigger_word")]
        out["prompt"] = next((p for p in (*known, about.get("modelspec.trigger_phrase"), *words) if p), None)
        if out["prompt"] is None:
            raise UserError(f'{path} says no prompt: --prompt "…" does')
    return out


def find_base(path: str, about: dict[str, object], family: str | None) -> str:
    """The base that a training names, else the one that its family's LoRAs are usually trained on."""
    named = about.get("pretrained_model_name_or_path") or about.get("ss_base_model")
    if named:
        named = str(named)
        for place in (Path(named), ROOT / named, ROOT / "assets" / named):
            if exists(str(place)):
                return str(place)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", named) and not named.startswith((".", "output/", "assets/")):
            return named
    if family is None or "pretrained_model_name_or_path" in about and named:
        reason = f"its base {named} is not there" if named else "it doesn't say its base"
        raise UserError(f"{path}: {reason}; --paths.base_model_path BASE does")
    print(
        f"base: {FAMILIES[family].base}, the usual one of {FAMILIES[family].title};"
        " --paths.base_model_path names another"
    )
    return FAMILIES[family].base


def family_of_lora(file: Path | None, about: dict[str, object]) -> str | None:
    """The family that a LoRA file says it is for, or that its names of layers are of; None where both leave it open."""
    said = str(about.get("modelspec.architecture", "")).lower()
    names = "\n".join(header_of(file)[1]) if file else ""
    signs = (
        ("flux", "flux" in said or "double_blocks" in names or "single_transformer_blocks" in names),
        ("sd3", "diffusion-v3" in said or "diffusion-3" in said or "joint_blocks" in names),
        ("sdxl", "-xl" in said or "lora_te2_" in names or "unet_input_blocks" in names),
        ("sd15", "diffusion-v1" in said or "diffusion-v2" in said),
    )
    return next((family for family, is_it in signs if is_it), None)


def look_at_trainings(settings) -> list[Training]:
    """Every LoRA that will be drawn with, its files' headers read, its new tokens numbered. Errors: UserError."""
    paths = adapters_of(settings)
    if settings.checkpoints:
        paths = [(str(folder), paths[0][1]) for folder in checkpoint_folders(settings).values()]
    out, first, taken = [], 0, set()
    for path, weight in paths:
        lora, embeddings = adapter_files(path)
        about = about_training(path)
        training = Training(path, weight, lora, embeddings, about, family_of_lora(lora, about), first)
        if embeddings:
            shapes = list(header_of(embeddings)[1].values())
            if any(len(shape) != 2 or shape[0] != shapes[0][0] or not shape[0] for shape in shapes):
                raise UserError(f"{embeddings}: expected tables with a row for each new token, found {shapes}")
            rows = shapes[0][0]
            words = [w.strip() for w in str(about.get("token_abstraction") or "TOK").split(",") if w.strip()]
            tokens = [f"<s{first + i}>" for i in range(rows)]
            each = rows // len(words) or 1
            training.words = {w: tokens[i * each : (i + 1) * each] for i, w in enumerate(words) if w not in taken}
            if not settings.checkpoints:  # theirs replace each other
                first, taken = first + rows, taken | set(words)
        out.append(training)
    return out


def insert_tokens(settings, trainings: list[Training]) -> None:
    """Puts the new tokens into the prompts ("a TOK" -> "a <s0><s1>"), and says which prompts call no LoRA."""
    words = {word: "".join(tokens) for t in trainings for word, tokens in t.words.items()}

    def replaced(text):
        if isinstance(text, list):
            return [replaced(t) for t in text]
        for word in sorted(words, key=len, reverse=True):
            text = text.replace(word, words[word]) if text else text
        return text

    settings.prompt, settings.negative_prompt = replaced(settings.prompt), replaced(settings.negative_prompt)
    for training in trainings[:1] if settings.checkpoints else trainings:
        trigger = training.about.get("trigger_word") or training.about.get("modelspec.trigger_phrase")
        calls = [str(trigger)] * bool(trigger) + [token for tokens in training.words.values() for token in tokens]
        shown = ([str(trigger)] if trigger else []) + list(training.words)
        for prompt in prompts_of(settings):
            if calls and not any(call.lower() in prompt.lower() for call in calls):
                print(f"note: no {' or '.join(shown)} in {prompt!r}: nothing calls {training.path}")


def family_of_base(base: str) -> str | None:
    """The family that a diffusers folder or a repository of the hub is of; None for another one. Errors: UserError."""
    try:
        if Path(base).is_dir():
            index = Path(base) / "model_index.json"
        else:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.utils import logging

            logging.set_verbosity_error()  # it tells of each retry
            index = Path(hf_hub_download(base, "model_index.json"))
    except Exception as error:  # the hub has many kinds
        raise UserError(f"paths.base_model_path: {base}: {one_line(error)}") from None
    kind = read_json(index).get("_class_name")
    return next((name for name, family in FAMILIES.items() if family.pipeline == kind), None)


def read_json(file: Path) -> dict:
    """A base's JSON file of keys and values. Errors: UserError."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"paths.base_model_path: {file}: missing or damaged ({one_line(error, 100)})") from None
    if not isinstance(values, dict):
        raise UserError(f"paths.base_model_path: {file}: damaged: no keys and values")
    return values


def check_folder(folder: Path, own_vae: bool) -> None:
    """Looks at a base's parts and configurations: the libraries' own errors seldom name the file. Errors: UserError."""
    for name, spec in read_json(folder / "model_index.json").items():
        wanted = isinstance(spec, list) and spec[:1] != [None] and (own_vae or name != "vae")
        if wanted and not (folder / name).is_dir():
            raise UserError(f"paths.base_model_path: {folder}: its part {name} is missing")
    for file in folder.glob("*/*.json"):
        read_json(file)


def base_folder(settings, trainings: list[Training]) -> str:
    """The base as a folder or a hub id. Errors: UserError if LoRAs or settings are for another family."""
    base = settings.paths.base_model_path
    folder = str(unpacked(base)) if Path(base).is_file() else base
    if Path(folder).is_dir():
        check_folder(Path(folder), own_vae=settings.paths.pretrained_vae_model_name_or_path is None)
    family = family_of_base(folder)
    title = FAMILIES[family].title if family else "another family"
    for training in trainings:
        if family and training.family not in (None, family):
            raise UserError(f"{training.path} was trained for {FAMILIES[training.family].title}, but {base} is {title}")
    flux, unet = family == "flux", family in ("sd15", "sdxl")
    if settings.true_cfg_scale is not None and not flux:
        raise UserError("true_cfg_scale is for FLUX.1 alone; other families have guidance_scale")
    if settings.negative_prompt and flux and (settings.true_cfg_scale or 0) <= 1:
        raise UserError("negative_prompt has no effect on FLUX.1 without true_cfg_scale above 1")
    for key in ONLY_UNET:
        if getattr(settings, key) and not unet:
            raise UserError(f"{key} is for Stable Diffusion 1.x/2.x and SDXL, and {base} is {title}")
    if settings.max_sequence_length and unet:
        raise UserError(f"max_sequence_length is for SD3 and FLUX.1, and {base} is {title}")
    return folder


# ---- base, LoRAs, embeddings -----------------------------------------------------------------------------------------


def load_pipeline(settings, base: str):
    """The base's pipeline, on the CPU. Errors: UserError for a base or a machine that can't do it."""
    import logging.handlers

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    print(f"loading {base}", flush=True)
    import diffusers
    import huggingface_hub
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)  # what fails is raised too
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # downloads are long; transformers switches theirs off too
    _, dtype = device_and_dtype(settings)
    log, report = logging.getLogger("transformers.modeling_utils"), logging.handlers.BufferingHandler(1000)
    log.setLevel(logging.WARNING)  # it warns of weights that it made up, as of much else: heard here, not shown
    log.propagate = False
    log.addHandler(report)
    options = {}
    if settings.paths.pretrained_vae_model_name_or_path:
        options["vae"] = load_vae(settings.paths.pretrained_vae_model_name_or_path, dtype)
    if settings.quantize != "none":
        options["quantization_config"] = quantization(settings.quantize, dtype)
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(base, dtype=dtype, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged folder: both libraries raise whatever comes
        shown = settings.paths.base_model_path
        raise UserError(f"paths.base_model_path: {shown} can't be loaded: {one_line(error)}") from None
    finally:
        log.removeHandler(report)
    check_whole(pipeline, settings.paths.base_model_path, report.buffer)
    changes = {key: getattr(settings, key) for key in ("prediction_type", "rescale_betas_zero_snr")}
    changes = {key: value for key, value in changes.items() if value is not None}
    if settings.scheduler or changes:
        kind = scheduler_class(pipeline, settings.scheduler) if settings.scheduler else type(pipeline.scheduler)
        try:
            pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **changes)
        except (TypeError, ValueError, ImportError) as error:  # one for other models, or that needs another package
            raise UserError(f"scheduler: {kind.__name__} can't be used here: {one_line(error)}") from None
    return pipeline


def place_pipeline(pipeline, settings) -> None:
    """Compiles, if asked for, and moves to the device."""
    import torch

    device, _ = device_and_dtype(settings)
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ and denoiser_of(pipeline).num_parameters() < 5e7:
        torch.set_num_threads(1)  # a toy's threads wait for each other longer than they work
    if settings.compile:
        denoiser_of(pipeline).compile_repeated_blocks()
    if settings.offload == "model":
        pipeline.enable_model_cpu_offload()
    elif settings.offload == "sequential":
        pipeline.enable_sequential_cpu_offload()
    else:
        pipeline.to(device)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), desc="steps", position=1, leave=False)


def device_and_dtype(settings) -> tuple[str, object]:
    """Where and in which precision is drawn. Errors: UserError for a device that this machine hasn't."""
    import torch

    there = {name: getattr(torch, name).is_available() for name in ("cuda", "mps", "xpu")} | {"cpu": True}
    device = (
        settings.device if settings.device != "auto" else next(name for name, is_there in there.items() if is_there)
    )
    if not there[device]:
        raise UserError(f"device: {device}: torch finds no such device on this machine; auto takes what there is")
    if settings.offload != "none" and device == "cpu":
        raise UserError(
            f"offload: {settings.offload} moves parts from a GPU to the CPU, and there is no GPU in use: none"
        )
    if settings.quantize != "none" and device != "cuda":
        raise UserError(f"quantize: {settings.quantize} needs an NVIDIA GPU: none")
    if settings.dtype != "auto":
        return device, getattr(torch, settings.dtype)
    half = device in ("cuda", "xpu") or device == "mps" and torch.backends.mps.is_macos_or_newer(14, 0)
    return device, torch.bfloat16 if half else torch.float32


def check_whole(pipeline, base: str, report: list) -> None:
    """Refuses what would draw wrongly: a part without vocabulary, or with weights made up, as the log `report` says."""
    messages = [r.getMessage() for r in report]
    made_up = [re.findall(r"([A-Z]\w+) LOAD REPORT", text)[0] for text in messages if "MISSING" in text]
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer") and part is not None:
            length = part.model_max_length  # beyond 10**6: the value that stands for none
            if (
                not isinstance(length, int)
                or length > 10**6
                or part.unk_token_id in part("a", add_special_tokens=False).input_ids
            ):
                raise UserError(f"paths.base_model_path: {base}: {name} has no vocabulary or no configuration")
        if hasattr(part, "parameters") and any(p.is_meta for p in part.parameters()):
            made_up.append(name)
    if made_up:
        raise UserError(f"paths.base_model_path: {base}: some weights of {made_up[0]} are missing")


def load_vae(name: str, dtype):
    """Another VAE, from a folder of its own, a pipeline's folder or the hub. Errors: UserError."""
    from diffusers import AutoencoderKL

    inside = {"subfolder": "vae"} if (Path(name) / "vae" / "config.json").is_file() else {}
    load = AutoencoderKL.from_single_file if Path(name).is_file() else AutoencoderKL.from_pretrained
    try:
        return load(name, **({"torch_dtype": dtype} if Path(name).is_file() else {"dtype": dtype}), **inside)
    except Exception as error:  # as for the base
        raise UserError(f"paths.pretrained_vae_model_name_or_path: {name} can't be loaded: {one_line(error)}") from None


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
        what = one_line(f"{type(error).__name__}: {error}", 200)
        raise UserError(f"paths.base_model_path: {base}: no checkpoint, or damaged ({what})") from None
    if family is None:
        raise UserError(f"paths.base_model_path: {base}: not a base of Stable Diffusion 1.x/2.x, SDXL, SD3 or FLUX.1")
    script = load_script(family)
    try:
        return script.unpack_single_file(Path(base), argparse.Namespace(cache_dir=None))
    except script.UserError as error:
        raise UserError(str(error).replace("--pretrained_model_name_or_path", "paths.base_model_path")) from None


def scheduler_class(pipeline, name: str):
    """A scheduler of diffusers by its name. Errors: UserError for an unknown one, or one that the base can't use."""
    import diffusers

    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    full = next((n for n in names if n.lower() in (name.lower(), name.lower() + "scheduler")), None)
    if full is None:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.2)
        raise UserError(f"scheduler: {one_line(name, 80)} is not in diffusers; near it are {', '.join(near)}")
    own = type(pipeline.scheduler).__name__
    if full.startswith("FlowMatch") != own.startswith("FlowMatch"):
        kind = (
            "the flow of SD3 and FLUX.1" if full.startswith("FlowMatch") else "noise, as in Stable Diffusion and SDXL"
        )
        raise UserError(f"scheduler: {full} is for bases that predict {kind}; this one has {own}")
    return getattr(diffusers, full)


def denoiser_of(pipeline):
    """The UNet or the transformer."""
    return pipeline.unet if "unet" in pipeline.components else pipeline.transformer


def add_adapters(pipeline, trainings: list[Training], base: str) -> dict[str, float]:
    """Loads LoRAs and embeddings; returns {adapter name: weight}. Errors: UserError for a file that doesn't fit."""
    weights = {}
    for number, training in enumerate(trainings):
        if training.embeddings is not None:
            load_embeddings(pipeline, training.embeddings, training.first)
        if training.lora is not None:
            name, what = f"lora{number}", f"paths.lora_weights_path: {training.lora}"
            check_finite(training.lora)
            try:
                load_lora(pipeline, training.lora, name, base)
            except (ValueError, RuntimeError, KeyError, TypeError, IndexError, AttributeError) as error:
                if "out of memory" in str(error):
                    raise
                raise UserError(
                    f"{what} does not fit {type(pipeline).__name__}, or is damaged: {one_line(error, 200)}"
                ) from None
            loaded = {n for names in pipeline.get_list_adapters().values() for n in names}
            if name not in loaded:  # diffusers only warns when no key fits
                raise UserError(
                    f"{what}: none of its keys fits {type(pipeline).__name__};"
                    " scripts/lora/inspect_lora.py says what it is for"
                )
            check_complete(pipeline, what)
            weights[name] = training.weight
    return weights


def check_complete(pipeline, what: str) -> None:
    """Errors: UserError if a matrix of a LoRA is not in its file, where diffusers leaves an empty one."""
    for part in pipeline.components.values():
        for name, parameter in part.named_parameters() if hasattr(part, "named_parameters") else ():
            if parameter.is_meta and "lora_" in name:
                raise UserError(f"{what}: damaged or cut: {name} is missing in it")


def check_finite(file: Path) -> dict:
    """The tensors of a file. Errors: UserError if a number in it is NaN or infinite."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(file)
    for key, value in tensors.items():
        if not torch.isfinite(value.float()).all():
            raise UserError(f"{file}: {key} holds NaN or infinity: its training diverged; take an earlier checkpoint")
    return tensors


OWN_KEY = re.compile(  # of a file of diffusers: its names of layers, and what it holds of them
    r"(unet|transformer|text_encoder(_2|_3)?)\.(?!(double|single|joint|input|output)_blocks|middle_block|img_in|.*processor)"
    r".*\.(lora(\.|_linear_layer\.)(up|down)\.weight|lora_[AB]\.weight|lora_magnitude_vector(\.weight)?"
    r"|(hada|lokr)_\w+)$"
)


def load_lora(pipeline, file: Path, name: str, base: str) -> None:
    """Loads a LoRA file as an adapter. Of other trainers' files diffusers reads those of kohya's for Stable Diffusion and SDXL;
    the others are converted first: it takes some for other layers, and DoRA's without their magnitude.
    """
    kind = type(pipeline).__name__
    family = next((name for name, family in FAMILIES.items() if family.pipeline == kind), None)
    _, keys = header_of(file)
    dora = any(key.endswith(".dora_scale") for key in keys)
    kohya = all(re.match(r"lora_(unet|te[12]?)_.*\.(lora_(up|down)\.weight|alpha)$", key) for key in keys)
    own, factors = all(OWN_KEY.match(key) for key in keys), any(re.search(r"\.(hada|lokr)_\w+$", key) for key in keys)
    if own and factors:
        load_factors(pipeline, file, name)
        return
    if own or family in ("sd15", "sdxl") and kohya:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        return
    beside = file.with_name("pytorch_lora_weights.safetensors")  # a training's other file
    ours = beside != file and beside.is_file() and file.stem == file.parent.resolve().name
    if ours and (factors or not (ROOT / "scripts").is_dir()):
        load_lora(pipeline, beside, name, base)
        return
    add_scripts_to_path(
        f"paths.lora_weights_path: {file}: another tool's file {'with DoRA' if dora else 'for this family'}"
    )
    from scripts.lora.parts.lora_files import FileError, read_lora, write_diffusers

    with tempfile.TemporaryDirectory() as folder:
        try:
            lora = read_lora(file, family, base if (Path(base) / "model_index.json").is_file() else None)
            write_diffusers(lora, Path(folder) / file.name)
        except FileError as error:
            raise UserError(f"paths.lora_weights_path: it does not fit {kind}: {error}") from None
        pipeline.load_lora_weights(folder, weight_name=file.name, adapter_name=name)


def load_factors(pipeline, file: Path, name: str) -> None:
    """Loads a LoHa or LoKr of the training scripts as an adapter, by peft; the pipelines' loader takes neither.

    Errors: ValueError, KeyError or RuntimeError for a file that does not fit.
    """
    import peft

    said, tensors = json.loads(header_of(file)[0]["lora_adapter_metadata"]), check_finite(file)
    for part in sorted({key.partition(".")[0] for key in tensors}):
        settings, state = (
            {key.removeprefix(f"{part}."): value for key, value in given.items() if key.startswith(f"{part}.")}
            for given in (said, tensors)
        )
        module = getattr(pipeline, part)
        if part.startswith("text_encoder") and not hasattr(module, "text_model"):  # a level that not all classes have
            state = {key.removeprefix("text_model."): value for key, value in state.items()}
        module.add_adapter(peft.get_peft_config(settings), name)
        found = peft.set_peft_model_state_dict(module, state, name)
        strays = [*found.unexpected_keys, *(key for key in found.missing_keys if key.endswith(f".{name}"))]
        if strays:
            raise ValueError(f"{strays[0]} is missing, or fits no layer")


def load_embeddings(pipeline, file: Path, first: int) -> None:
    """Adds a training's new tokens to the pipeline's encoders, from `<s0>` on if `first` is 0, or replaces their
    embeddings if they are there. Errors: UserError for a file that doesn't fit.
    """
    places = {
        "clip_l": ("tokenizer", "text_encoder"),
        "clip_g": ("tokenizer_2", "text_encoder_2"),
        "t5": ("tokenizer_3", "text_encoder_3"),
    }
    if type(pipeline).__name__.startswith("Flux"):
        places["t5"] = ("tokenizer_2", "text_encoder_2")
    for key, table in check_finite(file).items():
        key = {"t5xxl": "t5", "emb_params": "clip_l"}.get(key, key)  # other tools' names
        tokenizer, encoder = (pipeline.components.get(name) for name in places.get(key, ("", "")))
        if encoder is None or table.shape[1] != encoder.get_input_embeddings().embedding_dim:
            raise UserError(
                f"{file}: {key} {tuple(table.shape)} does not fit a text encoder of {type(pipeline).__name__}"
            )
        tokens = [f"<s{first + i}>" for i in range(len(table))]
        tokenizer.add_tokens(tokens)
        if len(tokenizer) > encoder.get_input_embeddings().num_embeddings:
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        rows = encoder.get_input_embeddings().weight.data  # SD3's pipeline has no loader of its own for embeddings
        rows[tokenizer.convert_tokens_to_ids(tokens)] = table.to(rows.device, rows.dtype)
        print(f"{file.name}: {key} knows {''.join(tokens)}")


# ---- pictures --------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """How a row of the grid is drawn: with which checkpoint ("" if there is no choice), at which scale of the LoRA."""

    checkpoint: str
    scale: float

    @property
    def label(self) -> str:
        if self.scale == 0:
            return "base alone"
        return (
            self.checkpoint
            if self.checkpoint and self.scale == 1
            else f"{self.checkpoint} scale {self.scale:g}".strip()
        )

    def file_name(self, prompt: int, number: int) -> str:
        step = f"_{self.checkpoint.replace(' ', '_')}" if self.checkpoint and self.scale else ""
        return f"{prompt:03d}{step}_scale{self.scale:g}_{number:03d}.png"


def rows_of(settings) -> list[Row]:
    """The rows of each prompt: the base alone if asked for, then every checkpoint at every scale."""
    scales = settings.adapter_scale if isinstance(settings.adapter_scale, list) else [settings.adapter_scale]
    scales = sorted(set(scales))
    checkpoints = list(checkpoint_folders(settings)) if settings.checkpoints else [""]
    rows = [Row(c, s) for c in checkpoints for s in scales if s or not settings.compare_base]
    return [Row(checkpoints[0], 0.0), *rows] if settings.compare_base else rows


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
                f"resolution.{key}: {side} is not divisible by {step}, as {type(pipeline).__name__} needs;"
                f" try {side // step * step or step}"
            )
    return width, height


def draw(
    pipeline, settings, trainings: list[Training], weights: dict[str, float], base: str, folder: Path
) -> dict[tuple, object]:
    """Draws every prompt in every row with every seed, saves and returns the images: {(prompt, row, number): image}."""
    import torch
    from tqdm.auto import tqdm

    prompts, rows = prompts_of(settings), rows_of(settings)
    negatives = settings.negative_prompt
    negatives = negatives if isinstance(negatives, list) else [negatives] * len(prompts)
    width, height = size_of(pipeline, settings)
    count = settings.num_generations * settings.num_images_per_prompt
    fixed = {"width": width, "height": height}
    for key in ("guidance_scale", "true_cfg_scale", "num_inference_steps", "max_sequence_length"):
        if getattr(settings, key) is not None:
            fixed[key] = getattr(settings, key)
    if settings.fuse and weights:  # none with new tokens alone
        pipeline.set_adapters(list(weights), list(weights.values()))
        pipeline.fuse_lora(lora_scale=rows[0].scale)
        pipeline.unload_lora_weights()
    bar = tqdm(total=len(prompts) * len(rows) * count, desc="images", disable=not sys.stderr.isatty())
    images, loaded = {}, ""
    for row in rows:
        if row.checkpoint != loaded:
            pipeline.unload_lora_weights()
            weights = add_adapters(
                pipeline, [trainings[list(checkpoint_folders(settings)).index(row.checkpoint)]], base
            )
            loaded = row.checkpoint
        if weights and not settings.fuse:
            set_scale(pipeline, weights, row.scale)
        for p, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
            text = text_arguments(pipeline, prompt, negative, settings.clip_skip, settings.max_token_length or 75)
            for begin in range(0, count, settings.batch_size):
                numbers = range(begin, min(begin + settings.batch_size, count))
                seeds = [image_seed(settings.seed, k) for k in numbers]
                try:
                    drawn = pipeline(
                        **{key: repeated(value, len(seeds)) for key, value in text.items()},
                        generator=[torch.Generator("cpu").manual_seed(s) for s in seeds],
                        output_type="np",
                        **fixed,
                    ).images
                except Exception as error:  # all of it the libraries' work, on a base and arguments that are a person's
                    if out_of_memory(error):
                        raise
                    own = f"{settings.paths.base_model_path} ({type(pipeline).__name__})"
                    what = f"scheduler: {settings.scheduler}" if settings.scheduler else own
                    raise UserError(f"{what} can't draw this: {one_line(error)}") from None
                for k, seed, image in zip(numbers, seeds, as_images(pipeline, drawn, settings), strict=True):
                    file = folder / row.file_name(p, k)
                    about = {
                        "prompt": prompt,
                        "negative_prompt": negative or "",
                        "seed": seed,
                        "adapter_scale": row.scale,
                    }
                    about |= ({"checkpoint": row.checkpoint} if row.checkpoint else {}) | fixed
                    write(file, as_png(image, about))
                    images[p, row, k] = image
                    bar.update()
                    tqdm.write(f"{file}  seed {seed}  {row.label}  {prompt!r}")
    bar.close()
    return images


def repeated(value, times: int):
    """A prompt, or its embeddings (1, …), for `times` images."""
    return [value] * times if isinstance(value, str) else value.repeat_interleave(times, dim=0)


def text_arguments(
    pipeline, prompt: str, negative: str | None, clip_skip: int | None, length: int
) -> dict[str, object]:
    """The pipeline's arguments for one prompt: text, or embeddings if layers are skipped or more than 75 tokens are read.

    The pipelines' own clip_skip needs an older transformers; as there, the negative half of guidance skips no layers.
    Errors: UserError for more layers than there are.
    """
    if length not in (75, 150, 225):
        raise UserError(f"max_token_length: {length} is none of 75, 150, 225")
    if not clip_skip and length == 75:
        return {"prompt": prompt} | ({"negative_prompt": negative} if negative else {})
    out = encoded(pipeline, prompt, clip_skip or 0, length // 75)
    zeros = negative is None and pipeline.config.get("force_zeros_for_empty_prompt")
    other = {k: v * 0 for k, v in out.items()} if zeros else encoded(pipeline, negative or "", 0, length // 75)
    return out | {f"negative_{key}": value for key, value in other.items()}


def encoded(pipeline, prompt: str, clip_skip: int, chunks: int) -> dict[str, object]:
    """{"prompt_embeds": (1, 75 * chunks + 2, D)} and, of SDXL, {"pooled_prompt_embeds": (1, P)}, as the training scripts encode."""
    import torch

    hidden, pooled = [], {}
    sdxl = "text_encoder_2" in pipeline.components
    for end in ("", "_2") if sdxl else ("",):
        tokenizer, encoder = pipeline.components[f"tokenizer{end}"], pipeline.components[f"text_encoder{end}"]
        layers = encoder.config.num_hidden_layers
        if clip_skip >= layers:
            raise UserError(f"clip_skip: {clip_skip}: the text encoder has {layers} layers")
        ids, size, rows = tokenizer(prompt, add_special_tokens=False).input_ids, tokenizer.model_max_length - 2, []
        for piece in (ids[k * size : (k + 1) * size] for k in range(chunks)):
            padding = [tokenizer.pad_token_id] * (size - len(piece))
            rows.append([tokenizer.bos_token_id, *piece, tokenizer.eos_token_id, *padding])
        with torch.no_grad():
            output = encoder(torch.tensor(rows, device=pipeline._execution_device), output_hidden_states=True)
            states = output.hidden_states[-(clip_skip + (2 if sdxl else 1))]
            states = states if sdxl else encoder.final_layer_norm(states)
        hidden.append(
            torch.cat([states[:1, :1], states[:, 1:-1].reshape(1, -1, states.shape[-1]), states[-1:, -1:]], 1)
        )
        if end:
            pooled["pooled_prompt_embeds"] = output.text_embeds[:1]
    return {"prompt_embeds": torch.cat(hidden, dim=-1)} | pooled


def as_images(pipeline, drawn, settings) -> list:
    """Pictures (B, H, W, 3) from 0 to 1 as images. Errors: UserError for one that isn't finite and would be black."""
    import numpy as np

    if not np.isfinite(drawn).all():
        advice = (
            "dtype: float32 or bfloat16"
            if settings.dtype == "float16"
            else "a smaller adapter_scale, or another base or VAE"
        )
        raise UserError(f"the picture has NaN in it and would be black; try {advice}")
    return pipeline.image_processor.numpy_to_pil(drawn)


def set_scale(pipeline, weights: dict[str, float], scale: float) -> None:
    """Scales every LoRA by its own weight times `scale`; at 0 the base draws alone."""
    if scale == 0:
        pipeline.disable_lora()
    else:
        pipeline.enable_lora()
        pipeline.set_adapters(list(weights), [w * scale for w in weights.values()])


def image_seed(seed: int, number: int) -> int:
    """The seed of image `number`: the same in every row and for every prompt, so that those can be compared."""
    return seed + number


def make_grid(images: dict[tuple, object], prompts: list[str]):
    """A labelled sheet: rows of each prompt (scales, checkpoints), a column per seed."""
    from PIL import Image, ImageDraw, ImageFont

    rows = list(dict.fromkeys(sorted(((p, row) for p, row, _ in images), key=lambda place: place[0])))
    columns = sorted({k for _, _, k in images})
    first = next(iter(images.values()))
    factor = max(1, round(224 / max(first.size))) if max(first.size) < 224 else min(1.0, 384 / max(first.size))
    tile = round(first.width * factor), round(first.height * factor)
    font, small = ImageFont.load_default(20), ImageFont.load_default(16)
    widest = max(small.getlength(row.label) for _, row in rows)
    margin, head = 10, 34
    label = max(110, round(widest) + 2 * margin)
    heads = len({p for p, _ in rows})
    sheet = Image.new(
        "RGB",
        (max(480, label + len(columns) * (tile[0] + margin)), heads * head + len(rows) * (tile[1] + margin) + margin),
        "white",
    )
    pen, y, last = ImageDraw.Draw(sheet), margin, None
    for p, row in rows:
        if p != last:
            text = one_line(prompts[p], 400)
            while pen.textlength(text, font=font) > sheet.width - 2 * margin:
                text = text.rstrip("…")[:-3].rstrip() + "…"
            pen.text((margin, y), text, fill="black", font=font)
            y, last = y + head, p
        pen.text((margin, y + tile[1] // 2 - 10), row.label, fill="#444", font=small)
        for c, k in enumerate(columns):
            resample = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
            sheet.paste(images[p, row, k].resize(tile, resample), (label + c * (tile[0] + margin), y))
        y += tile[1] + margin
    return sheet


# ---- files -----------------------------------------------------------------------------------------------------------


def run_folder(settings) -> Path:
    """A new folder for this run: date, time and a hash of the settings."""
    digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:6]
    folder = Path(settings.paths.infer_path) / f"{time.strftime('%Y%m%d-%H%M%S')}-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"paths.infer_path: {folder} can't be made: {error.strerror}") from None
    return folder


def as_png(image, about: dict[str, object] | None = None) -> bytes:
    """An image as the bytes of a PNG file, with `about` in its text."""
    from PIL.PngImagePlugin import PngInfo

    text, stream = PngInfo(), io.BytesIO()
    for key, value in (about or {}).items():
        text.add_text(key, str(value))
    image.save(stream, "PNG", pnginfo=text)
    return stream.getvalue()


def write(file: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all. Errors: UserError, such as for a full disk."""
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_bytes(content)
        for wait in (0.1, 0.3, 1, 3):
            with contextlib.suppress(PermissionError):  # on Windows another program may hold the file for a moment
                part.replace(file)
                return
            time.sleep(wait)
        part.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(f"paths.infer_path: {file} can't be written: {error.strerror}") from None


if __name__ == "__main__":
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):  # the last, Ctrl-Break, is Windows' own
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), end_at_once)
    # what was printed must not be lost when it ends at once, nor end a run where the console can't show it (cp1252)
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    sys.exit(main())
