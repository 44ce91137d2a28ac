"""The settings of a drawing: every key with its type, default and help, and the pydantic model that checks
values.

Where values come from (command line, YAML file) is in `arguments`; whether they fit together, in `checks`.
"""

from __future__ import annotations

from lora_training.errors import UserError, one_line

REQUIRED = "the training's"  # the default of a key that a training or a person must say

# {group: {key: (kind, default, help)}}: what --help shows and what a YAML file is checked against. A kind is
# one of those in `value_types`, or the texts that are allowed.
KEYS = {
    "files": {
        "paths.base_model_path": ("text", REQUIRED, "hub id, diffusers folder, or .safetensors/.ckpt file"),
        "paths.lora_weights_path": (
            "loras",
            None,
            "a training's folder or LoRA file, or [{path: …, weight: 0.8}, …]",
        ),
        "paths.pretrained_vae_model_name_or_path": ("text", None, "another VAE"),
        "paths.infer_path": ("text", "output/infer", "each run makes a folder of its own in here"),
        "checkpoints": (
            "checkpoints",
            None,
            "all, or numbers: a grid over the checkpoints of the training's folder",
        ),
    },
    "pictures": {
        "prompt": ("texts", REQUIRED, "one or several"),
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
        "clip_skip": (
            "layers",
            None,
            "SD 1.x/2.x, SDXL: text layers skipped, as in training (null or 0: none)",
        ),
        "max_token_length": (
            "count",
            None,
            "75, 150 or 225; SD 1.x/2.x, SDXL: tokens of a prompt that are read, as in training",
        ),
        "scheduler": ("text", None, "such as EulerDiscreteScheduler (null: the base's own)"),
        "prediction_type": (
            ("epsilon", "v_prediction", "sample"),
            None,
            "as in training (null: the base's own)",
        ),
        "rescale_betas_zero_snr": (
            "switch",
            None,
            "zero terminal SNR, as in training (null: the base's own)",
        ),
    },
    "machine": {
        "batch_size": ("count", 4, "images drawn at a time: lower it if the memory does not suffice"),
        "fuse": ("switch", False, "bake the LoRA into the base before drawing: a little faster"),
        "dtype": (
            ("auto", "float32", "float16", "bfloat16"),
            "auto",
            "bfloat16 where the GPU computes in it, else float32",
        ),
        "device": (("auto", "cuda", "mps", "xpu", "cpu"), "auto", "AMD's GPUs (ROCm) are cuda too"),
        "offload": (
            ("none", "model", "sequential"),
            "none",
            "to the CPU: a part at a time, or each layer (slow)",
        ),
        "quantize": (("none", "nf4", "int8"), "none", "the denoiser in 4 or 8 bits (GPU)"),
        "compile": (
            "switch",
            False,
            "torch.compile of the repeated blocks: slow first image, then faster",
        ),
    },
}
FIELDS = {key: spec for group in KEYS.values() for key, spec in group.items()}

# what a kind takes, where pydantic's message names only one of several possibilities
EXPECTED = {
    "texts": "a text or a list of texts",
    "numbers": "a finite number or a list of them",
    "loras": "a path, or a list of paths or {path: …, weight: 0.8}",
    "checkpoints": "all, or numbers of checkpoints from 1 on",
}


def validate(values: dict[str, object], source: str, flags: dict[str, object]):
    """Values by dotted key -> the settings, with their types.

    source: where values come from that are not in `flags`, those of the command line. Errors: UserError that
    names the key or the flag.
    """
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
    where = f"--{key}" if key in flags else f"{source}: {key}"
    if problem["type"] == "missing" and key not in values:
        raise UserError(f"{where} is missing")
    message = f"expected {EXPECTED[FIELDS[key][0]]}" if FIELDS[key][0] in EXPECTED else problem["msg"]
    value = one_line(repr(values[key]), 80)
    raise UserError(f"{where}: {message[0].lower() + message[1:]}, found {value}")


def build_schema():
    """The pydantic model of the settings. A function, because pydantic takes longer to import than --help may
    take.
    """
    from typing import Literal

    from pydantic import BaseModel, ConfigDict, Field, create_model

    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid")

    types = value_types(Strict)
    groups: dict[str, dict] = {}
    for key, (kind, default, _) in FIELDS.items():
        parent, _, leaf = key.rpartition(".")
        field_type = Literal[kind] if isinstance(kind, tuple) else types[kind]
        if default == REQUIRED:
            groups.setdefault(parent, {})[leaf] = (field_type, ...)
        else:
            field_type = field_type if default is not None else field_type | None
            groups.setdefault(parent, {})[leaf] = (field_type, default)
    top_level = groups.pop("")
    models = {name: create_model(name, __base__=Strict, **fields) for name, fields in groups.items()}
    nested = {
        name: (model, ... if name == "paths" else Field(default_factory=model))
        for name, model in models.items()
    }
    return create_model("Settings", __base__=Strict, **nested, **top_level)


def value_types(strict_model) -> dict[str, object]:
    """{kind of a key: its type}. strict_model: a pydantic model that forbids keys it doesn't know."""
    from typing import Annotated, Literal

    from pydantic import BeforeValidator, Field, create_model

    def refuse_switch(value):
        if isinstance(value, bool):
            raise ValueError("input should be a number")
        return value

    number = Annotated[float, BeforeValidator(refuse_switch), Field(allow_inf_nan=False)]
    bounds = {"count": (1, 10**5), "pixels": (8, 2**14), "layers": (0, 100), "seed": (-(2**62), 2**62)}
    integers = {
        kind: Annotated[int, BeforeValidator(refuse_switch), Field(ge=low, le=high)]
        for kind, (low, high) in bounds.items()
    }
    count = integers["count"]
    adapter = create_model("Adapter", __base__=strict_model, path=(str, ...), weight=(number, 1.0))
    return integers | {
        "text": Annotated[str, Field(min_length=1)],
        "texts": str | Annotated[list[str], Field(min_length=1)],
        "loras": str | list[str | adapter],
        "numbers": number | Annotated[list[number], Field(min_length=1)],
        "amount": Annotated[number, Field(ge=0)],
        "checkpoints": Literal["all"] | count | Annotated[list[count], Field(min_length=1)],
        "switch": bool,
    }


def list_adapters(settings) -> list[tuple[str, float]]:
    """(path, weight) of each LoRA."""
    value = settings.paths.lora_weights_path
    entries = value if isinstance(value, list) else [value] if value else []
    return [(e, 1.0) if isinstance(e, str) else (e.path, e.weight) for e in entries]


def list_prompts(settings) -> list[str]:
    """The prompts as a list."""
    return settings.prompt if isinstance(settings.prompt, list) else [settings.prompt]
