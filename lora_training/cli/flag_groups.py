"""Sets of flags that other modules ask for by name."""

from __future__ import annotations

# What a checkpoint's tensors must fit; all other flags must be as they were, or --resume_anyway given, but
# the free ones,
# which change nothing of what is trained
RESUME_FLAGS = "rank lora_alpha lora_type lokr_factor use_dora use_rslora init_lora_weights optimizer targets tokens layout"

FREE_FLAGS = (  # data, base, precision and length are compared as what they come to
    "config dry_run pretrained_model_name_or_path pretrained_vae_model_name_or_path revision variant cache_dir train_data_dir"
    " dataset_name dataset_config_name dataset_split image_column caption_column instance_data_dir cache_text_embeddings"
    " cache_folder class_data_dir num_class_images sample_batch_size prior_generation_precision lora_layers lora_blocks"
    " merge_lora use_8bit_adam use_prodigy max_train_steps num_train_epochs train_batch_size mixed_precision local_rank"
    " dataloader_num_workers gradient_checkpointing offload output_dir checkpointing_steps checkpoints_total_limit"
    " resume_from_checkpoint resume_anyway overwrite"
    " upcast_before_saving validation_prompt num_validation_images validation_epochs validation_steps"
    " validation_prompts_file validation_inference_steps validation_guidance_scale control_prompt keep_best skip_final_inference report_to"
    " logging_dir logging_steps report run_name push_to_hub hub_model_id hub_token"
)

NAMES_ELSEWHERE = {  # what kohya's scripts, Olive and Transformer Lab call our flags
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
    "flip_aug": "--random_flip",
    "enable_bucket": "--aspect_ratio_buckets auto",
    "sample_prompts": "--validation_prompt",
    "sample_every_n_steps": "--validation_steps",
    "optimizer_type": "--optimizer",
    "fp8_base": "--quantize_base fp8",
}

SET_KEYS = (  # what a set of --dataset_config may say: flags, and what is its own
    "train_data_dir dataset_name dataset_config_name dataset_split image_column caption_column instance_data_dir"
    " instance_prompt default_caption trigger_word repeats caption_dropout caption_per_line masked_loss unmasked_weight"
    " validation_split max_train_samples resolution aspect_ratio_buckets weight resolutions class_prompt"
)

# (flags, when they are wrong, why): a reason that begins with "with" is one for which they would have no
# effect
PRIOR = "class_data_dir class_prompt num_class_images sample_batch_size prior_generation_precision"

TOKENS = "train_text_encoder_ti_frac token_abstraction num_new_tokens_per_abstraction initializer_concept"

NO_LORA = "lora_alpha lora_type lora_dropout lora_layers lora_blocks use_dora use_rslora init_lora_weights merge_lora use_ema preserve_class init_lora"

LORA_STARTS = ("gaussian", "default", "true", "orthogonal", "olora", "pissa")

TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")
