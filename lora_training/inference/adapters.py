"""LoRA files and embeddings loaded into a pipeline, whatever trainer wrote them, or refused."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_training.base_model.family_detection import FAMILY_OF_PIPELINE
from lora_training.console import print_status
from lora_training.errors import UserError, is_out_of_memory, one_line
from lora_training.families import FLUX, SD3
from lora_training.inference.training_files import LORA_FILE, read_header
from lora_training.lora.base_layers import candidate_bases
from lora_training.lora.layer_names import split_key
from lora_training.lora.reading import read_lora
from lora_training.lora.writing import write_diffusers_lora

# Keys of files that diffusers reads right, and of LoHa or LoKr as the training scripts write them: diffusers'
# names of layers, and what a file holds of them.
DIFFUSERS_KEY = re.compile(
    r"(unet|transformer|text_encoder(_2|_3)?)\."
    r"(?!(double|single|joint|input|output)_blocks|middle_block|img_in|.*processor).*"
    r"\.(lora(\.|_linear_layer\.)(up|down)\.weight|lora_[AB]\.weight|lora_magnitude_vector(\.weight)?"
    r"|(hada|lokr)_\w+)$"
)
FACTOR_KEY = re.compile(r".*\.(hada|lokr)_\w+$")  # of LoHa or LoKr
KOHYA_UNET_KEY = re.compile(r"lora_(unet|te[12]?)_.*\.(lora_(up|down)\.weight|alpha)$")
EMBEDDING_KEYS = {"t5xxl": "t5", "emb_params": "clip_l"}  # {other tools' key: the training scripts'}


def load_adapter(pipeline, file: Path, name: str, base: str) -> None:
    """Loads a LoRA file as the adapter `name` and checks that all of it has a place.

    base: the pipeline's folder or hub id. Errors: UserError for a file that is damaged or doesn't fit.
    """
    kind, what = type(pipeline).__name__, f"paths.lora_weights_path: {file}"
    read_finite(file)
    try:
        load_lora_file(pipeline, file, name, base)
    except (ValueError, RuntimeError, KeyError, TypeError, IndexError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{what} does not fit {kind}, or is damaged: {one_line(error, 200)}") from None
    if name not in {adapter for names in pipeline.get_list_adapters().values() for adapter in names}:
        advice = "scripts/lora/inspect_lora.py says what it is for"  # diffusers only warns when no key fits
        raise UserError(f"{what}: none of its keys fits {kind}; {advice}")
    for part in pipeline.components.values():
        if not isinstance(part, torch.nn.Module):
            continue
        for parameter_name, parameter in part.named_parameters():
            if parameter.is_meta and "lora_" in parameter_name:  # diffusers leaves an empty matrix there
                raise UserError(f"{what}: damaged or cut: {parameter_name} is missing in it")


def read_finite(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file. Errors: UserError if a number in it is NaN or infinite."""
    tensors = load_file(file)
    for key, value in tensors.items():
        if not torch.isfinite(value.float()).all():
            advice = "its training diverged; take an earlier checkpoint"
            raise UserError(f"{file}: {key} holds NaN or infinity: {advice}")
    return tensors


def load_lora_file(pipeline, file: Path, name: str, base: str) -> None:
    """Loads a LoRA file as an adapter by the way that reads it right.

    Of other trainers' files diffusers reads those of kohya's scripts for Stable Diffusion and SDXL; the
    others are converted first: it takes some for other layers, and DoRA's without their magnitude. Of several
    alphas in a file it gives the commonest to all of the attention's layers.
    """
    family = FAMILY_OF_PIPELINE.get(type(pipeline).__name__)
    _, keys = read_header(file)
    has_diffusers_keys = all(DIFFUSERS_KEY.match(key) for key in keys)
    has_factors = any(FACTOR_KEY.match(key) for key in keys)
    is_kohya = family in ("sd15", "sdxl") and all(KOHYA_UNET_KEY.match(key) for key in keys)
    is_kohya = is_kohya and has_one_alpha(file)
    twin = file.with_name(LORA_FILE)  # of the same training, where `file` is its export for other tools
    if has_diffusers_keys and has_factors:
        load_factors(pipeline, file, name)
    elif has_diffusers_keys or is_kohya:
        warn_of_unknown_layers(list(keys), file, family, base)
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    elif has_factors and twin != file and twin.is_file() and file.stem == file.parent.resolve().name:
        load_lora_file(pipeline, twin, name, base)
    else:
        load_converted(pipeline, file, name, base, family)


def has_one_alpha(file: Path) -> bool:
    """Whether all layers of a file with kohya's keys have the same alpha."""
    with safe_open(file, "pt") as opened:
        keys = (key for key in opened.keys() if key.endswith(".alpha"))  # noqa: SIM118
        return len({opened.get_tensor(key).item() for key in keys}) <= 1


def warn_of_unknown_layers(keys: list[str], file: Path, family: str, base: str) -> None:
    """Says which layers of a file fit nothing in the base: diffusers leaves them out without a word.

    base: a diffusers folder, else the released models are looked at.
    """
    folder = base if (Path(base) / "model_index.json").is_file() else None
    layers = sorted({split_key(key, file)[0] for key in keys})
    unknown = min(
        (
            [layer for layer in layers if not layers_of.knows(layer)]
            for layers_of in candidate_bases(family, folder)
        ),
        key=len,
    )
    if unknown:
        which = f"{len(unknown)} of {len(layers)} layers of {file.name} fit nothing in {base}"
        print_status(f"warning: {which} and are left out, such as {unknown[0]}")


def load_converted(pipeline, file: Path, name: str, base: str, family: str | None) -> None:
    """Loads another tool's file, converted to diffusers' keys, as an adapter. Errors: UserError."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            lora = read_lora(file, family, base if (Path(base) / "model_index.json").is_file() else None)
            write_diffusers_lora(lora, Path(folder) / file.name)
        except UserError as error:
            kind = type(pipeline).__name__
            raise UserError(f"paths.lora_weights_path: it does not fit {kind}: {error}") from None
        pipeline.load_lora_weights(folder, weight_name=file.name, adapter_name=name)


def load_factors(pipeline, file: Path, name: str) -> None:
    """Loads a LoHa or LoKr of the training scripts as an adapter, by peft, as pipelines' own loader can't.

    Errors: ValueError, KeyError or RuntimeError for a file that does not fit.
    """
    import peft

    metadata, tensors = json.loads(read_header(file)[0]["lora_adapter_metadata"]), read_finite(file)
    for part in sorted({key.partition(".")[0] for key in tensors}):
        prefix, module = f"{part}.", getattr(pipeline, part)
        config = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        has_level = hasattr(module, "text_model")  # which not all classes of text encoders have
        if part.startswith("text_encoder") and not has_level:
            state = {key.removeprefix("text_model."): value for key, value in state.items()}
        module.add_adapter(peft.get_peft_config(config), name)
        result = peft.set_peft_model_state_dict(module, state, name)
        missing = [key for key in result.missing_keys if key.endswith(f".{name}")]
        for key in [*result.unexpected_keys, *missing]:
            raise ValueError(f"{key} is missing, or fits no layer")


def load_embeddings(pipeline, file: Path, first_token: int) -> None:
    """Adds a training's new tokens to the pipeline's encoders, numbered from `first_token` on.

    Tokens that are there already get its embeddings. Errors: UserError for a file that doesn't fit.
    """
    for key, table in read_finite(file).items():
        key = EMBEDDING_KEYS.get(key, key)
        tokenizer, encoder = text_encoder_parts(pipeline, key)
        if encoder is None or table.shape[1] != encoder.get_input_embeddings().embedding_dim:
            kind = type(pipeline).__name__
            raise UserError(f"{file}: {key} {tuple(table.shape)} does not fit a text encoder of {kind}")
        tokens = [f"<s{first_token + i}>" for i in range(len(table))]
        tokenizer.add_tokens(tokens)
        if len(tokenizer) > encoder.get_input_embeddings().num_embeddings:
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        rows = encoder.get_input_embeddings().weight.data  # SD3's pipeline has no loader for embeddings
        rows[tokenizer.convert_tokens_to_ids(tokens)] = table.to(rows.device, rows.dtype)
        print_status(f"{file.name}: {key} knows {''.join(tokens)}")


def text_encoder_parts(pipeline, key: str) -> tuple[object, object]:
    """(tokenizer, text encoder) that an embeddings file calls `key`; None for what the pipeline hasn't."""
    is_flux = type(pipeline).__name__.startswith("Flux")
    places = (FLUX if is_flux else SD3).text_encoders  # SD3's are those of the UNets' families, and T5
    tokenizer, encoder = places.get(key, ("", ""))
    return pipeline.components.get(tokenizer), pipeline.components.get(encoder)


def fuse_adapters(pipeline, weights: dict[str, float], scale: float) -> None:
    """Bakes LoRAs into the base, each at its own weight times `scale`."""
    pipeline.set_adapters(list(weights), list(weights.values()))
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()


def set_scale(pipeline, weights: dict[str, float], scale: float) -> None:
    """Scales every LoRA by its own weight times `scale`; at 0 the base draws alone."""
    if scale == 0:
        pipeline.disable_lora()
    else:
        pipeline.enable_lora()
        pipeline.set_adapters(list(weights), [weight * scale for weight in weights.values()])
