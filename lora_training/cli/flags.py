"""The flags that all training scripts have, by group: spelling, type, default and help."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lora_training.adapter_names import LORA_TYPES
from lora_training.cli.types import (
    OPTIMIZERS,
    amount,
    count,
    count_or_off,
    natural,
    optimizer_name,
    part_of_one,
    path,
    rate,
    share,
    steps,
    web_address,
    yes_or_no,
)

if TYPE_CHECKING:
    from lora_training.families import Family

INTERPOLATIONS = ["lanczos", "bicubic", "bilinear", "box", "hamming", "nearest"]
SCHEDULES = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
TIMESTEP_SAMPLING = ["weighting_scheme", "uniform", "sigmoid", "shift"]


def add_shared_args(
    parser: argparse.ArgumentParser,
    family: Family,
    lora_targets: tuple[str, ...],
    inference_steps: int,
    guidance: float,
) -> None:
    """Adds the flags that all four training scripts have; the other arguments are a family's usual values."""

    def group(title: str):
        return parser.add_argument_group(title).add_argument

    add_run_flags(group("run"))
    add_model_flags(group("model"))
    add_data_flags(group("data"))
    add_image_flags(group("image"), family)
    add_caches_flags(group("caches"))
    add_prior_preservation_flags(group("prior preservation"))
    add_lora_flags(group("LoRA"), lora_targets)
    add_text_encoders_flags(group("text encoders"))
    add_loss_flags(group("loss"))
    add_optimizer_flags(group("optimizer"))
    add_length_and_batch_flags(group("length and batch"))
    add_memory_and_speed_flags(group("memory and speed"))
    add_checkpoints_flags(group("checkpoints"))
    add_validation_flags(group("validation"), inference_steps, guidance)
    add_logging_flags(group("logging"))


# fmt: off
def add_run_flags(add) -> None:
    add("--config", type=path, metavar="FILE",
        help="YAML or JSON file with flag names as keys; flags on the command line win")
    add("--dry_run", action="store_true",
        help="check everything with one real step, save and validation; keep nothing")


def add_model_flags(add) -> None:
    add("--pretrained_model_name_or_path", "--model_name_or_path", "-m", type=path, metavar="BASE",
        help="hub id, diffusers folder, or .safetensors/.ckpt file")
    add("--pretrained_vae_model_name_or_path", type=path, metavar="VAE",
        help="another VAE: hub id, folder or file (default: the base's)")
    add("--revision", help="revision of the base on the hub")
    add("--variant", help="weights variant of the base, such as fp16")
    add("--cache_dir", type=path, help="folder for downloads (default: the hub's own)")


def add_data_flags(add) -> None:
    add("--train_data_dir", "--data_dir", "-d", type=path, metavar="DIR",
        help="folder of images with metadata.jsonl/.csv or a .txt beside each image")
    add("--dataset_name", "--data_name", type=path, metavar="NAME",
        help="hub data set, local folder, or a Python file with a datasets builder")
    add("--dataset_config", type=path, metavar="FILE",
        help="YAML list of several sets, each with its folder, repeats, trigger word, weight, sizes, "
             "masks, ...; or kohya's dataset.toml")
    add("--kohya_folders", action="store_true",
        help="--train_data_dir holds folders such as `10_sks dog`: repeats and caption")
    add("--dataset_config_name", help="configuration of the data set")
    add("--dataset_split", "--data_split", default="train", help="split of the data set (train)")
    add("--image_column", default="image", help="image column of the data set (image)")
    add("--caption_column", help="caption column (default: the one of text, caption, prompt that exists)")
    add("--max_train_samples", type=count_or_off, help="use so many images, drawn by --seed (default: all)")
    add("--instance_data_dir", type=path, metavar="DIR",
        help="folder of images of one thing, without captions")
    add("--instance_prompt", help="caption of every image that has none of its own")
    add("--repeats", type=count, default=1, help="times that each image is shown per epoch (1)")
    add("--trigger_word", help="word put before each caption, once, or in the place of its [trigger]")
    add("--default_caption", help="caption of images that have none")
    add("--caption_dropout", type=share, default=0.0,
        help="share of captions replaced by the empty one (0: off)")
    add("--shuffle_tags", action="store_true", help="shuffle the tags of a caption anew in each epoch")
    add("--tag_separator", default=", ", help="what stands between tags (', ')")
    add("--tag_dropout", type=share, default=0.0,
        help="share of a caption's tags left out each time (0: off)")
    add("--keep_tokens", type=natural, default=0,
        help="the first so many tags, or those before a |||, are neither shuffled nor dropped (0)")
    add("--caption_per_line", action="store_true",
        help="each line of a .txt is a caption, one of which is drawn each time")
    add("--caption_wildcards", action="store_true",
        help="{red|blue} in a caption is one of the two each time")
    add("--caption_extension", metavar="END",
        help="how the names of caption files end, such as .tags (default: .txt, else .caption)")
    add("--validation_split", type=share, default=0.0,
        help="share of images held out for the held-out loss (0: none)")


def add_image_flags(add, family: Family) -> None:
    add("--resolution", "--base_resolution", type=count, nargs="+", metavar="PIXELS",
        help=f"one side, or width and height ({family.resolution})")
    add("--aspect_ratio_buckets", metavar="BUCKETS",
        help='"auto", or "H,W;H,W;..." (default: one size for all)')
    add("--center_crop", action="store_true", help="crop the middle (default: crop anywhere)")
    add("--random_flip", action="store_true", help="mirror every other image")
    add("--image_interpolation_mode", default="lanczos", choices=INTERPOLATIONS,
        help="how pictures are scaled (lanczos)")
    add("--color_jitter", type=amount, nargs="*", metavar="B C S H",
        help="brightness, contrast, saturation, hue (off; bare: 0.1 0.1 0.1 0.05)")
    add("--random_rotation", type=amount, nargs="?", const=5.0, metavar="DEGREES",
        help="turn by up to so many degrees (off; bare: 5)")
    add("--random_rotation_prob", type=share, default=0.3, help="share of images turned (0.3)")


def add_caches_flags(add) -> None:
    add("--cache_latents", action="store_true",
        help="encode each image once; its crop is then drawn once per image")
    add("--cache_text_embeddings", action="store_true",
        help="encode each caption once (always on where captions and encoders can't change)")
    add("--cache_folder", type=path, metavar="DIR",
        help="keep the caches on disk, for the next run (default: in memory)")


def add_prior_preservation_flags(add) -> None:
    add("--with_prior_preservation", "--dreambooth", action="store_true",
        help="train on images of the class too, so that it is not forgotten")
    add("--class_data_dir", type=path, metavar="DIR",
        help="class images; missing ones are generated (default: class_images in the output folder)")
    add("--class_prompt", help="prompt of the class images")
    add("--num_class_images", type=count, default=100, help="class images (100)")
    add("--prior_loss_weight", type=amount, default=1.0, help="weight of the class images' loss (1)")
    add("--sample_batch_size", type=count, default=4, help="class images generated at a time (4)")
    add("--preserve_class", metavar="WORD",
        help="keep what the base draws for WORD, the class, without class images: one more pass forward and "
             "back")
    add("--preserve_weight", type=amount, default=1.0, help="weight of its loss (1)")
    add("--prior_generation_precision", choices=["no", "fp32", "fp16", "bf16"],
        help="precision while generating them (default: the training's)")


def add_lora_flags(add, lora_targets: tuple[str, ...]) -> None:
    add("--rank", "--lora_r", "-r", type=count, default=4, help="rank (4)")
    add("--lora_alpha", "--alpha", type=amount, help="the update is scaled by alpha/rank (default: the rank)")
    add("--lora_dropout", type=part_of_one, default=0.0, help="dropout before the LoRA layers (0: off)")
    add("--lora_layers", "--target_modules", nargs="+", metavar="NAME",
        help=f"module names or block prefixes ({','.join(lora_targets)})")
    add("--lora_blocks", nargs="+", metavar="N",
        help="numbers of the blocks that get a LoRA (default: all); names are taken as --lora_layers")
    add("--lora_type", choices=[*LORA_TYPES], default="lora",
        help="loha, lokr: products of Hadamard or Kronecker; a step makes each layer's update whole, as "
             "large as its weight (lora)")
    add("--lokr_factor", type=int, default=-1,
        help="size of LoKr's smaller factor, 4 to 16 are usual: the larger, the fewer weights (-1: near the "
             "root)")
    add("--use_dora", action="store_true", help="weight-decomposed LoRA (DoRA)")
    add("--use_rslora", action="store_true", help="scale by alpha/sqrt(rank)")
    add("--init_lora", "--network_weights", type=path, metavar="FILE",
        help="start from this LoRA, of any tool; rank, alpha and layers are its own")
    add("--init_lora_weights", default="gaussian",
        help="gaussian, default, olora, pissa, pissa_niter_N, orthogonal, ... as peft (gaussian)")
    add("--merge_lora", action="store_true", help="also write the base with the LoRA merged in, to merged/")


def add_text_encoders_flags(add) -> None:
    add("--train_text_encoder", action="store_true", help="LoRA on the text encoder too")
    add("--train_text_encoder_frac", type=share, default=1.0,
        help="share of the steps in which it is trained (1)")
    add("--text_encoder_lr", type=rate,
        help="learning rate of text encoders and new tokens (default: --learning_rate)")
    add("--train_text_encoder_ti", action="store_true",
        help="pivotal tuning: learn new tokens (textual inversion), then the LoRA alone")
    add("--train_text_encoder_ti_frac", type=share, default=0.5,
        help="share of the steps in which the tokens are trained (0.5)")
    add("--token_abstraction", default="TOK",
        help="word in prompts that stands for the new tokens; several with commas (TOK)")
    add("--num_new_tokens_per_abstraction", type=count, default=2, help="new tokens per word (2)")
    add("--initializer_concept",
        help="start from this text's embeddings; its tokens decide how many new ones (default: random)")
    add("--train_transformer_frac", "--train_unet_frac", type=share, default=1.0,
        help="share of the steps in which the LoRA is trained (1; 0: textual inversion alone)")


def add_loss_flags(add) -> None:
    add("--loss_type", choices=["l2", "huber", "smooth_l1"], default="l2",
        help="squared error, or Huber's, on which outliers weigh less; smooth_l1 is huber / c (l2)")
    add("--huber_c", type=amount, default=0.1, help="where both turn from square to linear (0.1)")
    add("--huber_schedule", choices=["constant", "exponential", "snr"], default="constant",
        help="the same c everywhere, or from 1 at no noise down to --huber_c (constant)")
    add("--masked_loss", type=path, metavar="WHERE",
        help='train on what masks show in white: "alpha" (the picture\'s own), a folder, or the end of their '
             'names, as in --masked_loss=-mask')
    add("--unmasked_weight", type=share, default=0.1, help="weight of the rest (0.1)")
    add("--min_timestep", type=natural, default=0, help="no timestep below: 0 is the picture (0)")
    add("--max_timestep", type=count, default=1000,
        help="no timestep from here on: 1000 is noise alone (1000)")


def add_optimizer_flags(add) -> None:
    add("--optimizer", type=optimizer_name, default="adamw",
        help=f"{', '.join(OPTIMIZERS)}, or any class by its dotted name, such as torch.optim.RAdam (adamw)")
    add("--optimizer_args", nargs="+", metavar="KEY=VALUE", help="more arguments of the optimizer; they win")
    add("--loraplus_lr_ratio", type=amount, default=1.0,
        help="LoRA+: the B matrices' learning rate is so many times as high, 16 is usual (1: off)")
    add("--use_8bit_adam", action="store_true", help="the same as --optimizer adamw8bit")
    add("--use_prodigy", action="store_true", help="the same as --optimizer prodigy")
    add("--learning_rate", type=rate,
        help="of the denoiser, and of text encoders unless they have their own (1e-4; prodigy: 1, lion8bit: "
             "3e-5, came: 1e-5)")
    add("--scale_lr", action="store_true", help="multiply it by processes, batch size and accumulation steps")
    add("--lr_scheduler", default="constant", choices=SCHEDULES,
        help="course of the learning rate after the warm-up (constant)")
    add("--lr_warmup_steps", type=natural, default=0, help="steps until the full learning rate (0)")
    add("--lr_num_cycles", type=count, default=1, help="restarts of cosine_with_restarts (1)")
    add("--lr_power", type=amount, default=1.0, help="of polynomial (1)")
    add("--adam_beta1", type=part_of_one, default=0.9, help="decay of the mean of gradients (0.9)")
    add("--adam_beta2", type=part_of_one, default=0.999, help="decay of the mean of their squares (0.999)")
    add("--adam_weight_decay", type=amount, default=1e-2, help="of the denoiser's LoRA (1e-2; 0: off)")
    add("--adam_weight_decay_text_encoder", type=amount, default=1e-3,
        help="of text encoders and new tokens (1e-3; 0: off)")
    add("--adam_epsilon", type=amount, default=1e-8, help="added to the divisor of each update (1e-8)")
    add("--prodigy_beta3", type=part_of_one,
        help="for prodigy's step size (default: the square root of beta2)")
    add("--prodigy_decouple", type=yes_or_no, default=True, nargs="?", const=True,
        help="weight decay as in AdamW (true)")
    add("--prodigy_use_bias_correction", type=yes_or_no, default=True, nargs="?", const=True,
        help="correct the first steps' means as Adam does (true)")
    add("--prodigy_safeguard_warmup", type=yes_or_no, default=True, nargs="?", const=True,
        help="keep its step size from falling during the warm-up (true)")
    add("--max_grad_norm", type=amount, default=1.0, help="gradients are clipped to this norm (1; 0: off)")
    add("--use_ema", action="store_true", help="save and validate with a moving average of the LoRA")
    add("--ema_decay", type=part_of_one, default=0.9999, help="share of the average kept each step (0.9999)")


def add_length_and_batch_flags(add) -> None:
    add("--seed", type=int, help="same seed, same run (default: drawn, printed and stored)")
    add("--train_batch_size", type=count, default=1, help="images per process and step (1)")
    add("--num_train_epochs", type=count, help="times through the data")
    add("--max_train_steps", type=steps, metavar="STEPS",
        help="optimizer steps; a number wins over epochs (1000 when neither is given); auto: without epochs, "
             "about 100 for each picture, from 800 to 3,000")
    add("--gradient_accumulation_steps", type=count, default=1, help="batches per optimizer step (1)")
    add("--mixed_precision", choices=["no", "fp16", "bf16", "auto"],
        help="precision of the frozen base; auto: bf16 where the GPU has it, else fp16, float32 on a CPU "
             "(default: as accelerate is configured)")
    add("--dataloader_num_workers", type=natural, default=0, help="processes that prepare images (0: none)")
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)


def add_memory_and_speed_flags(add) -> None:
    add("--gradient_checkpointing", action="store_true", help="less memory, about a third more time per step")
    add("--allow_tf32", action="store_true", help="faster float32 matrix products on Ampere and later")
    add("--compile", action="store_true",
        help="torch.compile of the repeated blocks: slow first step, then faster")
    add("--cuda_graphs", action="store_true",
        help="one launch for a whole forward and backward pass: where the GPU waits for Python")
    add("--quantize_base", choices=["nf4", "int8", "fp8"], help="hold the frozen base in 4 or 8 bits")
    add("--blocks_to_swap", type=natural, default=0, metavar="N",
        help="hold the weights of N blocks in the CPU's memory until they work (0: none)")
    add("--enable_xformers_memory_efficient_attention", action="store_true",
        help="attention by xformers (torch's own is as good)")
    add("--offload", action="store_true", help="text encoders and VAE stay on the CPU while they are unused")


def add_checkpoints_flags(add) -> None:
    add("--output_dir", "--output_path", "-o", type=path, metavar="DIR",
        help="folder for everything that is written (output/FAMILY-lora)")
    add("--checkpointing_steps", type=count, default=500, help="steps between checkpoints (500)")
    add("--checkpoints_total_limit", type=count_or_off, help="keep the latest so many (default: all)")
    add("--resume_from_checkpoint", type=path, metavar="PATH", help='a checkpoint, or "latest"')
    add("--resume_anyway", action="store_true",
        help="go on with settings that have changed, as they are now; they are named")
    add("--overwrite", action="store_true", help="write over the results of another run in the output folder")
    add("--copy_to_adapter", action="store_true",
        help="also leave the LoRA for diffusers in adapter/ of the output folder, as Olive does")
    add("--upcast_before_saving", action="store_true",
        help="save the LoRA in float32 (default: in the precision of the base)")


def add_validation_flags(add, inference_steps: int, guidance: float) -> None:
    add("--validation_prompt", "--eval_prompt", nargs="+", metavar="PROMPT",
        help="prompts drawn during training")
    add("--validation_prompts_file", type=path, metavar="FILE",
        help="prompts with settings of their own: YAML, or kohya's lines (--n --w --h --d --s --l)")
    add("--num_validation_images", type=natural,
        help="per prompt, 0: none (default: 4 with a prompt, steps or epochs of validation, else as many as "
             "take a tenth of the time)")
    add("--validation_epochs", type=count_or_off, help="validate every so many epochs")
    add("--validation_steps", type=count_or_off,
        help="validate every so many steps (with neither: about five times)")
    add("--validation_inference_steps", type=count, default=inference_steps,
        help=f"denoising steps of each picture ({inference_steps})")
    add("--validation_guidance_scale", type=amount, default=guidance,
        help=f"how closely pictures follow the prompt ({guidance})")
    add("--control_prompt", nargs="+", metavar="PROMPT",
        help="prompts whose pictures should stay as they are: what is forgotten is measured on them")
    add("--keep_best", action="store_true",
        help="the step that the run advises becomes the result (default: the last one)")
    add("--skip_final_inference", action="store_true", help="no pictures before and after: no comparison.png")


def add_logging_flags(add) -> None:
    add("--report_to", default="tensorboard",
        help="tensorboard, wandb, another tracker of accelerate, all, none (tensorboard)")
    add("--logging_dir", default="logs", help="inside the output folder (logs)")
    add("--logging_steps", type=count, default=1, help="steps between log lines (1)")
    add("--report", action="store_true",
        help="write report.html after each validation, with this project's scripts/reports/")
    add("--notify", type=web_address, metavar="URL",
        help="send warnings and the end to this address as JSON; Slack and Discord show it; never stored")
    add("--run_name", help="name in trackers (default: the output folder's)")
    add("--push_to_hub", action="store_true", help="upload the results at the end")
    add("--hub_model_id", help="repository on the hub (default: the output folder's name)")
    add("--hub_token", help="token for the hub; never stored or logged")
# fmt: on
