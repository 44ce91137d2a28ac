"""What other trainers get wrong, done right here: each test is a fault that people have met elsewhere."""

from __future__ import annotations

import pytest
import torch
from conftest import KINDS, SAMPLE, losses, metrics, quick_flags, run_argv_here, run_here, without_flag
from safetensors.torch import load_file

from lora_training.optim.guard import NonFiniteGuard

pytestmark = pytest.mark.run

PRIOR = ("--with_prior_preservation", "--class_prompt", "a circle", "--num_class_images", 3)
PRIOR += ("--validation_inference_steps", 1)
WEIGHTING = {"sd15": ("--snr_gamma", 5), "sdxl": ("--snr_gamma", 5)}
TOKENS = ("--train_text_encoder_ti", "--token_abstraction", "circle", "--text_encoder_lr", 1e-2)


@pytest.mark.parametrize(
    ("batch", "trains_text"), [(1, False), (3, True)], ids=["frozen text", "text encoder"]
)
def test_prior_preservation_sums_two_weighted_means(
    family, script, shelf, tmp_path, monkeypatch, batch, trains_text
):
    """The logged loss is mean(instance) + 0.3 mean(class), each sample with its weight of the noise level.

    Every caption has embeddings of its own row: none is folded into another's channels.
    """
    seen, original = {}, script.compute_loss

    def recorded(data, latents, embeds, *rest):
        losses = original(data, latents, embeds, *rest)
        seen.update(losses=losses.detach(), weight=data["weight"], captions=data["captions"], embeds=embeds)
        return losses

    monkeypatch.setattr(script, "compute_loss", recorded)
    weighting = WEIGHTING.get(family.name, ("--weighting_scheme", "sigma_sqrt"))
    flags = ("-d", SAMPLE, *PRIOR, "--prior_loss_weight", 0.3, *weighting)
    flags += ("--class_data_dir", shelf / f"class {family.name}")
    flags += ("--train_batch_size", batch, "--max_train_steps", 1)
    flags += ("--train_text_encoder",) if trains_text else ()
    assert run_here(family, tmp_path / "x", *flags) == 0
    is_class = torch.tensor([caption == "a circle" for caption in seen["captions"]])
    assert is_class.sum() == (~is_class).sum() == batch
    expected = seen["losses"][~is_class].mean() + 0.3 * seen["losses"][is_class].mean()
    assert losses(tmp_path / "x")[0] == pytest.approx(expected.item(), rel=1e-5)
    rows = seen["embeds"]["prompt_embeds"].detach()
    assert rows.shape[0] == 2 * batch and torch.isfinite(rows).all()
    assert torch.allclose(rows[is_class], rows[is_class][:1].expand_as(rows[is_class]), atol=1e-5)
    assert not torch.allclose(rows[is_class][0], rows[~is_class][0], atol=1e-3)


def test_frozen_parts_are_freed(family, script, shelf, tmp_path, monkeypatch):
    """With caches a step runs neither VAE nor text encoder, and holds neither; tokens hold only their own
    encoders.
    """
    held, original = [], script.backward

    def recorded(run, batch, step, micro_step):
        held.append({name for name in run.components.loaded if "tokenizer" not in name} - {"scheduler"})
        return original(run, batch, step, micro_step)

    monkeypatch.setattr(script, "backward", recorded)
    prior = (*PRIOR, "--class_data_dir", shelf / f"class {family.name}")
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, "--cache_latents", *prior) == 0
    assert held == [{script.FAMILY.denoiser}] * 3
    held.clear()
    flags = (*TOKENS, "--train_text_encoder_ti_frac", 0.5, "--max_train_steps", 4)
    assert run_here(family, tmp_path / "y", "-d", SAMPLE, "--cache_latents", *flags) == 0
    encoders = {script.FAMILY.text_encoders[key][1] for key in script.TI_ENCODERS}
    assert held == [{script.FAMILY.denoiser} | encoders] * 2 + [{script.FAMILY.denoiser}] * 2


@pytest.mark.families(*KINDS)
def test_one_epoch_is_enough_for_tokens_to_move(family, script, tmp_path):
    """The pivot is compared with the step: with one epoch in all, half of the steps train the tokens."""
    argv = quick_flags(family, tmp_path / "x", "-d", SAMPLE, *TOKENS, "--num_train_epochs", 1, "--seed", 7)
    assert run_argv_here(family, without_flag(argv, "--max_train_steps")) == 0
    rows = metrics(tmp_path / "x")
    assert len(rows) == 12
    assert ["lr_embeddings" in row for row in rows] == [True] * 6 + [False] * 6
    table = load_file(tmp_path / "x" / "x_emb.safetensors")
    assert set(table) == set(script.TI_ENCODERS)
    assert all(rows.shape[0] == 2 and torch.isfinite(rows).all() for rows in table.values())


@pytest.mark.families("sdxl")
def test_prodigy_keeps_the_text_learning_rate(family, tmp_path):
    flags = ("--optimizer", "prodigy", "--learning_rate", 1, *TOKENS[:3], "--text_encoder_lr", 0.25)
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, *flags, "--max_train_steps", 2) == 0
    first = metrics(tmp_path / "x")[0]
    assert first["lr_embeddings"] / first["lr_denoiser"] == pytest.approx(0.25, rel=0.5)


@pytest.mark.families("sdxl")
def test_only_what_is_trained_counts_in_the_clipping_norm(family, tmp_path, monkeypatch):
    """After the pivot the norm is that of the LoRA alone, and no other parameter has a gradient."""
    clipped, original = [], NonFiniteGuard.apply

    def recorded(self, parts, accelerator, max_norm):
        expected = torch.stack([part.gradients.norm() for part in parts]).norm()
        norm = original(self, parts, accelerator, max_norm)
        clipped.append(([part.name for part in parts], torch.allclose(norm, expected)))
        return norm

    monkeypatch.setattr(NonFiniteGuard, "apply", recorded)
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, *TOKENS, "--max_train_steps", 2) == 0
    assert clipped == [(["embeddings", "denoiser"], True), (["denoiser"], True)]


@pytest.mark.families(*KINDS)
def test_lora_layers_keep_no_float32_activations(family, script, tmp_path, monkeypatch):
    """In bf16, what autograd keeps of a LoRA layer's input is bf16: no copy in the LoRA's own float32."""
    saved, original = [], script.backward

    def recorded(run, batch, step, micro_step):
        layer = next(m for _, m in run.denoiser.named_modules() if hasattr(m, "lora_A"))
        inputs = torch.randn(2, 5, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
        hooks = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor)
        with run.accelerator.autocast(), hooks:
            layer(inputs)
        return original(run, batch, step, micro_step)

    monkeypatch.setattr(script, "backward", recorded)
    flags = ("-d", SAMPLE, "--mixed_precision", "bf16", "--max_train_steps", 1)
    assert run_here(family, tmp_path / "x", *flags) == 0
    activations = [t for t in saved if t.numel() >= 2 * 5 * 4 and t.shape[:2] == (2, 5)]
    assert saved and all(tensor.dtype == torch.bfloat16 for tensor in activations)
