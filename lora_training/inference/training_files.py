"""What a training left: its LoRA, embeddings and checkpoints, and what these files say of it."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from lora_training.console import print_status
from lora_training.errors import UserError, one_line
from lora_training.files import list_checkpoints, read_safetensors_header

LORA_FILE = "pytorch_lora_weights.safetensors"


def adapter_files(path: str) -> tuple[Path | None, Path | None]:
    """(LoRA file, embeddings file) of a folder or of one file. Errors: UserError without either."""
    place = Path(path)
    if not path_exists(path):
        advice = "train one first: bash run_lora_train.sh"
        raise UserError(f"paths.lora_weights_path: no such file or folder: {one_line(path)}; {advice}")
    if place.is_dir():
        lora, embeddings = place / LORA_FILE, find_embeddings(place, place.resolve().name)
        if not lora.is_file() and not embeddings:
            advice = "; a checkpoint's folder has one" if list_checkpoints(place) else ""
            raise UserError(f"paths.lora_weights_path: no {LORA_FILE} or *_emb.safetensors in {path}{advice}")
        return lora if lora.is_file() else None, embeddings
    if place.suffix != ".safetensors":
        reason = "only .safetensors files are read; others can run code when they are opened"
        raise UserError(f"paths.lora_weights_path: {path}: {reason}")
    if place.name.endswith("_emb.safetensors"):
        return None, place
    return place, find_embeddings(place.parent, place.stem)


def path_exists(path: str) -> bool:
    """Whether there is such a file or folder; a name that no file can have has none."""
    try:
        return Path(path).exists()
    except OSError:  # a name that is too long
        return False


def find_embeddings(folder: Path, name: str) -> Path | None:
    """The embeddings file in a folder: NAME_emb.safetensors, else the first of other names."""
    files = folder.glob("*_emb.safetensors")
    return min(files, key=lambda file: (file.name != f"{name}_emb.safetensors", file.name), default=None)


def select_checkpoints(path: str, selection: str | int | list[int]) -> dict[str, Path]:
    """{label: folder} of checkpoints of a training's folder, in the order in which they are drawn.

    selection: steps, or "all"; then also the training's result where it is not one of them.
    Errors: UserError.
    """
    folders = {int(p.name.removeprefix("checkpoint-")): p for p in reversed(list_checkpoints(Path(path)))}
    if not folders:
        raise UserError(f"checkpoints: no checkpoint-N in {path}")
    if selection != "all":
        steps = selection if isinstance(selection, list) else [selection]
        for step in steps:
            if step not in folders:
                known = ", ".join(map(str, folders))
                raise UserError(f"checkpoints: no checkpoint-{step} in {path}; there are {known}")
        return {f"step {step}": folders[step] for step in dict.fromkeys(steps)}
    selected = {f"step {step}": folder for step, folder in folders.items()}
    about = read_training(path)
    last_step = about.get("max_train_steps")
    if last_step == "auto":  # the number stands in the LoRA's metadata
        last_step = about.get("ss_max_train_steps")
    if (Path(path) / LORA_FILE).is_file() and str(last_step) not in map(str, folders):
        selected["the result"] = Path(path)
    return selected


def read_header(file: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """(metadata, {key: shape}) of a .safetensors file, its tensors unread. Errors: UserError if damaged."""
    from safetensors import SafetensorError

    try:
        metadata, tensors = read_safetensors_header(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file, or damaged ({one_line(error, 100)})") from None
    if not tensors:
        raise UserError(f"{file}: holds no tensors")
    return metadata, {key: shape for key, (_, shape) in tensors.items()}


def read_training(path: str) -> dict[str, object]:
    """What a training says of itself, by its flags' names.

    That is its config.yaml, else its model card and the LoRA file's metadata.
    """
    import yaml

    # any text may stand in these files
    unreadable = (OSError, ValueError, IndexError, AttributeError, RecursionError, yaml.YAMLError)
    place = Path(path)
    folder = (place if place.is_dir() else place.parent).resolve()
    about: dict[str, object] = {}
    for file in sorted(folder.glob("*.safetensors")) if place.is_dir() else [place]:
        with contextlib.suppress(UserError):  # the one that is drawn with is checked later
            about |= read_header(file)[0]
    if re.fullmatch(r"checkpoint-\d+", folder.name):
        folder = folder.parent
    with contextlib.suppress(*unreadable):
        card = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])
        about["pretrained_model_name_or_path"] = card.get("base_model")
        about["instance_prompt"] = card.get("instance_prompt")
    file = folder / "config.yaml"
    if file.is_file():
        with contextlib.suppress(*unreadable):
            config = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
            if isinstance(config, dict) and "pretrained_model_name_or_path" in config:
                return about | config
        print_status(
            f"note: {file} is not a training's configuration: the LoRA's own files say what they can"
        )
    return about


def family_of_lora(file: Path | None, about: dict[str, object]) -> str | None:
    """The family that a LoRA file says it is for, or that its layers' names are of; None if neither tells.

    about: of `read_training`.
    """
    architecture = str(about.get("modelspec.architecture", "")).lower()
    layers = "\n".join(read_header(file)[1]) if file else ""
    signs = {  # (in the architecture's name, in the layers' names); the first family that has one
        "flux": (("flux",), ("double_blocks", "single_transformer_blocks")),
        "sd3": (("diffusion-v3", "diffusion-3"), ("joint_blocks",)),
        "sdxl": (("-xl",), ("lora_te2_", "unet_input_blocks")),
        "sd15": (("diffusion-v1", "diffusion-v2"), ()),
    }
    for family, (architectures, layer_names) in signs.items():
        if any(a in architecture for a in architectures) or any(name in layers for name in layer_names):
            return family
    return None
