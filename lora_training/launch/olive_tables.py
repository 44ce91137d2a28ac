"""What Olive documents of its SDLoRA pass and one-line command, and the flag that each parameter is here.

A row for each parameter: (Olive's name, our flag, the default). Olive's defaults hold.
"""

from __future__ import annotations

from lora_training.families import FAMILIES

NO_EFFECT = None  # instead of a flag: the parameter means nothing here

VARIANTS = {"auto": None, "sd": "sd15"} | {name: name for name in FAMILIES}  # of model_variant
BASE_RESOLUTION = 512

PASS_PARAMETERS = (
    ("r", "rank", 16),
    ("alpha", "lora_alpha", None),
    ("lora_dropout", "lora_dropout", None),
    ("target_modules", "lora_layers", None),
    ("merge_lora", "merge_lora", None),
    ("dreambooth", "dreambooth", None),
    ("instance_prompt", "instance_prompt", None),
    ("with_prior_preservation", "with_prior_preservation", None),
    ("class_prompt", "class_prompt", None),
    ("class_data_dir", "class_data_dir", None),
    ("num_class_images", "num_class_images", None),
    ("prior_loss_weight", "prior_loss_weight", None),
)
TRAINING_ARGUMENTS = (
    ("learning_rate", "learning_rate", None),
    ("max_train_steps", "max_train_steps", 1000),
    ("train_batch_size", "train_batch_size", 1),
    ("gradient_accumulation_steps", "gradient_accumulation_steps", 4),
    ("gradient_checkpointing", "gradient_checkpointing", True),
    ("mixed_precision", "mixed_precision", "bf16"),
    ("lr_scheduler", "lr_scheduler", "constant"),
    ("lr_warmup_steps", "lr_warmup_steps", 0),
    ("max_grad_norm", "max_grad_norm", 1.0),
    ("snr_gamma", "snr_gamma", None),
    ("checkpointing_steps", "checkpointing_steps", 500),
    ("logging_steps", "logging_steps", 10),
    ("seed", "seed", None),
    ("guidance_scale", "guidance_scale", None),
    ("use_prodigy", "use_prodigy", None),
    ("prodigy_beta3", "prodigy_beta3", None),
)
FLAGS_OF_SOME_FAMILIES = {"guidance_scale": ("flux",), "snr_gamma": ("sd15", "sdxl")}
PRIOR_FLAGS = ("class_prompt", "class_data_dir", "num_class_images", "prior_loss_weight")
PRIOR_DEFAULTS = {"num_class_images": 200}

# `olive diffusion-lora`: {all names of a flag: the default that holds where none of them is set}
ONE_LINE_DEFAULTS = {
    "output_dir --output_path -o": "diffusion-lora-adapter",
    "copy_to_adapter": True,
    "rank --lora_r -r": 16,
    "max_train_steps --num_train_epochs": 1000,
    "gradient_accumulation_steps": 4,
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
    "aspect_ratio_buckets": "auto",
    "logging_steps": 10,
}

IMAGE_FOLDER = (
    ("data_dir", "train_data_dir", None),
    ("default_caption", "default_caption", None),
    ("shuffle_tags", "shuffle_tags", None),
    ("tag_separator", "tag_separator", None),
    ("max_samples", "max_train_samples", None),
    ("instance_prompt", "instance_prompt", None),
    ("class_data_dir", "class_data_dir", None),
    ("class_prompt", "class_prompt", None),
    ("recursive", NO_EFFECT, None),
)
HUB_DATASET = (
    ("data_name", "dataset_name", None),
    ("subset", "dataset_config_name", None),
    ("split", "dataset_split", None),
    ("image_column", "image_column", None),
    ("caption_column", "caption_column", None),
    ("max_samples", "max_train_samples", None),
)
SOURCES = {"image_folder_dataset": IMAGE_FOLDER, "huggingface_dataset": HUB_DATASET}
# flags of the source that go to prepare_dataset.py, where a workflow prepares its pictures
SOURCE_FLAGS = (
    "train_data_dir",
    "dataset_name",
    "dataset_config_name",
    "dataset_split",
    "image_column",
    "caption_column",
)

# sections that say where and how Olive runs: here a workflow runs where it is started
IGNORED_SECTIONS = (
    "systems",
    "host",
    "target",
    "engine",
    "evaluators",
    "evaluator",
    "cache_dir",
    "cache_config",
    "clean_cache",
    "no_artifacts",
    "log_severity_level",
    "log_to_file",
    "workflow_id",
    "azureml_client",
    "search_strategy",
    "evaluate_input_model",
    "packaging_config",
)

# image_lora_preprocess; its steps have rows of (Olive's name, that of prepare_dataset.py, the default)
PREPROCESSING_PARAMETERS = ("base_resolution", "output_dir", "steps", "device", "overwrite")
STEPS = {
    "image_filtering": (
        ("min_size", "min_size", None),
        ("min_aspect_ratio", "min_aspect_ratio", None),
        ("max_aspect_ratio", "max_aspect_ratio", None),
        ("remove_duplicates", "remove_duplicates", None),
        ("blur_threshold", "blur_threshold", None),
    ),
    "auto_caption": (
        ("model_type", "model_type", None),
        ("model_name", "model_name", None),
        ("trigger_word", "trigger_word", None),
        ("trust_remote_code", "trust_remote_code", None),
        ("overwrite", "overwrite", None),
        ("batch_size", "batch_size", None),
        ("max_new_tokens", "max_new_tokens", None),
        ("prompt", "prompt", None),
        ("task", "task", None),
        ("device", "device", None),
    ),
    "auto_tagging": (
        ("model_name", "model_name", None),
        ("threshold", "threshold", None),
        ("general_threshold", "general_threshold", None),
        ("character_threshold", "character_threshold", None),
        ("batch_size", "batch_size", None),
        ("trigger_word", "trigger_word", None),
        ("exclude_tags", "exclude_tags", None),
        ("replace_underscore", "replace_underscore", None),
        ("max_tags", "max_tags", None),
        ("overwrite", "captions", False),
        ("device", "device", None),
        ("include_rating", NO_EFFECT, None),
    ),
    "image_resizing": (
        ("target_resolution", "target_resolution", None),
        ("resize_mode", "mode", None),
        ("resample_mode", "interpolation", None),
        ("fill_color", "fill", None),
        ("crop_position", "crop_position", None),
        ("overwrite", NO_EFFECT, None),
        ("output_dir", NO_EFFECT, None),
    ),
    "aspect_ratio_bucketing": (
        ("base_resolution", "base_resolution", None),
        ("custom_buckets", "custom_buckets", None),
        ("resize_images", "resize_images", True),
        ("resample_mode", "interpolation", None),
        ("crop_position", "crop_position", None),
        ("resize_mode", NO_EFFECT, None),
        ("fill_color", NO_EFFECT, None),
        ("overwrite", NO_EFFECT, None),
        ("output_dir", NO_EFFECT, None),
    ),
}
STEP_SIZES = {"image_resizing": "target_resolution", "aspect_ratio_bucketing": "base_resolution"}
