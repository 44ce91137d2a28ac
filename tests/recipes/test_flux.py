"""FLUX.1 as people train it: published commands, model cards, schnell, and tiny bases to try things with."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import FLUX, ROOT, SAMPLE, load_script, quick_flags, run_here
from PIL import Image
from safetensors.torch import load_file

from lora_training.base_model.components import Components

pytestmark = pytest.mark.run

ICONS = ("--caption_column", "prompt", "--instance_prompt", "3d icon in the style of TOK", "--repeats", "1")
PIVOTAL = ("--train_text_encoder_ti", "--train_text_encoder_ti_frac=0.5", "--optimizer=prodigy")
PIVOTAL += ("--learning_rate=1.0", "--text_encoder_lr=1.0", "--lr_scheduler=constant")
PIVOTAL += ("--lr_warmup_steps=0", "--rank=8")
COMMANDS = {
    "pivotal": PIVOTAL,
    "pivotal, T5": (*PIVOTAL, "--enable_t5_ti"),
    "inversion": (*PIVOTAL, "--train_transformer_frac=0"),
    "inversion, T5": (*PIVOTAL, "--enable_t5_ti", "--train_transformer_frac=0"),
}


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("case", COMMANDS)
def test_the_published_flux_commands_run(case, tmp_path):
    """As people type them for diffusers' script, with local model and data set, and (once) W&B offline."""
    import datasets
    from ready_process import start

    files = sorted(SAMPLE.glob("*.png"))[:4]
    rows = [{"image": str(file), "prompt": f"a TOK icon {number}"} for number, file in enumerate(files)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "3d-icon")
    output, flags = tmp_path / "3d-icon-flux", COMMANDS[case]
    tracker = "wandb" if case == "pivotal" else "none"  # which takes as long to start as the run
    command = [
        *("--pretrained_model_name_or_path", FLUX.base, "--dataset_name", tmp_path / "3d-icon"),
        *(*ICONS, *flags, "--output_dir", output, "--mixed_precision=bf16", "--resolution=64"),
        *("--train_batch_size=1", "--gradient_accumulation_steps=1", "--gradient_checkpointing", "--seed=0"),
        *(f"--report_to={tracker}", "--max_train_steps=4", "--checkpointing_steps=2000"),
        *("--max_sequence_length=77", "--num_validation_images=1", "--validation_inference_steps=1"),
        *("--validation_prompt=a <s0><s1> icon", "--validation_epochs=25"),
    ]
    log = tmp_path / "log"
    process = start(ROOT / FLUX.script, command, {"WANDB_MODE": "offline"}, log)
    process.join(200)
    assert process.exitcode == 0, log.read_text()[-2000:]
    tables = load_file(output / "3d-icon-flux_emb.safetensors")
    assert set(tables) == ({"clip_l", "t5"} if "--enable_t5_ti" in flags else {"clip_l"})
    has_lora = (output / "pytorch_lora_weights.safetensors").exists()
    assert has_lora == ("--train_transformer_frac=0" not in flags)


def draw(pipeline, prompt: str, **options) -> np.ndarray:
    """A small picture, (H, W, 3) between 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    options |= {"width": 64, "height": 64, "num_inference_steps": 2, "max_sequence_length": 77}
    return pipeline(prompt, **options, output_type="np", generator=generator).images[0]


def test_flux_inference_recipes(tmp_path):
    """What model cards and people's notebooks do, with nothing but diffusers."""
    import diffusers

    flags = ("-d", SAMPLE, "--train_text_encoder_ti", "--token_abstraction", "circle", "--enable_t5_ti")
    flags += ("--text_encoder_lr", 1e-2, "--learning_rate", 2e-2, "--train_text_encoder_ti_frac", 1)
    assert run_here(FLUX, tmp_path / "x", *flags) == 0
    pipeline = diffusers.FluxPipeline.from_pretrained(FLUX.base)
    pipeline.set_progress_bar_config(disable=True)
    base = draw(pipeline, "a red circle")
    pipeline.load_lora_weights(str(tmp_path / "x"), weight_name="pytorch_lora_weights.safetensors")
    full = draw(pipeline, "a red circle")
    assert np.abs(full - base).max() > 0.02
    half = draw(pipeline, "a red circle", joint_attention_kwargs={"scale": 0.5})
    none = draw(pipeline, "a red circle", joint_attention_kwargs={"scale": 0.0})
    assert np.abs(none - base).max() < 1e-4 and np.abs(half - full).max() > 1e-3 < np.abs(half - base).max()
    tables = load_file(tmp_path / "x" / "x_emb.safetensors")
    before = draw(pipeline, "a <s0><s1> on a blue background")
    tokens = ["<s0>", "<s1>"]
    for key, encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("t5", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        first = encoder.get_input_embeddings().weight.detach().clone()
        parts = {"text_encoder": encoder, "tokenizer": tokenizer}
        pipeline.load_textual_inversion(tables[key], token=tokens, **parts)
        weight, ids = encoder.get_input_embeddings().weight, tokenizer.convert_tokens_to_ids(tokens)
        assert torch.equal(weight[ids], tables[key]) and torch.equal(weight[: min(ids)], first[: min(ids)])
    assert np.abs(draw(pipeline, "a <s0><s1> on a blue background") - before).max() > 1e-3


def test_schnell_has_no_guidance_to_train_with(tmp_path, capsys):
    """A base without guidance embedding trains; --guidance_scale, which it could not use, is refused."""
    from diffusers import FluxTransformer2DModel

    base = tmp_path / "schnell"
    shutil.copytree(FLUX.base, base)
    config = json.loads((base / "transformer" / "config.json").read_text()) | {"guidance_embeds": False}
    shutil.rmtree(base / "transformer")
    FluxTransformer2DModel.from_config(config).save_pretrained(base / "transformer")
    schedule = base / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | {"use_dynamic_shifting": False}))
    flags = ("-d", SAMPLE, "-m", base, "--max_train_steps", 1)
    drawing = ("--num_validation_images", 1, "--validation_inference_steps", 1)
    assert run_here(FLUX, tmp_path / "x", *flags, *drawing) == 0
    recipe = load_script(FLUX.script)
    args = recipe.parse_args(quick_flags(FLUX, tmp_path / "y", *flags, "--num_validation_images", 1))
    recipe.check_base(Components(base, args, torch.float32, torch.device("cpu")))
    assert "draws in 4 steps" in capsys.readouterr().out
    assert run_here(FLUX, tmp_path / "y", *flags, "--guidance_scale", 1) == 2
    assert "--guidance_scale has no effect" in capsys.readouterr().err


def test_flux_with_a_vae_of_another_factor_draws(tmp_path):
    """The tiny pipelines that people smoke-test with shrink pictures by 2 or not at all, not by 8."""
    from diffusers import AutoencoderKL

    base = tmp_path / "tiny"
    shutil.copytree(FLUX.base, base)
    shutil.rmtree(base / "vae")
    options = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 16}
    options |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**options, layers_per_block=1).save_pretrained(base / "vae")
    drawing = ("--num_validation_images", 1, "--validation_inference_steps", 1, "--resolution", 32, 48)
    flags = ("-d", SAMPLE, "-m", base, "--max_train_steps", 1)
    assert run_here(FLUX, tmp_path / "x", *flags, *drawing) == 0
    (picture,) = (tmp_path / "x" / "samples" / "step-000001").glob("00_00_*.png")
    assert Image.open(picture).size == (32, 48)
