"""What the metadata of a trained LoRA says of its training."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.lora.metadata import base_versions

if TYPE_CHECKING:
    from lora_training.training.run import Run

KOHYA_SETTINGS = """ learning_rate unet_lr=learning_rate text_encoder_lr lr_scheduler lr_warmup_steps optimizer max_grad_norm
    seed mixed_precision gradient_checkpointing gradient_accumulation_steps batch_size_per_device=train_batch_size clip_skip
    noise_offset min_snr_gamma=snr_gamma loss_type prior_loss_weight network_dropout=lora_dropout cache_latents
    caption_dropout_rate=caption_dropout flip_aug=random_flip """  # kohya's names (without ss_), and ours where they differ


def lora_metadata(run: Run, alpha: float, rank: int) -> dict[str, str]:
    """What both files of a LoRA say of it: kohya's ss_ fields and SAI modelspec 1.0.0, which other tools show
    and sort by.
    """
    args, name = run.args, Path(run.args.output_dir).resolve().name
    base, size = Path(args.pretrained_model_name_or_path).name, (args.resolution * 2)[:2]
    folder = Path(
        args.dataset_config or args.dataset_name or args.train_data_dir or args.instance_data_dir
    ).name
    trained = [e for e in run.data.examples if not e.held_out]
    tags = Counter(
        tag.strip() for e in trained for caption in e.captions for tag in caption.split(",") if tag.strip()
    )
    settings = (word.partition("=") for word in KOHYA_SETTINGS.split())
    values = {f"ss_{kohya}": getattr(args, own or kohya, None) for kohya, _, own in settings} | {
        "ss_network_module": "networks.lora" if args.lora_type == "lora" else "lycoris.kohya",
        "ss_network_args": None if args.lora_type == "lora" else json.dumps({"algo": args.lora_type}),
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_output_name": name,
        "ss_base_model": base,
        "ss_sd_model_name": base,
        "ss_resolution": size,
        "ss_max_train_steps": run.max_steps,
        "ss_num_train_images": len(trained),
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": args.repeats, "img_count": len(trained)}}),
        "ss_tag_frequency": json.dumps({folder: dict(tags.most_common(500))}, ensure_ascii=False),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": args.run_name or name,
        "modelspec.resolution": "{}x{}".format(*size),
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.trigger_phrase": args.trigger_word or None,
    }
    if run.abstractions:
        words = ", ".join(f"{''.join(tokens)} for {word}" for word, tokens in run.abstractions.items())
        values["modelspec.usage_hint"] = f"new tokens, of {name}_emb.safetensors: {words}"
    values |= base_versions(
        run.family, run.components.config(args.family.denoiser), run.components.config("scheduler")
    )
    return {key: str(value) for key, value in values.items() if value is not None}
