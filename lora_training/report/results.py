"""What a finished run leaves beside its weights: comparison image, verdict, model card, merged base.

And the upload of all of it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.adapter_names import LORA_TYPES
from lora_training.console import print_status
from lora_training.errors import UserError, one_line
from lora_training.files import output_name, staging_folder
from lora_training.report.model_card import model_card
from lora_training.training.output_folder import ADAPTER_FOLDER
from lora_training.training.weights import DIFFUSERS_FILE, save_merged
from lora_training.validation.comparison import comparison_image
from lora_training.validation.verdicts import make_verdict

if TYPE_CHECKING:
    import argparse

    from lora_training.training.run import Run


def save_results(run: Run) -> None:
    """Writes what follows the weights: comparison image, verdict, model card.

    With --keep_best the weights become those of the step that the verdict advises; --copy_to_adapter copies
    them; --merge_lora writes the merged base.
    """
    output = Path(run.args.output_dir)
    advice = make_verdict(run) if run.probe else None
    with staging_folder(output, "results") as part:
        if run.args.keep_best and advice and advice["step"] != run.max_steps:
            copy_advised_weights(run, advice["step"], part)
        has_comparison = save_comparison(run, part)
        if advice:
            (part / "verdict.json").write_text(json.dumps(advice, indent=1), encoding="utf-8")
        (part / "README.md").write_text(model_card(run, has_comparison, advice), encoding="utf-8")
    if run.args.copy_to_adapter:
        with staging_folder(output / ADAPTER_FOLDER, "LoRA") as part:
            shutil.copy(output / DIFFUSERS_FILE, part / DIFFUSERS_FILE)
    if run.args.merge_lora:
        save_merged(run, output / "merged")
    else:
        print_loading_note(run)


def copy_advised_weights(run: Run, step: int, folder: Path) -> None:
    """--keep_best: copies the weights of the advised step's checkpoint to a folder, if it is still there."""
    checkpoint = Path(run.args.output_dir, f"checkpoint-{step}")
    for file in checkpoint.glob("*.safetensors"):
        shutil.copy(file, folder / file.name)
    if checkpoint.is_dir():
        print_status(f"the result is that of step {step}; the last's is in checkpoint-{run.max_steps}")
    else:
        reason = f"{checkpoint.name} is gone by --checkpoints_total_limit"
        print_status(f"warning: --keep_best: {reason}: the result is the last's")


def save_comparison(run: Run, folder: Path) -> bool:
    """Writes comparison.png, if the run has drawn what it shows. Returns whether it did."""
    try:
        image = comparison_image(run)
        if image is None:
            return False
        image.save(folder / "comparison.png")
    except Exception as error:  # a picture is damaged
        print_status(f"warning: comparison.png could not be made: {one_line(error)}")
        return False
    return True


def print_loading_note(run: Run) -> None:
    """Says which tools load an adapter that not every tool does."""
    args = run.args
    if args.lora_type != "lora" and run.lora_modules:
        kind = LORA_TYPES[args.lora_type]
        print_status(f"note: {kind}: diffusers' pipelines don't load it; infer_lora.py draws with it")
    elif args.use_dora:
        resize = (
            f"python scripts/lora/resize_lora.py {args.output_dir} plain.safetensors --to kohya --rank 64"
            f" --base {args.pretrained_model_name_or_path}"
        )
        print_status(
            "note: DoRA: diffusers draws it as trained, ComfyUI nearly, AUTOMATIC1111 and kohya's scripts do"
            f" not; as a plain LoRA: {resize}; the whole model: --merge_lora"
        )


def push_to_hub(args: argparse.Namespace) -> None:
    """Uploads what others need of the output folder: weights, model card and pictures.

    Errors: UserError for whatever goes wrong; the results are on the disk by then.
    """
    from huggingface_hub import create_repo, upload_folder

    name = args.hub_model_id or output_name(args.output_dir)
    try:
        upload_folder(
            repo_id=create_repo(name, exist_ok=True, token=args.hub_token).repo_id,
            folder_path=args.output_dir,
            token=args.hub_token,
            allow_patterns=["*.safetensors", "README.md", "comparison.png", "samples/*"],
            ignore_patterns=[
                "*/*.safetensors"
            ],  # of checkpoints, caches, merged/: a star matches folders too
        )
    except Exception as error:  # the hub's client raises a dozen kinds
        where = f"the results are in {args.output_dir}"
        raise UserError(f"--push_to_hub failed ({one_line(error)}); {where}") from None
