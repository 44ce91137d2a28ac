"""What other trainers get wrong, done right here: each test is a fault that people have met elsewhere."""

import pytest
import torch
from conftest import FAMILIES, KINDS, ROOT, SAMPLE, load_script, losses, metrics, run_here, weights
from safetensors.torch import load_file

from lora_training.optim.guard import NonFiniteGuard

pytestmark = pytest.mark.run

PRIOR = ("--with_prior_preservation", "--class_prompt", "a circle", "--num_class_images", 3)
WEIGHTING = {"sd15": ("--snr_gamma", 5), "sdxl": ("--snr_gamma", 5)}
TOKENS = ("--train_text_encoder_ti", "--token_abstraction", "circle", "--text_encoder_lr", 1e-2)


@pytest.mark.parametrize(("batch", "text"), [(1, False), (3, True)], ids=["frozen text", "text encoder"])
def test_prior_preservation_sums_two_weighted_means(
    family, script, shelf, tmp_path, monkeypatch, batch, text
):
    """The logged loss is mean(instance) + 0.3 mean(class), each sample with its weight of the noise level; every caption
    has embeddings of its own row: none is folded into another's channels.
    """
    drawn = shelf / f"class {family.name}"
    seen, original = {}, script.compute_loss

    def recorded(data, latents, embeds, *rest):
        losses = original(data, latents, embeds, *rest)
        seen.update(losses=losses.detach(), weight=data["weight"], captions=data["captions"], embeds=embeds)
        return losses

    monkeypatch.setattr(script, "compute_loss", recorded)
    weighting = WEIGHTING.get(family.name, ("--weighting_scheme", "sigma_sqrt"))
    flags = ("-d", SAMPLE, *PRIOR, "--prior_loss_weight", 0.3, "--class_data_dir", drawn, *weighting)
    flags += ("--train_batch_size", batch, "--max_train_steps", 1, "--validation_inference_steps", 1)
    flags += ("--train_text_encoder",) if text else ()
    assert run_here(family, tmp_path / "x", *flags) == 0
    is_class = torch.tensor([caption == "a circle" for caption in seen["captions"]])
    assert is_class.sum() == (~is_class).sum() == batch
    expected = seen["losses"][~is_class].mean() + 0.3 * seen["losses"][is_class].mean()
    assert losses(tmp_path / "x")[0] == pytest.approx(expected.item(), rel=1e-5)
    rows = seen["embeds"]["prompt_embeds"].detach()
    assert rows.shape[0] == 2 * batch and torch.isfinite(rows).all()
    assert torch.allclose(rows[is_class], rows[is_class][:1].expand_as(rows[is_class]), atol=1e-5)
    assert not torch.allclose(rows[is_class][0], rows[~is_class][0], atol=1e-3)


def test_text_encoder_lora_is_in_the_file_and_loads(family, studio, tmp_path):
    flags = ("-d", SAMPLE, "--train_text_encoder", "--text_encoder_lr", 1e-2, "--learning_rate", 1e-2)
    assert run_here(family, tmp_path / "x", *flags) == 0
    saved = weights(tmp_path / "x")
    script = load_script(family.script)
    pipeline = studio.pipeline(tmp_path / "x")
    for key in script.TEXT_LORA_ENCODERS:
        name = script.FAMILY.text_encoders[key][1]
        assert any(
            k.startswith(f"lora.{name}.") and v.any() for k, v in saved.items() if "lora_B" in k or "up" in k
        )
        ups = [p for n, p in getattr(pipeline, name).named_parameters() if "lora_B" in n]
        assert ups and any(p.any() for p in ups)


def test_frozen_parts_are_freed(family, script, tmp_path, monkeypatch):
    """With caches a step runs neither VAE nor text encoder, and holds neither; tokens hold only their own encoders."""
    held, original = [], script.backward

    def recorded(run, batch, step, micro):
        held.append(
            set(run.components.loaded)
            - {"scheduler"}
            - {n for n in run.components.loaded if "tokenizer" in n}
        )
        return original(run, batch, step, micro)

    monkeypatch.setattr(script, "backward", recorded)
    assert (
        run_here(
            family, tmp_path / "x", "-d", SAMPLE, "--cache_latents", *PRIOR, "--validation_inference_steps", 1
        )
        == 0
    )
    assert held == [{script.FAMILY.denoiser}] * 3
    held.clear()
    flags = (*TOKENS, "--train_text_encoder_ti_frac", 0.5, "--max_train_steps", 4)
    assert run_here(family, tmp_path / "y", "-d", SAMPLE, "--cache_latents", *flags) == 0
    own = {script.FAMILY.text_encoders[key][1] for key in script.TI_ENCODERS}
    assert held == [{script.FAMILY.denoiser} | own] * 2 + [{script.FAMILY.denoiser}] * 2


@pytest.mark.families(*KINDS)
def test_one_epoch_is_enough_for_tokens_to_move(family, script, tmp_path):
    """The pivot is compared with the step: with one epoch in all, half of the steps still train the tokens."""
    from conftest import quick_flags

    words = quick_flags(family, tmp_path / "x", "-d", SAMPLE, *TOKENS, "--num_train_epochs", 1, "--seed", 7)
    at = words.index("--max_train_steps")
    assert script.main(words[:at] + words[at + 2 :]) == 0
    rows = metrics(tmp_path / "x")
    assert len(rows) == 12
    assert ["lr_embeddings" in row for row in rows] == [True] * 6 + [False] * 6
    table = load_file(tmp_path / "x" / "x_emb.safetensors")
    assert set(table) == set(script.TI_ENCODERS)
    assert all(v.shape[0] == 2 and torch.isfinite(v).all() for v in table.values())


def test_prodigy_keeps_the_text_learning_rate(family, tmp_path):
    flags = ("--optimizer", "prodigy", "--learning_rate", 1, *TOKENS[:3], "--text_encoder_lr", 0.25)
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, *flags, "--max_train_steps", 2) == 0
    first = metrics(tmp_path / "x")[0]
    assert first["lr_embeddings"] / first["lr_denoiser"] == pytest.approx(0.25, rel=0.5)


@pytest.mark.families(*KINDS)
def test_only_what_is_trained_counts_in_the_clipping_norm(family, script, tmp_path, monkeypatch):
    """After the pivot the norm is that of the LoRA alone, and no other parameter has a gradient."""
    found, original = [], NonFiniteGuard.apply

    def recorded(self, parts, accelerator, max_norm):
        alone = torch.stack([part.gradients.norm() for part in parts]).norm()
        norm = original(self, parts, accelerator, max_norm)
        found.append(([part.name for part in parts], torch.allclose(norm, alone)))
        return norm

    monkeypatch.setattr(NonFiniteGuard, "apply", recorded)
    flags = (*TOKENS, "--max_train_steps", 2)
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, *flags) == 0
    assert found == [(["embeddings", "denoiser"], True), (["denoiser"], True)]


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_t5_reads_as_many_tokens_as_asked(name, tmp_path, monkeypatch):
    family = FAMILIES[name]
    script = load_script(family.script)
    shapes, original = [], script.compute_loss

    def recorded(batch, latents, embeds, *rest):
        shapes.append(embeds["prompt_embeds"].shape[1])
        return original(batch, latents, embeds, *rest)

    monkeypatch.setattr(script, "compute_loss", recorded)
    flags = ("-d", SAMPLE, "--max_sequence_length", 120, "--max_train_steps", 1)
    assert run_here(family, tmp_path / "x", *flags) == 0
    assert shapes == [120 + (77 if name == "sd3" else 0)]


@pytest.mark.parametrize(("name", "frac"), [("flux", 0.5), ("sd3", 0.8)])
def test_t5_tokens_are_trained_and_resumed(name, frac, tmp_path):
    from conftest import same_weights

    family = FAMILIES[name]
    flags = ("-d", SAMPLE, *TOKENS, "--enable_t5_ti", "--train_text_encoder_ti_frac", frac)
    flags += ("--max_train_steps", 6, "--checkpointing_steps", 3)
    assert run_here(family, tmp_path / "a" / "x", *flags) == 0
    table = load_file(tmp_path / "a" / "x" / "x_emb.safetensors")
    start = load_file(tmp_path / "a" / "x" / "checkpoint-3" / "x_emb.safetensors")
    assert "t5" in table and "clip_l" in table
    moves = frac > 0.5
    assert all(torch.equal(table[k], start[k]) != moves for k in table)
    import shutil

    shutil.copytree(tmp_path / "a" / "x" / "checkpoint-3", tmp_path / "b" / "x" / "checkpoint-3")
    assert run_here(family, tmp_path / "b" / "x", *flags, "--resume_from_checkpoint", "latest") == 0
    assert same_weights(tmp_path / "a" / "x", tmp_path / "b" / "x")


@pytest.mark.families("sdxl")
def test_folder_name_with_a_slash_names_the_files(family, tmp_path):
    assert run_here(family, f"{tmp_path}/name/", "-d", SAMPLE, *TOKENS, "--max_train_steps", 1) == 0
    names = {f.name for f in (tmp_path / "name").glob("*.safetensors")}
    assert names == {"pytorch_lora_weights.safetensors", "name.safetensors", "name_emb.safetensors"}


ICONS = ("--caption_column", "prompt", "--instance_prompt", "3d icon in the style of TOK", "--repeats", 1)
PIVOTAL = (
    "--train_text_encoder_ti",
    "--train_text_encoder_ti_frac=0.5",
    "--optimizer=prodigy",
    "--learning_rate=1.0",
)
PIVOTAL += ("--text_encoder_lr=1.0", "--lr_scheduler=constant", "--lr_warmup_steps=0", "--rank=8")


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(
    "flags",
    [
        PIVOTAL,
        (*PIVOTAL, "--enable_t5_ti"),
        (*PIVOTAL, "--train_transformer_frac=0"),
        (*PIVOTAL, "--enable_t5_ti", "--train_transformer_frac=0"),
    ],
    ids=["pivotal", "pivotal, T5", "inversion", "inversion, T5"],
)
def test_the_published_flux_commands_run(flags, tmp_path):
    """As people type them for diffusers' Flux script, with local model and data set, and (once) W&B offline."""

    import datasets

    rows = [
        {"image": str(f), "prompt": f"a TOK icon {k}"} for k, f in enumerate(sorted(SAMPLE.glob("*.png"))[:4])
    ]
    from ready_process import start

    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "3d-icon")
    output = tmp_path / "3d-icon-flux"
    command = [
        "--pretrained_model_name_or_path",
        FAMILIES["flux"].base,
        "--dataset_name",
        str(tmp_path / "3d-icon"),
    ]
    command += [
        *map(str, ICONS),
        *flags,
        "--output_dir",
        str(output),
        "--mixed_precision=bf16",
        "--resolution=64",
    ]
    command += [
        "--train_batch_size=1",
        "--gradient_accumulation_steps=1",
        "--gradient_checkpointing",
        "--seed=0",
    ]
    tracker = "wandb" if flags == PIVOTAL else "none"  # which takes as long to start as the run
    command += [
        f"--report_to={tracker}",
        "--max_train_steps=4",
        "--checkpointing_steps=2000",
        "--max_sequence_length=77",
    ]
    command += [
        "--num_validation_images=1",
        "--validation_inference_steps=1",
        "--validation_prompt=a <s0><s1> icon",
    ]
    command += ["--validation_epochs=25"]
    script, log = ROOT / "train_dreambooth_lora_flux_advanced.py", tmp_path / "log"
    process = start(script, command, {"WANDB_MODE": "offline"}, log)
    process.join(200)
    assert process.exitcode == 0, log.read_text()[-2000:]
    table = load_file(output / "3d-icon-flux_emb.safetensors")
    assert set(table) == ({"clip_l", "t5"} if "--enable_t5_ti" in flags else {"clip_l"})
    assert (output / "pytorch_lora_weights.safetensors").exists() == (
        "--train_transformer_frac=0" not in flags
    )


def test_flux_inference_recipes(tmp_path):
    """What model cards and people's notebooks do, with nothing but diffusers."""
    import diffusers
    import numpy as np

    family = FAMILIES["flux"]
    flags = (
        "-d",
        SAMPLE,
        *TOKENS,
        "--enable_t5_ti",
        "--learning_rate",
        2e-2,
        "--train_text_encoder_ti_frac",
        1,
    )
    assert run_here(family, tmp_path / "x", *flags) == 0

    def draw(pipeline, prompt, **options):
        return pipeline(
            prompt, width=64, height=64, num_inference_steps=2, max_sequence_length=77, output_type="np",
            generator=torch.Generator().manual_seed(0), **options,
        ).images[0]  # fmt: skip

    pipeline = diffusers.FluxPipeline.from_pretrained(family.base)
    pipeline.set_progress_bar_config(disable=True)
    base = draw(pipeline, "a red circle")
    pipeline.load_lora_weights(str(tmp_path / "x"), weight_name="pytorch_lora_weights.safetensors")
    full = draw(pipeline, "a red circle")
    assert np.abs(full - base).max() > 0.02
    half = draw(pipeline, "a red circle", joint_attention_kwargs={"scale": 0.5})
    none = draw(pipeline, "a red circle", joint_attention_kwargs={"scale": 0.0})
    assert np.abs(none - base).max() < 1e-4 and np.abs(half - full).max() > 1e-3 < np.abs(half - base).max()
    state = load_file(tmp_path / "x" / "x_emb.safetensors")
    before = draw(pipeline, "a <s0><s1> on a blue background")
    tokens = ["<s0>", "<s1>"]
    for key, encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("t5", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        old = encoder.get_input_embeddings().weight.detach().clone()
        pipeline.load_textual_inversion(state[key], token=tokens, text_encoder=encoder, tokenizer=tokenizer)
        new = encoder.get_input_embeddings().weight
        ids = tokenizer.convert_tokens_to_ids(tokens)
        assert torch.equal(new[ids], state[key]) and torch.equal(new[: min(ids)], old[: min(ids)])
    assert np.abs(draw(pipeline, "a <s0><s1> on a blue background") - before).max() > 1e-3


def test_schnell_has_no_guidance_to_train_with(tmp_path, capsys):
    """A base without guidance embedding trains; --guidance_scale, which it could not use, is refused."""
    import json
    import shutil

    from diffusers import FluxTransformer2DModel

    family = FAMILIES["flux"]
    base = tmp_path / "schnell"
    shutil.copytree(family.base, base)
    config = json.loads((base / "transformer" / "config.json").read_text()) | {"guidance_embeds": False}
    shutil.rmtree(base / "transformer")
    FluxTransformer2DModel.from_config(config).save_pretrained(base / "transformer")
    schedule = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
    (base / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(schedule | {"use_dynamic_shifting": False})
    )
    shown = ("--num_validation_images", 1, "--validation_prompt", "a circle")
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, "-m", base, *shown) == 0
    assert "draws in 4 steps" in capsys.readouterr().out
    assert run_here(family, tmp_path / "y", "-d", SAMPLE, "-m", base, "--guidance_scale", 1) == 2
    assert "--guidance_scale has no effect" in capsys.readouterr().err


def test_flux_with_a_vae_of_another_factor_draws(tmp_path):
    """The tiny pipelines that people smoke-test with shrink pictures by 2 or not at all, not by 8."""
    import shutil

    from diffusers import AutoencoderKL

    family, base = FAMILIES["flux"], tmp_path / "tiny"
    shutil.copytree(family.base, base)
    shutil.rmtree(base / "vae")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=16, layers_per_block=1, **blocks
    )
    vae.save_pretrained(base / "vae")
    shown = ("--num_validation_images", 1, "--validation_inference_steps", 1, "--resolution", 32, 48)
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, "-m", base, *shown) == 0
    from PIL import Image

    (picture,) = (tmp_path / "x" / "samples" / "step-000003").glob("00_00_*.png")
    assert Image.open(picture).size == (32, 48)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_fp16_becomes_bf16_and_says_so(name, monkeypatch, tmp_path, capsys):
    family = FAMILIES[name]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # as accelerate's own configuration hands it on
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, "--max_train_steps", 1) == 0
    assert "using bf16" in capsys.readouterr().out
    assert {v.dtype for v in weights(tmp_path / "x").values()} == {torch.bfloat16}


@pytest.mark.families(*KINDS)
def test_lora_layers_keep_no_float32_activations(family, script, tmp_path, monkeypatch):
    """In bf16, what autograd keeps of a LoRA layer's input is bf16: no copy in the LoRA's own float32."""
    kept, original = [], script.backward

    def recorded(run, batch, step, micro):
        layer = next(m for n, m in run.denoiser.named_modules() if hasattr(m, "lora_A"))
        inputs = torch.randn(2, 5, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
        with run.accelerator.autocast(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
            layer(inputs)
        return original(run, batch, step, micro)

    monkeypatch.setattr(script, "backward", recorded)
    flags = ("-d", SAMPLE, "--mixed_precision", "bf16", "--max_train_steps", 1)
    assert run_here(family, tmp_path / "x", *flags) == 0
    assert kept and all(
        t.dtype == torch.bfloat16 for t in kept if t.numel() >= 2 * 5 * 4 and t.shape[:2] == (2, 5)
    )
