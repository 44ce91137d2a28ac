"""The trainings that are drawn with: their settings as defaults of a drawing, their base and new tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from lora_training.console import print_status
from lora_training.errors import UserError
from lora_training.families import FAMILIES, UNET_SCHEDULER_SETTINGS, UNET_TEXT_SETTINGS
from lora_training.inference.settings import list_adapters
from lora_training.inference.training_files import (
    adapter_files,
    family_of_lora,
    path_exists,
    read_header,
    read_training,
    select_checkpoints,
)

# {key of a drawing's settings: flag of a training}
TRAINING_FLAGS = {
    "paths.pretrained_vae_model_name_or_path": "pretrained_vae_model_name_or_path",
    "num_inference_steps": "validation_inference_steps",
    "guidance_scale": "validation_guidance_scale",
    "max_sequence_length": "max_sequence_length",
    "max_token_length": "max_token_length",
    "clip_skip": "clip_skip",
    "prompt_weighting": "prompt_weighting",
    "prediction_type": "prediction_type",
    "rescale_betas_zero_snr": "rescale_betas_zero_snr",
    "seed": "seed",
}
UNET_KEYS = UNET_TEXT_SETTINGS + UNET_SCHEDULER_SETTINGS  # which families with a transformer don't have


@dataclass
class Training:
    """A LoRA with what its training says of itself."""

    path: str
    weight: float
    lora: Path | None
    embeddings: Path | None
    about: dict[str, object]  # of `read_training`
    family: str | None
    checkpoint: str = ""  # "step 10" or "the result", where several of one training are drawn
    first_token: int = 0  # the number of its first new token
    token_count: int = 0
    abstractions: dict[str, list[str]] = field(default_factory=dict)  # {"TOK": ["<s0>", "<s1>"]}

    @property
    def triggers(self) -> list[str]:
        """Its trigger word, if it names one."""
        trigger = self.about.get("trigger_word") or self.about.get("modelspec.trigger_phrase")
        return [str(trigger)] if trigger else []


def settings_of_training(path: str, explicit: dict[str, object], root: Path) -> dict[str, object]:
    """A training's settings by the keys of a drawing's, as defaults for those that are not in `explicit`.

    root: the project's folder, in which a base may lie. Errors: UserError if there's no prompt or no base.
    """
    lora, embeddings = adapter_files(path)
    about = read_training(path)
    family = family_of_lora(lora, about)
    values = {key: about.get(flag) for key, flag in TRAINING_FLAGS.items()}
    values = {key: value for key, value in values.items() if value is not None and value is not False}
    if family and FAMILIES[family].denoiser != "unet":
        values = {key: value for key, value in values.items() if key not in UNET_KEYS}
    size = about.get("resolution") or re.findall(r"\d+", str(about.get("modelspec.resolution", "")))
    if size:
        width, height, *_ = (size if isinstance(size, list) else [size]) * 2
        values |= {"resolution.width": width, "resolution.height": height}
    if "paths.base_model_path" not in explicit:
        values["paths.base_model_path"] = find_base(path, about, family, root)
    if "prompt" not in explicit:
        values["prompt"] = find_prompt(path, about, has_tokens=embeddings is not None)
    return values


def find_prompt(path: str, about: dict[str, object], has_tokens: bool):
    """The prompt that a training was validated with, else one that calls it. Errors: UserError if none."""
    keys = ("validation_prompt", "instance_prompt", "trigger_word", "modelspec.trigger_phrase")
    words = abstraction_words(about) if has_tokens else []
    prompt = next((p for p in (*(about.get(key) for key in keys), *words) if p), None)
    if prompt is None:
        raise UserError(f'{path} says no prompt: --prompt "…" does')
    return prompt


def abstraction_words(about: dict[str, object]) -> list[str]:
    """The words that stand for new tokens in prompts."""
    words = str(about.get("token_abstraction") or "TOK").split(",")
    return [word.strip() for word in words if word.strip()] or ["TOK"]


def find_base(path: str, about: dict[str, object], family: str | None, root: Path) -> str:
    """The base that a training names, else the one that its family's LoRAs are usually trained on.

    root: the project's folder, in which it may lie. Errors: UserError if neither is known.
    """
    name = about.get("pretrained_model_name_or_path") or about.get("ss_base_model")
    if name:
        name = str(name)
        for place in (Path(name), root / name, root / "assets" / name):
            if path_exists(str(place)):
                return str(place)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "output/", "assets/")):
            return name
    if family is None or "pretrained_model_name_or_path" in about and name:
        reason = f"its base {name} is not there" if name else "it doesn't say its base"
        raise UserError(f"{path}: {reason}; --paths.base_model_path BASE does")
    usual, title = FAMILIES[family].usual_base, FAMILIES[family].title
    print_status(f"base: {usual}, the usual one of {title}; --paths.base_model_path names another")
    return usual


def read_trainings(settings) -> list[Training]:
    """Every LoRA that will be drawn with, the headers of its files read, its new tokens numbered.

    Tokens of several LoRAs are numbered through; those of checkpoints, which are drawn one after the other,
    replace each other. Errors: UserError.
    """
    adapters = [("", path, weight) for path, weight in list_adapters(settings)]
    if settings.checkpoints:
        ((_, path, weight),) = adapters
        folders = select_checkpoints(path, settings.checkpoints)
        adapters = [(label, str(folder), weight) for label, folder in folders.items()]
    trainings, first_token, taken_words = [], 0, set()
    for label, path, weight in adapters:
        training = read_one_training(path, weight, label, first_token)
        for word in taken_words:
            training.abstractions.pop(word, None)
        if not settings.checkpoints:
            first_token += training.token_count
            taken_words |= training.abstractions.keys()
        trainings.append(training)
    return trainings


def read_one_training(path: str, weight: float, label: str, first_token: int) -> Training:
    """A LoRA with its training; each of its words for new tokens has its share of them. Errors: UserError."""
    lora, embeddings = adapter_files(path)
    about = read_training(path)
    family = family_of_lora(lora, about)
    training = Training(path, weight, lora, embeddings, about, family, label, first_token)
    if embeddings:
        training.token_count = count_tokens(embeddings)
        tokens = [f"<s{first_token + i}>" for i in range(training.token_count)]
        words = abstraction_words(about)
        each = training.token_count // len(words) or 1
        training.abstractions = {w: tokens[i * each : (i + 1) * each] for i, w in enumerate(words)}
    return training


def count_tokens(embeddings: Path) -> int:
    """How many new tokens an embeddings file has. Errors: UserError if its tables don't agree on that."""
    shapes = list(read_header(embeddings)[1].values())
    if any(len(shape) != 2 or shape[0] != shapes[0][0] or not shape[0] for shape in shapes):
        raise UserError(f"{embeddings}: expected tables with a row for each new token, found {shapes}")
    return shapes[0][0]
