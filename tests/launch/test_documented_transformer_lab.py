"""Transformer Lab's diffusion trainer: each documented parameter, with its default and with another value."""

from __future__ import annotations

import pytest
from conftest import FAMILIES, ROOT, SAMPLE
from parsed_starts import parse_start

from lora_training.data.examples import load_examples
from lora_training.errors import UserError
from lora_training.launch import environment
from lora_training.launch.decision import decide
from lora_training.validation.prompts import sample_prompts

pytestmark = pytest.mark.unit
FILE = str(ROOT / "config" / "diffusion_trainer.yaml")
NOISE_PREDICTION = ("sd15", "sdxl")

PARAMETERS = {  # its name: (our setting, what it is by default, another value as flags, what it is then)
    "trigger_word": ("trigger_word", None, "--trigger_word ohwx", "ohwx"),
    "num_train_epochs": ("num_train_epochs", 100, "--num_train_epochs 10", 10),
    "train_batch_size": ("train_batch_size", 1, "--train_batch_size 2", 2),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", 1, "--gradient_accumulation_steps 4", 4),
    "caption_column": ("caption_column", None, "--dataset_name x --caption_column text", "text"),
    "image_column": ("image_column", "image", "--dataset_name x --image_column picture", "picture"),
    "caption_dropout_rate": ("caption_dropout", 0.0, "--caption_dropout 0.1", 0.1),
    "resolution": ("resolution", [512], "--resolution 1024", [1024]),
    "center_crop": ("center_crop", False, "--center_crop", True),
    "image_interpolation_mode": (
        *("image_interpolation_mode", "lanczos"),
        *("--image_interpolation_mode nearest", "nearest"),
    ),
    "random_flip": ("random_flip", False, "--random_flip", True),
    "color_jitter": ("color_jitter", None, "--color_jitter", [0.1, 0.1, 0.1, 0.05]),
    "color_jitter_hue": ("color_jitter", None, "--color_jitter 0.1 0.1 0.1 0.2", [0.1, 0.1, 0.1, 0.2]),
    "random_rotation": ("random_rotation", None, "--random_rotation", 5),
    "rotation_degrees": ("random_rotation", None, "--random_rotation 45", 45),
    "rotation_prob": ("random_rotation_prob", 0.3, "--random_rotation --random_rotation_prob 0.5", 0.5),
    "lora_r": ("rank", 8, "--lora_r 16", 16),
    "lora_alpha": ("lora_alpha", 16, "--lora_alpha 8", 8),
    "learning_rate": ("learning_rate", 1e-4, "--learning_rate 1e-5", 1e-5),
    "lr_scheduler": ("lr_scheduler", "constant_with_warmup", "--lr_scheduler cosine", "cosine"),
    "lr_warmup_steps": ("lr_warmup_steps", 50, "--lr_warmup_steps 0", 0),
    "adam_beta1": ("adam_beta1", 0.9, "--adam_beta1 0.8", 0.8),
    "adam_beta2": ("adam_beta2", 0.999, "--adam_beta2 0.99", 0.99),
    "adam_weight_decay": ("adam_weight_decay", 0.01, "--adam_weight_decay 0", 0),
    "adam_epsilon": ("adam_epsilon", 1e-8, "--adam_epsilon 1e-6", 1e-6),
    "max_grad_norm": ("max_grad_norm", 1.0, "--max_grad_norm 0.5", 0.5),
    "loss_type": ("loss_type", "l2", "--loss_type huber", "huber"),
    "huber_c": ("huber_c", 0.1, "--loss_type huber --huber_c 0.2", 0.2),
    "prediction_type": ("prediction_type", None, "--prediction_type v_prediction", "v_prediction"),
    "snr_gamma": ("snr_gamma", 0, "--snr_gamma 5", 5),
    "min_snr_gamma": ("snr_gamma", 0, "--snr_gamma 5", 5),
    "noise_offset": ("noise_offset", 0, "--noise_offset 0.05", 0.05),
    "mixed_precision": ("mixed_precision", "no", "--mixed_precision bf16", "bf16"),
    "gradient_checkpointing": ("gradient_checkpointing", False, "--gradient_checkpointing", True),
    "use_ema": ("use_ema", False, "--use_ema", True),
    "ema_decay": ("ema_decay", 0.9999, "--use_ema --ema_decay 0.99", 0.99),
    "eval_prompt": ("validation_prompt", None, "--eval_prompt circle", ["circle"]),
    "eval_steps": ("validation_epochs", None, "--eval_prompt circle --validation_epochs 2", 2),
    "eval_num_inference_steps": ("validation_inference_steps", 50, "--validation_inference_steps 25", 25),
    "eval_guidance_scale": ("validation_guidance_scale", 7.5, "--validation_guidance_scale 5", 5),
    "log_to_wandb": ("report_to", "tensorboard,wandb", "--report_to tensorboard", "tensorboard"),
    "adaptor_name": ("output_dir", None, "-o output/adaptor", "output/adaptor"),
}
OF_NOISE_PREDICTION = {"prediction_type", "snr_gamma", "min_snr_gamma", "noise_offset"}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(environment, "gpu_precision", lambda: None)


def parsed(family: str, *flags: str):
    """The settings of a training with its file."""
    data = [] if "--dataset_name" in flags else ["-d", str(SAMPLE)]
    return parse_start(decide(["--config", FILE, "-m", FAMILIES[family].base, *data, *flags], {}))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_documented_parameter_has_its_default_and_takes_another_value(family):
    defaults = vars(parsed(family))
    for name, (setting, default, flags, value) in PARAMETERS.items():
        if name in OF_NOISE_PREDICTION and family not in NOISE_PREDICTION:
            assert setting not in defaults
            with pytest.raises(UserError, match=f"--{setting}: "):
                parsed(family, *flags.split())
            continue
        assert name == "adaptor_name" or defaults[setting] == default, name
        assert vars(parsed(family, *flags.split()))[setting] == value, name


def test_the_empty_evaluation_prompt_draws_nothing(capsys):
    args = parsed("sd15")
    assert args.num_validation_images == 0 and sample_prompts(args, load_examples(args)) == []
    printed = capsys.readouterr().out
    assert "--validation_prompt is empty: no pictures are drawn" in printed
    assert "note: validation_epochs of the --config file is off: " in printed
    shown = parsed("sd15", "--eval_prompt", "a red circle")
    assert (shown.num_validation_images, shown.validation_epochs) == (1, 1)
    assert sample_prompts(shown, load_examples(shown)) == ["a red circle"]


def test_no_pictures_beside_its_file_is_no_error():
    args = parsed("sd15", "--num_validation_images", "0", "--eval_prompt", "a red circle")
    assert args.validation_epochs is None and args.settings["validation_epochs"] is None


def test_a_picture_each_epoch_does_not_leave_a_checkpoint_each():
    assert parsed("flux", "--eval_prompt", "a red circle").checkpoints_total_limit == 3
