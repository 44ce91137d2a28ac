"""The settings of a drawing: each key with its type, default and help, in the sections of --help.

Flags and files of them are read by `lora_training.settings`; whether they fit together, `checks` says.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, WrapValidator

from lora_training.settings import SettingsModel


def expected(what: str) -> WrapValidator:
    """One error for a type of several possibilities, of which pydantic's messages name each."""

    def check(value, validate):
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(f"expected {what}") from None

    return WrapValidator(check)


def refuse_switch(value):
    """Python's true and false are numbers, too."""
    if isinstance(value, bool):
        raise ValueError("input should be a number")
    return value


Number = Annotated[float, BeforeValidator(refuse_switch), Field(allow_inf_nan=False)]
Integer = Annotated[int, BeforeValidator(refuse_switch)]
Count = Annotated[Integer, Field(ge=1, le=10**5)]
Pixels = Annotated[Integer, Field(ge=8, le=2**14)]
Layers = Annotated[Integer, Field(ge=0, le=100)]
Seed = Annotated[Integer, Field(ge=-(2**62), le=2**62)]
Amount = Annotated[Number, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
EmptyIsNone = BeforeValidator(lambda value: None if value == "" else value)
OptionalText = Annotated[str | None, EmptyIsNone]
Texts = Annotated[str | Annotated[list[str], Field(min_length=1)], expected("a text or a list of texts")]
Numbers = Annotated[
    Number | Annotated[list[Number], Field(min_length=1)], expected("a finite number or a list of them")
]
Checkpoints = Annotated[
    Literal["all"] | Count | Annotated[list[Count], Field(min_length=1)],
    expected("all, or numbers of checkpoints from 1 on"),
]


PathText = Annotated[str, AfterValidator(os.path.expanduser)]


class Adapter(SettingsModel):
    """A LoRA and its strength."""

    path: PathText
    weight: Number = 1.0


Loras = Annotated[
    PathText | list[PathText | Adapter], expected("a path, or a list of paths or {path: …, weight: 0.8}")
]


class Paths(SettingsModel):
    """Where things are."""

    base_model_path: Annotated[PathText, Field(min_length=1)] = Field(
        description="hub id, diffusers folder, or .safetensors/.ckpt file (the training's)"
    )
    lora_weights_path: Loras | None = Field(
        None, description="a training's folder or LoRA file, or [{path: ..., weight: 0.8}, ...]"
    )
    pretrained_vae_model_name_or_path: Annotated[PathText | None, EmptyIsNone] = Field(
        None, description="another VAE"
    )
    infer_path: Annotated[PathText, Field(min_length=1)] = Field(
        "output/infer", description="each run makes a folder of its own in here"
    )


class Resolution(SettingsModel):
    """Pixels."""

    width: Pixels | None = Field(None, description="pixels (null: the base's own)")
    height: Pixels | None = Field(None, description="pixels (null: the base's own)")


class Files(SettingsModel):
    """files"""

    paths: Paths
    checkpoints: Checkpoints | None = Field(
        None, description="all, or numbers: a grid over the checkpoints of the training's folder"
    )


class Pictures(SettingsModel):
    """pictures"""

    prompt: Texts = Field(description="one or several (the training's)")
    negative_prompt: Texts | None = Field(None, description="one, or one per prompt")
    adapter_scale: Numbers = Field(1.0, description="strength of the LoRA; several draw every prompt at each")
    compare_base: bool = Field(False, description="also without the LoRA, with the same seeds")
    resolution: Resolution = Field(default_factory=Resolution)
    num_generations: Count = Field(1, description="images per prompt and scale, each with its own seed, ...")
    num_images_per_prompt: Count = Field(1, description="... times this")
    seed: Seed | None = Field(None, description="image k has seed + k; null draws one and prints it")
    grid: bool = Field(True, description="grid.png: prompts x scales or checkpoints x seeds")


class Sampling(SettingsModel):
    """sampling"""

    num_inference_steps: Count | None = Field(None, description="(null: the pipeline's usual number)")
    guidance_scale: Amount | None = Field(None, description="(null: the pipeline's usual)")
    true_cfg_scale: Amount | None = Field(
        None, description="FLUX.1: above 1, negative prompts work, at twice the time"
    )
    max_sequence_length: Count | None = Field(None, description="T5 tokens (SD3, FLUX.1); as in training")
    clip_skip: Layers | None = Field(
        None, description="SD 1.x/2.x, SDXL: text layers skipped, as in training (null or 0: none)"
    )
    max_token_length: Count | None = Field(
        None, description="75, 150 or 225; SD 1.x/2.x, SDXL: tokens of a prompt that are read, as in training"
    )
    prompt_weighting: bool | None = Field(
        None,
        description="SD 1.x/2.x, SDXL: (word:1.3), [word] and BREAK as in the WebUIs, and no end of a prompt"
        " is cut (null: as in training)",
    )
    scheduler: OptionalText = Field(None, description="such as EulerDiscreteScheduler (null: the base's own)")
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = Field(
        None, description="as in training (null: the base's own)"
    )
    rescale_betas_zero_snr: bool | None = Field(
        None, description="zero terminal SNR, as in training (null: the base's own)"
    )


class Machine(SettingsModel):
    """machine"""

    batch_size: Count = Field(
        4, description="images drawn at a time: lower it if the memory does not suffice"
    )
    fuse: bool = Field(False, description="bake the LoRA into the base before drawing: a little faster")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="bfloat16 where the GPU computes in it, else float32"
    )
    device: Literal["auto", "cuda", "mps", "xpu", "cpu"] = Field(
        "auto", description="AMD's GPUs (ROCm) are cuda too"
    )
    offload: Literal["none", "model", "sequential"] = Field(
        "none", description="to the CPU: a part at a time, or each layer (slow)"
    )
    quantize: Literal["none", "nf4", "int8"] = Field("none", description="the denoiser in 4 or 8 bits (GPU)")
    compile: bool = Field(
        False, description="torch.compile of the repeated blocks: slow first image, then faster"
    )


class Settings(Machine, Sampling, Pictures, Files):  # of the last one, the fields stand first
    """All settings of a drawing."""


def list_adapters(settings: Settings) -> list[tuple[str, float]]:
    """(path, weight) of each LoRA."""
    value = settings.paths.lora_weights_path
    entries = value if isinstance(value, list) else [value] if value else []
    return [(e, 1.0) if isinstance(e, str) else (e.path, e.weight) for e in entries]


def list_prompts(settings: Settings) -> list[str]:
    """The prompts as a list."""
    return settings.prompt if isinstance(settings.prompt, list) else [settings.prompt]
