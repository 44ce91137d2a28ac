"""README.md of the output folder: what was trained, on what, and how to use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_training.adapter_names import LORA_TYPES
from lora_training.files import output_name
from lora_training.lora.layer_ranks import describe_ranks
from lora_training.training.run import layers_of_other_rank

if TYPE_CHECKING:
    from lora_training.families import Family
    from lora_training.training.run import Run


def model_card(run: Run, has_comparison: bool, verdict: dict | None) -> str:
    """The model card of a finished run, with the hub's metadata at its head.

    has_comparison: whether comparison.png is there.
    """
    args = run.args
    paragraphs = [
        f"---\n{hub_metadata(run)}\n---",
        f"# {args.run_name or output_name(args.output_dir)}",
        f"{result_kind(run)} for {args.family.title}, base `{args.pretrained_model_name_or_path}`.",
        "![before and after](comparison.png)" if has_comparison else "",
        "\n".join(f"- {line}" for line in (verdict["text"], *verdict["warnings"])) if verdict else "",
        trigger_line(run),
        "\n".join(["```python", *usage_lines(run), "```"]),
        training_line(run),
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def result_kind(run: Run) -> str:
    """What was trained."""
    return LORA_TYPES[run.args.lora_type] if run.lora_modules else "Token embeddings"


def hub_metadata(run: Run) -> str:
    """The hub's description of a model, as YAML."""
    from huggingface_hub import ModelCardData

    args = run.args
    kind = "lora" if run.lora_modules else "textual_inversion"
    card = ModelCardData(
        library_name="diffusers",
        license="other",
        inference=True,
        tags=["text-to-image", "diffusers-training", kind, *args.family.hub_tags],
        base_model=str(args.pretrained_model_name_or_path),
        instance_prompt=args.instance_prompt,
    )
    return card.to_yaml()


def trigger_line(run: Run) -> str:
    """The trigger words and the new tokens, or nothing."""
    triggers = [*run.args.triggers, *("".join(tokens) for tokens in run.abstractions.values())]
    triggers = ", ".join(f"`{trigger}`" for trigger in triggers if trigger)
    return f"Words that call it: {triggers}" if triggers else ""


def training_line(run: Run) -> str:
    """How it was trained, in a sentence."""
    args = run.args
    batch = (args.train_batch_size, run.accelerator.num_processes, args.gradient_accumulation_steps)
    return (
        f"Trained on {len(run.plan.buckets)} images for {run.max_steps} steps,"
        f" batch {' x '.join(map(str, batch))}, {args.optimizer}, learning rate {args.learning_rate:g},"
        f" {describe_run_ranks(run)}, seed {args.seed}."
    )


def describe_run_ranks(run: Run) -> str:
    """Rank and alpha, or between what those of its layers lie."""
    args, ranks = run.args, {"": (run.args.rank, run.args.lora_alpha)}
    for part in run.lora_modules:
        ranks |= {f"{part}.{name}": pair for name, pair in layers_of_other_rank(run, part).items()}
    return describe_ranks(ranks) if len(ranks) > 1 else f"rank {args.rank}, alpha {args.lora_alpha:g}"


def usage_lines(run: Run) -> list[str]:
    """Python lines that load the base, the LoRA and the new tokens with diffusers."""
    args, name, pipeline = run.args, output_name(run.args.output_dir), run.args.family.pipeline_class
    lines = ["import torch", f"from diffusers import {pipeline}"]
    lines += ["from safetensors.torch import load_file"] if run.token_rows else []
    lines.append(f"pipeline = {pipeline}.from_pretrained({args.pretrained_model_name_or_path!r})")
    if run.lora_modules and args.lora_type == "lora":
        file = "pytorch_lora_weights.safetensors"
        lines.append(f"pipeline.load_lora_weights({name!r}, weight_name={file!r})")
    elif run.lora_modules:
        kind, instead = (
            LORA_TYPES[args.lora_type],
            f"python infer_lora.py {name}; or scripts/lora/merge_lora.py",
        )
        lines.append(f"# no pipeline loads a {kind}: {instead}")
    for key, row in run.token_rows.items():
        embeddings = f"load_file('{name}/{name}_emb.safetensors')[{key!r}]"
        lines += embedding_lines(run.family, key, row.tokens, embeddings)
    return lines + drawing_lines(run)


def drawing_lines(run: Run) -> list[str]:
    """Python lines that draw a picture as the training has read its prompts."""
    args, name = run.args, output_name(run.args.output_dir)
    settings = {flag: vars(args)[flag] for flag in args.family.text_settings}
    length = settings.pop("max_sequence_length", None)
    changed = [f"{flag} {value}" for flag, value in settings.items() if value != args.defaults.get(flag)]
    if changed:
        return [f"# trained with {', '.join(changed)}, which no pipeline reads: python infer_lora.py {name}"]
    captions = run.data.examples[0].captions
    prompt = next(filter(None, (*run.sample_prompts, args.instance_prompt, *args.triggers, *captions)), "")
    options = f"num_inference_steps={args.validation_inference_steps}"
    options += f", guidance_scale={args.validation_guidance_scale:g}"
    options += f", max_sequence_length={length}" if length else ""
    return [f"image = pipeline({prompt!r}, {options}).images[0]"]


def embedding_lines(family: Family, key: str, tokens: list[str], embeddings: str) -> list[str]:
    """Python lines that give a pipeline the new tokens of one encoder.

    key: the encoder's, in the file of embeddings. embeddings: the expression that loads them.
    """
    tokenizer, encoder = (f"pipeline.{name}" for name in family.text_encoders[key])
    if family.loads_embeddings:
        parts = f"text_encoder={encoder}, tokenizer={tokenizer}"
        return [f"pipeline.load_textual_inversion({embeddings}, token={tokens!r}, {parts})"]
    table = f"{encoder}.get_input_embeddings().weight.data"
    return [
        f"{tokenizer}.add_tokens({tokens!r})",
        f"{encoder}.resize_token_embeddings(len({tokenizer}))",
        f"{table}[{tokenizer}.convert_tokens_to_ids({tokens!r})] = {embeddings}",
    ]
