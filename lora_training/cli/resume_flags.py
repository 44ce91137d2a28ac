"""Which flags a resumed run may change."""

from __future__ import annotations

# fmt: off
# what the tensors of a checkpoint must fit: a change of these is an error
RESUME_FLAGS = (
    "rank", "lora_alpha", "lora_type", "lokr_factor", "use_dora", "use_rslora", "init_lora_weights",
    "rank_pattern", "alpha_pattern", "lr_pattern", "conv_rank", "conv_alpha",
    "optimizer", "targets", "tokens", "layout",
)
# what checkpoints of before these flags had, whose layers were all alike
LATER_FLAGS = dict.fromkeys(("rank_pattern", "alpha_pattern", "lr_pattern", "conv_rank", "conv_alpha"))
# what changes nothing of what is trained, or is compared by what it comes to (data, base, precision, length);
# a change of any other flag needs --resume_anyway
FREE_FLAGS = (
    "config", "dry_run", "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "revision",
    "variant", "cache_dir", "train_data_dir", "dataset_name", "dataset_config_name", "dataset_split",
    "image_column", "caption_column", "instance_data_dir", "cache_text_embeddings", "cache_folder",
    "class_data_dir", "num_class_images", "sample_batch_size", "prior_generation_precision", "lora_layers",
    "lora_blocks", "merge_lora", "use_8bit_adam", "use_prodigy", "max_train_steps", "num_train_epochs",
    "train_text_encoder_ti_frac", "train_text_encoder_frac", "train_transformer_frac", "train_batch_size",
    "mixed_precision", "local_rank", "dataloader_num_workers", "gradient_checkpointing", "offload",
    "output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
    "resume_anyway", "overwrite", "copy_to_adapter", "upcast_before_saving", "validation_prompt",
    "num_validation_images",
    "validation_epochs", "validation_steps", "validation_prompts_file", "validation_inference_steps",
    "validation_guidance_scale", "control_prompt", "keep_best", "skip_final_inference", "report_to",
    "logging_dir", "logging_steps", "report", "run_name", "push_to_hub", "hub_model_id", "hub_token",
)
# fmt: on
