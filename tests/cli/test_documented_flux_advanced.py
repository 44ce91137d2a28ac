"""The README of diffusers' advanced FLUX.1 script: each command and value that it invites to, as it stands.

Its inference snippets are in tests/recipes/test_flux.py, as a run.
"""

from __future__ import annotations

import shlex
from string import Template

import pytest
import torch
from conftest import FAMILIES, ROOT, SAMPLE, load_script
from toy_parts import empty_denoiser

from lora_training.base_model.reading import read_json
from lora_training.lora.adapters import find_target_layers

pytestmark = pytest.mark.unit
FLUX = FAMILIES["flux"]
SHELL = {"MODEL_NAME": FLUX.base, "DATASET_NAME": str(SAMPLE), "OUTPUT_DIR": "3d-icon-Flux-LoRA"}

PIVOTAL_TUNING = """
accelerate launch train_dreambooth_lora_flux_advanced.py \\
  --pretrained_model_name_or_path=$MODEL_NAME \\
  --dataset_name=$DATASET_NAME \\
  --instance_prompt="3d icon in the style of TOK" \\
  --output_dir=$OUTPUT_DIR \\
  --caption_column="prompt" \\
  --mixed_precision="bf16" \\
  --resolution=1024 \\
  --train_batch_size=1 \\
  --repeats=1 \\
  --report_to="wandb"\\
  --gradient_accumulation_steps=1 \\
  --gradient_checkpointing \\
  --learning_rate=1.0 \\
  --text_encoder_lr=1.0 \\
  --optimizer="prodigy"\\
  --train_text_encoder_ti\\
  --train_text_encoder_ti_frac=0.5\\
  --lr_scheduler="constant" \\
  --lr_warmup_steps=0 \\
  --rank=8 \\
  --max_train_steps=700 \\
  --checkpointing_steps=2000 \\
  --seed="0" \\
  --push_to_hub
"""
WITH_T5 = PIVOTAL_TUNING.replace("_ti\\\n", "_ti\\\n  --enable_t5_ti\\\n")
TEXTUAL_INVERSION = WITH_T5.replace("_frac=0.5\\\n", "_frac=0.5\\\n  --train_transformer_frac=0\\\n")


@pytest.fixture(autouse=True)
def logged_in(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)


def settings(command: str, *flags: str):
    """What the script reads of a command. A backslash joins lines as bash does, without a space."""
    line = Template(command.replace("\\\n", "")).substitute(SHELL)
    words = shlex.split(line)
    return load_script(FLUX.script).parse_args([*words[words.index(FLUX.script) + 1 :], *flags])


@pytest.mark.parametrize(
    ("command", "t5", "share"),
    [(PIVOTAL_TUNING, False, 1.0), (WITH_T5, True, 1.0), (TEXTUAL_INVERSION, True, 0.0)],
    ids=["pivotal tuning", "with T5", "textual inversion"],
)
def test_each_example_trains_what_it_says(command, t5, share):
    args = settings(command)
    assert (args.train_text_encoder_ti, args.enable_t5_ti, args.train_transformer_frac) == (True, t5, share)
    assert (args.learning_rate, args.text_encoder_lr, args.optimizer) == (1.0, 1.0, "prodigy")
    assert (args.rank, args.max_train_steps, args.checkpointing_steps, args.seed) == (8, 700, 2000, 0)
    assert (args.caption_column, args.resolution, args.report_to) == ("prompt", [1024], "wandb")
    assert args.push_to_hub and args.token_abstraction == "TOK" and args.gradient_checkpointing


def test_alpha_and_initializer_as_the_text_has_them():
    for alpha, rank in ((16, 16), (8, 16), (32, 16)):
        args = settings(PIVOTAL_TUNING, f"--lora_alpha={alpha}", f"--rank={rank}")
        assert (args.lora_alpha, args.rank) == (alpha, rank)
    assert settings(PIVOTAL_TUNING, "--initializer_concept=icon").initializer_concept == "icon"
    trained = settings(
        PIVOTAL_TUNING.replace("--train_text_encoder_ti\\", "--train_text_encoder\\").replace(
            "  --train_text_encoder_ti_frac=0.5\\\n", ""
        )
    )
    assert trained.train_text_encoder and not trained.train_text_encoder_ti


ATTENTION = "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0"
FAL = f"{ATTENTION},attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,attn.to_add_out,ff.net.0.proj,ff.net.2"
FAL += ",ff_context.net.0.proj,ff_context.net.2"
REPLICATE = f"{FAL},norm1_context.linear, norm1.linear,norm.linear,proj_mlp,proj_out"


@pytest.mark.parametrize(
    "flag",
    [
        f"--lora_layers={ATTENTION}",
        f"--lora_layers={FAL}",
        f"--lora_blocks={REPLICATE}",
        "--lora_layers=single_transformer_blocks.1.attn.to_k",
        "--lora_layers=transformer_blocks.1.attn.to_k",
    ],
    ids=["attention", "fal", "replicate", "a single block", "an MMDiT block"],
)
def test_each_list_of_layers_names_layers_of_the_transformer(flag):
    config = read_json(ROOT / FLUX.base / "transformer" / "config.json")
    denoiser = empty_denoiser(config)
    args = settings(PIVOTAL_TUNING, flag)
    names = [name.strip() for name in flag.partition("=")[2].split(",")]
    layers = find_target_layers(denoiser, args, usual=(), idle=())
    linear = [n for n, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)]
    assert layers == sorted(n for n in linear if any(f".{n}".endswith(f".{end}") for end in names))
    assert all(any(f".{layer}".endswith(f".{end}") for layer in layers) for end in names)
