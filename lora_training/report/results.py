"""What a finished run leaves: model card, comparison image, verdict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.adapter_names import LORA_TYPES
from lora_training.console import print_status
from lora_training.errors import UserError, one_line
from lora_training.files import staging_folder
from lora_training.training.weights import save_merged
from lora_training.validation.comparison import comparison_image
from lora_training.validation.verdicts import verdict

if TYPE_CHECKING:
    import argparse

    from lora_training.families import Family
    from lora_training.training.run import Run


def save_results(run: Run) -> None:
    """Writes what follows the weights: verdict, with --keep_best the weights it advises, sheet, model card,
    merged base.
    """
    args, output, advice, sheet = (
        run.args,
        Path(run.args.output_dir),
        verdict(run) if run.probe else None,
        None,
    )
    with staging_folder(output, "results") as part:
        if args.keep_best and advice and advice["step"] != run.max_steps:
            best = output / f"checkpoint-{advice['step']}"
            for file in best.glob("*.safetensors"):
                shutil.copy(file, part / file.name)
            kept = f"the result is that of step {advice['step']}; the last's is in checkpoint-{run.max_steps}"
            gone = f"warning: --keep_best: {best.name} is gone by --checkpoints_total_limit: the result is the last's"
            print_status(kept if best.is_dir() else gone)
        try:
            if sheet := comparison_image(run):
                sheet.save(part / "comparison.png")
        except Exception as error:  # a picture is damaged
            print_status(f"warning: comparison.png could not be made: {one_line(error)}")
        if advice:
            (part / "verdict.json").write_text(json.dumps(advice, indent=1), encoding="utf-8")
        (part / "README.md").write_text(model_card(run, sheet is not None, advice), encoding="utf-8")
    if args.merge_lora:
        save_merged(run, output / "merged")
    elif args.lora_type != "lora" and run.lora_modules:
        print_status(
            f"note: {LORA_TYPES[args.lora_type]}: diffusers' pipelines don't load it; infer_lora.py draws with it"
        )
    elif args.use_dora:
        print_status(
            "note: DoRA: diffusers draws it as trained, ComfyUI nearly, AUTOMATIC1111 and kohya's scripts do not; as a plain LoRA:"
            f" python scripts/lora/resize_lora.py {output} plain.safetensors --to kohya --rank 64 --base"
            f" {args.pretrained_model_name_or_path}; the whole model: --merge_lora"
        )


def model_card(run: Run, pictures: bool, advice: dict | None) -> str:
    """README.md of the output folder: what was trained, on what, how to use it."""
    from huggingface_hub import ModelCardData

    args, name = run.args, Path(run.args.output_dir).resolve().name
    words = [*args.triggers, *("".join(tokens) for tokens in run.abstractions.values())]
    words = ", ".join(f"`{word}`" for word in words if word)
    use = ["import torch", f"from diffusers import {args.family.pipeline_class}"]
    use += ["from safetensors.torch import load_file"] if run.rows else []
    use.append(
        f"pipeline = {args.family.pipeline_class}.from_pretrained({args.pretrained_model_name_or_path!r})"
    )
    if run.lora_modules and args.lora_type == "lora":
        use.append(f"pipeline.load_lora_weights({name!r}, weight_name='pytorch_lora_weights.safetensors')")
    elif run.lora_modules:
        use.append(
            f"# no pipeline loads a {LORA_TYPES[args.lora_type]}: python infer_lora.py {name}; or scripts/lora/merge_lora.py"
        )
    for key, row in run.rows.items():
        use += embedding_lines(
            run.family, key, row.tokens, f"load_file('{name}/{name}_emb.safetensors')[{key!r}]"
        )
    tags = [
        "text-to-image",
        "diffusers-training",
        "lora" if run.lora_modules else "textual_inversion",
        *args.family.hub_tags,
    ]
    about = {"base_model": str(args.pretrained_model_name_or_path), "instance_prompt": args.instance_prompt}
    card = ModelCardData(library_name="diffusers", license="other", inference=True, tags=tags, **about)
    paragraphs = [
        f"---\n{card.to_yaml()}\n---",
        f"# {args.run_name or name}",
        f"{LORA_TYPES[args.lora_type] if run.lora_modules else 'Token embeddings'} for {args.family.title}, base `{args.pretrained_model_name_or_path}`.",
        "![before and after](comparison.png)" if pictures else "",
        "\n".join(f"- {line}" for line in (advice["text"], *advice["warnings"])) if advice else "",
        f"Words that call it: {words}" if words else "",
        "\n".join(["```python", *use, "```"]),
        f"Trained on {len(run.plan.buckets)} images for {run.max_steps} steps, batch"
        f" {args.train_batch_size} x {run.accelerator.num_processes} x {args.gradient_accumulation_steps}, {args.optimizer},"
        f" learning rate {args.learning_rate:g}, rank {args.rank}, alpha {args.lora_alpha:g}, seed {args.seed}.",
    ]
    return "\n\n".join(p for p in paragraphs if p) + "\n"


def embedding_lines(family: Family, key: str, tokens: list[str], rows: str) -> list[str]:
    """Python lines that give a pipeline the new tokens of one encoder; `rows`: the expression that loads
    them.
    """
    tokenizer, encoder = (f"pipeline.{name}" for name in family.text_encoders[key])
    if family.loads_embeddings:
        places = f"text_encoder={encoder}, tokenizer={tokenizer}"
        return [f"pipeline.load_textual_inversion({rows}, token={tokens!r}, {places})"]
    return [
        f"{tokenizer}.add_tokens({tokens!r})",
        f"{encoder}.resize_token_embeddings(len({tokenizer}))",
        f"{encoder}.get_input_embeddings().weight.data[{tokenizer}.convert_tokens_to_ids({tokens!r})] = {rows}",
    ]


def push_to_hub(args: argparse.Namespace) -> None:
    """Uploads what others need of the output folder: weights, model card and drawn pictures."""
    from huggingface_hub import create_repo, upload_folder

    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        repo = create_repo(name, exist_ok=True, token=args.hub_token).repo_id
        public = ["*.safetensors", "README.md", "comparison.png", "samples/*"]
        hidden = ["*/*.safetensors"]  # of checkpoints, caches, merged/: a star matches folders too
        place = {"repo_id": repo, "folder_path": args.output_dir, "token": args.hub_token}
        upload_folder(**place, allow_patterns=public, ignore_patterns=hidden)
    except Exception as error:  # whatever the hub's client raises, the results are already on the disk
        raise UserError(
            f"--push_to_hub failed ({one_line(error)}); the results are in {args.output_dir}"
        ) from None
