"""Turns a single-file checkpoint into a diffusers folder, once, without network.

    python scripts/bases/unpack_checkpoint.py downloaded.safetensors bases/downloaded
    python scripts/bases/unpack_checkpoint.py flux1-dev.safetensors bases/flux --layout FLUX_FOLDER

The training scripts take the folder with -m, infer_lora.py as base_model_path. A checkpoint has neither configurations
nor tokenizers: for SD 1.5 and SDXL the former are known here, and CLIP's vocabulary is a data file of the package
open_clip_torch (pip install --no-deps open_clip_torch). SD3 and FLUX.1 need --layout: a diffusers folder of that model,
whose weights (text encoders, VAE) stand in for what the checkpoint lacks. Pickled code in a .ckpt is never run. Weights
keep their precision.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.parts.base_family import CLASSES, detect, tensors_of
from scripts.parts.files import replace
from scripts.parts.netted import netted
from scripts.parts.training_scripts import load_script

PIPELINES = {family: kind for kind, family in CLASSES.items()}


class UnpackError(Exception):
    """Why a checkpoint can't be unpacked, in one line."""


def precision_of(checkpoint: Path):
    """The half precision that all matrices of a checkpoint have, bfloat16 for 8-bit floats; float32 if they differ."""
    import torch

    found = {dtype for dtype, dimensions in tensors_of(checkpoint).values() if dimensions > 1}
    halves = {"F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.bfloat16, "F8_E5M2": torch.bfloat16}
    kinds = {halves.get(dtype, torch.float32) for dtype in found}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def unpack(checkpoint: Path, folder: Path, family: str, layout: Path | None) -> None:
    """Writes the diffusers folder of a checkpoint; it appears only when it is whole.

    layout: a diffusers folder of the family; None: the released model's, made here. Errors: UnpackError.
    """
    import diffusers
    import torch

    from scripts.parts.clip_vocabulary import clip_tokenizer
    from scripts.parts.released_models import OTHER_PARTS, write_layout

    with tempfile.TemporaryDirectory() as work:
        given = {}
        if layout is not None:
            given = load_script(family).parts_with_weights(layout)
        elif family not in OTHER_PARTS:
            raise UnpackError(f"{checkpoint} is {family}: its tokenizers are in no package; give --layout FOLDER")
        else:
            tokenizer = clip_tokenizer()
            if tokenizer is None:
                raise UnpackError(
                    "CLIP's vocabulary is needed: pip install --no-deps open_clip_torch (only its data file is read), or"
                    " give --layout FOLDER"
                )
            write_layout(family, Path(work), tokenizer)
        options = {"config": str(layout or work), "local_files_only": True, "dtype": precision_of(checkpoint)}
        try:
            pipeline = getattr(diffusers, PIPELINES[family]).from_single_file(str(checkpoint), **options, **given)
        except Exception as error:  # conversion fails in many ways, all of them the file's or the layout's
            reason = " ".join(str(error).split())[:200]
            raise UnpackError(f"{checkpoint}: can't be read as {family} ({reason})") from None
    for name, module in pipeline.components.items():
        for key, value in module.state_dict().items() if isinstance(module, torch.nn.Module) else ():
            if not torch.isfinite(value).all():
                raise UnpackError(f"{checkpoint}: {key} of its {name} holds NaN or infinity: it is damaged")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        pipeline.save_pretrained(part)
        if folder.is_dir():
            folder.rmdir()  # an empty one
        replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def checked(args: argparse.Namespace) -> str:
    """The checkpoint's family. Errors: UnpackError for what the arguments have wrong."""
    file, folder, layout = args.checkpoint, args.folder, args.layout
    if not file.is_file():
        raise UnpackError(f"{file}: no such file")
    if file.suffix not in (".safetensors", ".ckpt"):
        raise UnpackError(f"{file}: only .safetensors and .ckpt files are read")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UnpackError(f"{folder} is there already and not an empty folder: name another one")
    try:
        found = detect(str(file))
    except Exception as error:  # a checkpoint that holds more than tensors, or is none: many kinds
        raise UnpackError(f"{file}: not a checkpoint of tensors alone ({' '.join(str(error).split())[:200]})") from None
    kinds = {dtype for dtype, dimensions in tensors_of(file).values() if dimensions > 1}
    if whole := sorted(kind for kind in kinds if not kind.removeprefix("torch.").lower().startswith(("f", "bf"))):
        raise UnpackError(f"{file}: its weights are {whole[0]}, as of a quantised model, which is not read")
    family = found if args.family == "auto" else args.family
    if family is None:
        raise UnpackError(f"{file}: not a base of Stable Diffusion 1.x/2.x, SDXL, SD3 or FLUX.1; --family names it")
    if layout is not None and not (layout / "model_index.json").is_file():
        raise UnpackError(f"--layout {layout}: not a diffusers folder: no model_index.json in it")
    try:
        of_layout = detect(str(layout)) if layout is not None else family
    except (ValueError, OSError) as error:
        raise UnpackError(f"--layout {layout}: {error}") from None
    if of_layout != family:
        raise UnpackError(f"--layout {layout}: not a diffusers folder of {family}, which {file} is")
    return family


@netted
def main(argv: list[str] | None = None) -> int:
    """Runs the program; what a person can mend ends as one line. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Turns a single-file checkpoint into a diffusers folder.")
    parser.add_argument("checkpoint", type=Path, help="a .safetensors or .ckpt file")
    parser.add_argument("folder", type=Path, help="the folder to write; must not be there, or be empty")
    parser.add_argument(
        "--family", choices=["auto", *PIPELINES], default="auto", help="auto: by the file's keys (auto)"
    )
    parser.add_argument("--layout", type=Path, metavar="FOLDER", help="a diffusers folder of the same model")
    args = parser.parse_args(argv)
    try:
        family = checked(args)
        unpack(args.checkpoint, args.folder, family, args.layout)
    except (UnpackError, ValueError, OSError) as error:
        print(f"unpack_checkpoint.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.folder}: {family}, from {args.checkpoint}; take it with -m {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
