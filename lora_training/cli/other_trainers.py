"""What other trainers call our flags: kohya's scripts, Olive and Transformer Lab."""

from __future__ import annotations

NAMES_ELSEWHERE = {
    **dict.fromkeys(("network_dim", "lora_rank", "lora_r_dim"), "--rank"),
    **dict.fromkeys(("unet_lr", "lr"), "--learning_rate"),
    **dict.fromkeys(("max_train_epochs", "epochs", "num_epochs"), "--num_train_epochs"),
    **dict.fromkeys(("output_name", "adaptor_name"), "--output_dir (its last folder names the files)"),
    **dict.fromkeys(("save_every_n_steps", "save_steps"), "--checkpointing_steps"),
    "network_alpha": "--lora_alpha",
    "network_dropout": "--lora_dropout",
    "network_train_unet_only": "no flag: that is the default",
    "caption_dropout_rate": "--caption_dropout",
    "log_to_wandb": "--report_to wandb",
    "text_encoder_lr1": "--text_encoder_lr",
    "min_snr_gamma": "--snr_gamma",
    "weighted_captions": "--prompt_weighting",
    "debiased_estimation_loss": "--debiased_estimation",
    "flip_aug": "--random_flip",
    "enable_bucket": "--aspect_ratio_buckets auto",
    "sample_prompts": "--validation_prompt",
    "sample_every_n_steps": "--validation_steps",
    "optimizer_type": "--optimizer",
    "fp8_base": "--quantize_base fp8",
}
