"""Functions by themselves: sampling, captions, crops, token rows, loss, exports, the seam."""

import argparse
import ast
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import FAMILIES, ROOT, SAMPLE, load_script, prompts_of, target_layers, to_pixels, training_data

from lora_training.base_model.components import Components
from lora_training.base_model.reading import import_class
from lora_training.base_model.vae import pack_latents, unpack_latents
from lora_training.cache import DiskCache
from lora_training.data.batches import BatchPlan, Slot
from lora_training.data.buckets import nearest_bucket
from lora_training.data.captions import prepend_trigger
from lora_training.data.crops import Crop, crop_and_augment, draw_crop
from lora_training.data.folders import Example
from lora_training.data.image_store import ImageStore, prepare_examples
from lora_training.errors import UserError
from lora_training.files import list_checkpoints
from lora_training.lora.adapters import add_lora, lora_parameters
from lora_training.lora.formats import kohya_state
from lora_training.optim.guard import NonFiniteGuard
from lora_training.optim.optimizers import prepare_parts
from lora_training.optim.parts import TrainedPart, averaged_weights
from lora_training.seeds import stable_seed
from lora_training.text.tokens import TokenRows
from lora_training.text.words import abstraction_tokens, insert_tokens

pytestmark = pytest.mark.unit


def arguments(script, *flags):
    return script.parse_args(["-m", "base", "-d", str(SAMPLE), "--seed", "5", *(str(f) for f in flags)])


def examples_in(script, buckets):
    return [Example(f"{i}", ["a b"], None, bucket=b, size=(64, 64)) for i, b in enumerate(buckets)]


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_image_is_trained_once_per_epoch_whatever_the_batch(recipe, batch, processes):
    args = arguments(recipe, "--train_batch_size", batch, "--repeats", 2)
    plan = BatchPlan(examples_in(recipe, [0, 0, 1, 0, 2, 1, 0]), args, processes, 0)
    for epoch in (0, 1):
        seen, buckets = Counter(), set()
        for number in range(epoch * plan.per_epoch, (epoch + 1) * plan.per_epoch):
            shares = [plan.share(number, p) for p in range(processes)]
            assert len({len(s) for s in shares}) == 1  # no process waits for another
            slots = [s for share in shares for s in share if s.weight > 0]
            assert sum(s.weight for s in slots) == pytest.approx(1)
            assert len({s.bucket for share in shares for s in share}) == 1
            buckets |= {s.bucket for s in slots}
            seen.update((s.index, s.repeat) for s in slots)
        assert seen == Counter((i, r) for i in range(7) for r in range(2))
        assert buckets == {0, 1, 2}


def test_processes_share_what_one_process_does(recipe):
    images = examples_in(recipe, [0] * 5 + [1] * 4)
    one = BatchPlan(images, arguments(recipe, "--train_batch_size", 4), 1, 0)
    two = BatchPlan(images, arguments(recipe, "--train_batch_size", 2), 2, 0)
    for number in range(2 * one.per_epoch):
        joined = [s for p in range(2) for s in two.share(number, p) if s.weight]
        assert joined == one.share(number, 0)


def test_order_differs_between_epochs_and_seeds(recipe):
    images = examples_in(recipe, [0] * 12)
    plans = [BatchPlan(images, arguments(recipe, "--seed", s), 1, 0) for s in (5, 6)]
    orders = [[b[0].index for b in plan.epoch(e)] for plan in plans for e in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_prior_preservation_weighs_each_half_on_its_own(recipe, batch):
    flags = (
        "--with_prior_preservation",
        "--class_prompt",
        "x",
        "--prior_loss_weight",
        0.3,
        "--train_batch_size",
        batch,
    )
    plan = BatchPlan(examples_in(recipe, [0] * 7), arguments(recipe, *flags), 2, 4)
    drawn = Counter()
    for number in range(plan.per_epoch):
        slots = [s for p in range(2) for s in plan.share(number, p)]
        assert sum(s.weight for s in slots if not s.is_class) == pytest.approx(1)
        assert sum(s.weight for s in slots if s.is_class) == pytest.approx(0.3)
        drawn.update(s.index for s in slots if s.is_class and s.weight)
    assert set(drawn) == {0, 1, 2, 3} and max(drawn.values()) - min(drawn.values()) <= 1


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a dog", "sks", "sks, a dog"),
        ("a sks dog", "sks", "a sks dog"),
        ("Sks, a dog", "sks", "Sks, a dog"),
        ("skstown", "sks", "sks, skstown"),
        ("", "sks", "sks"),
        ("a dog", None, "a dog"),
        ("red bike, a dog", "red bike", "red bike, a dog"),
    ],
)
def test_trigger_word_stands_once(caption, trigger, expected):
    assert prepend_trigger(caption, trigger) == expected


def test_caption_draws(recipe):
    args = arguments(recipe, "--shuffle_tags", "--trigger_word", "sks", "--caption_dropout", 0.25)
    drawn = [recipe.draw_caption(["a, b, c", "d"], random.Random(i), args) for i in range(400)]
    assert 60 < drawn.count("") < 140
    kept = [c for c in drawn if c]
    assert all(c.startswith("sks, ") for c in kept)
    assert {tuple(sorted(c.split(", "))) for c in kept} == {("a", "b", "c", "sks"), ("d", "sks")}
    assert len(set(kept)) == 7


def test_nearest_bucket_goes_by_aspect_ratio():
    buckets = [(64, 64), (96, 48), (48, 96), (128, 64)]
    assert nearest_bucket((1000, 1000), buckets) == 0
    assert nearest_bucket((2000, 1000), buckets) == 3  # the larger of two with the same ratio
    assert nearest_bucket((100, 50), buckets) == 1
    assert nearest_bucket((300, 900), buckets) == 2


def test_images_are_covered_and_cropped_never_squashed(recipe, tmp_path):
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (400, 200), "white")
    ImageDraw.Draw(image).ellipse((150, 50, 250, 150), fill="black")
    image.save(tmp_path / "x.png")
    example = Example("x", [""], (tmp_path / "x.png").read_bytes)
    store = ImageStore([example], [(64, 64)], "lanczos", 1 << 20)
    cover = store.cover(0, 0)
    assert cover.size == (128, 64)
    args = arguments(recipe, "--center_crop")
    crop = draw_crop(cover.size, (64, 64), random.Random(0), args)
    view = to_pixels(crop_and_augment(cover, (64, 64), crop, random.Random(0), args))
    dark = (view.float().mean(0) < 127.5).nonzero()
    height, width = (dark.max(0).values - dark.min(0).values).tolist()
    assert abs(height - width) <= 1 and 28 <= width <= 34
    assert view.shape == (3, 64, 64) and view.max() == 255


def test_rotation_leaves_no_empty_corner(recipe):
    from PIL import Image

    args = arguments(recipe, "--random_rotation", 30, "--random_rotation_prob", 1)
    for seed in range(20):
        view = crop_and_augment(
            Image.new("RGB", (64, 96), "white"), (64, 64), Crop(0, 16, False), random.Random(seed), args
        )
        assert min(view.convert("L").tobytes()) > 250


def test_draws_depend_on_the_place_alone():
    assert stable_seed(1, "a", 2) == stable_seed(1, "a", 2) != stable_seed(1, "a", 3)
    assert 0 <= stable_seed("x") < 2**63


def test_token_rows_change_nothing_else(script, family):
    components = Components(
        __import__("pathlib").Path(family.base), arguments(script), torch.float32, torch.device("cpu")
    )
    for key in script.TI_ENCODERS:
        tokenizer, encoder = (components.get(n) for n in script.FAMILY.text_encoders[key])
        before = encoder.get_input_embeddings().weight.detach().clone()
        row = TokenRows(tokenizer, encoder, ["<s0>", "<s1>"], None, 0)
        assert row.initial.std() == pytest.approx(before.std().item(), rel=0.3)
        ids = tokenizer(["a <s0><s1> b"], return_tensors="pt").input_ids
        encoder(ids)[0][..., 0].sum().backward()
        assert row.weight.grad.abs().sum() > 0
        table = encoder.get_input_embeddings().weight
        assert torch.equal(table[: len(before)], before) and table.grad is None
        started = TokenRows(tokenizer, encoder, ["<s2>"], "star", 0)
        assert torch.equal(started.initial, before[tokenizer("star", add_special_tokens=False).input_ids])


def test_rows_reach_a_table_that_has_room_already():
    """T5's released table is longer than its vocabulary, so nothing is resized, and its encoder reads a second layer."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    script = load_script("train_dreambooth_lora_flux_advanced.py")
    tokenizer = T5Tokenizer.from_pretrained(ROOT / "assets" / "toy_flux" / "tokenizer_2")
    config = T5Config(vocab_size=len(tokenizer) + 28, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    encoder = T5EncoderModel(config).eval()
    row = TokenRows(tokenizer, encoder, ["<s0>", "<s1>"], None, 0)
    assert encoder.get_input_embeddings().num_embeddings == len(tokenizer) + 26
    encoder(tokenizer(["a <s0><s1>"], return_tensors="pt").input_ids)[0][..., 0].sum().backward()
    assert (row.weight.grad.abs().sum(1) > 0).all()


def test_insert_tokens():
    args = argparse.Namespace(
        train_text_encoder_ti=True,
        num_new_tokens_per_abstraction=2,
        initializer_concept=None,
        token_abstraction="TOK, TOKEN",
    )
    words = abstraction_tokens(args, None)
    assert words == {"TOK": ["<s0>", "<s1>"], "TOKEN": ["<s2>", "<s3>"]}
    assert insert_tokens("a TOKEN and TOK", words) == "a <s2><s3> and <s0><s1>"


def test_kohya_keys_carry_each_alpha(script, family):
    """Every layer that a LoRA can have gets its own alpha, and no two layers the same key."""
    config = script.json.loads(
        (ROOT / "assets" / f"toy_{family.name}" / script.FAMILY.denoiser / "config.json").read_text()
    )
    denoiser = load_denoiser(script, family)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = {n: m.weight.shape for n, m in denoiser.named_modules() if isinstance(m, kinds)}
    names, state = list(layers), {}
    for n, (out_features, in_features, *_) in layers.items():
        state |= {
            f"{n}.lora_A.weight": torch.ones(4, in_features),
            f"{n}.lora_B.weight": torch.ones(out_features, 4),
        }
    text = {f"encoder.layers.0.self_attn.q_proj.lora_{m}.weight": torch.ones(4, 8) for m in "AB"}
    out = kohya_state(script.FAMILY, {script.FAMILY.denoiser: state, "text_encoder": text}, 2.0, config)
    modules = {k.split(".")[0] for k in out}
    assert all(
        f"{m}.{end}" in out for m in modules for end in ("alpha", "lora_down.weight", "lora_up.weight")
    )
    assert len(out) == 3 * len(modules) and all("." not in m for m in modules)
    prefix = script.FAMILY.kohya_prefixes["text_encoder"]
    assert out[f"{prefix}_text_model_encoder_layers_0_self_attn_q_proj.alpha"] == 2
    if family.name in ("sd15", "sdxl"):  # no projections are fused
        assert len(modules) == len(names) + 1
        assert all(v == 2 for k, v in out.items() if k.endswith("alpha"))


def load_denoiser(script, family):
    path = __import__("pathlib").Path(family.base)
    return Components(path, arguments(script), torch.float32, torch.device("cpu")).denoiser()


def test_sdxl_keys_are_those_of_the_original_checkpoint():
    """Spot checks with the real model's layer counts (two per level), from the public key lists of kohya's files."""
    script = load_script("train_lora_sdxl.py")
    config = {
        "layers_per_block": 2,
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    }
    pairs = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "down_blocks.2.attentions.1.proj_in": "input_blocks_8_1_proj_in",
        "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
        "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
        "mid_block.attentions.0.transformer_blocks.9.ff.net.2": "middle_block_1_transformer_blocks_9_ff_net_2",
        "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
        "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_out.0": "output_blocks_2_1_transformer_blocks_0_attn2_to_out_0",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        "up_blocks.1.attentions.0.proj_out": "output_blocks_3_1_proj_out",
        "up_blocks.2.resnets.0.conv_shortcut": "output_blocks_6_0_skip_connection",
    }
    state = {f"{k}.lora_{m}.weight": torch.ones(1, 1) for k in pairs for m in "AB"}
    out = kohya_state(script.FAMILY, {"unet": state}, 1.0, config)
    assert {k.split(".")[0] for k in out} == {f"lora_unet_{v}" for v in pairs.values()}


def test_lora_is_float32_on_a_bf16_base_and_the_clip_clips(script, family):
    args = arguments(script, "--rank", 2)
    components = Components(
        __import__("pathlib").Path(family.base), args, torch.bfloat16, torch.device("cpu")
    )
    denoiser = components.denoiser()
    add_lora(denoiser, target_layers(script, denoiser, args), args)
    trained = lora_parameters(denoiser)
    assert trained and all(p.dtype == torch.float32 for p in trained.values())
    assert all(p.dtype == torch.bfloat16 for p in denoiser.parameters() if not p.requires_grad)
    part = TrainedPart("denoiser", trained, 1e-4, 0.0, 10)
    part.allocate()
    part.gradients.fill_(3.0)
    accelerator = argparse.Namespace(num_processes=1)
    guard = NonFiniteGuard(torch.device("cpu"), half=False)
    norm = guard.apply([part], accelerator, 0.5)
    assert norm == pytest.approx(3.0 * len(part.gradients) ** 0.5, rel=1e-4)
    flat = torch.cat([p.grad.flatten() for p in trained.values()])
    assert torch.linalg.vector_norm(flat) == pytest.approx(0.5, rel=1e-3)


def test_averages_are_swapped_back_exactly(recipe):
    parameter = torch.nn.Parameter(torch.randn(5))
    part = TrainedPart("denoiser", {"x": parameter}, 1e-2, 0.0, 10)
    prepare_parts([part], arguments(recipe, "--use_ema", "--ema_decay", 0.5))
    for _ in range(3):
        parameter.grad.copy_(torch.randn(5))
        part.step()
    raw = parameter.detach().clone()
    with averaged_weights([part]):
        assert not torch.equal(parameter, raw)
    assert torch.equal(parameter, raw)


def test_cache_entries_belong_to_their_content(tmp_path):
    cache = DiskCache(str(tmp_path), "latents")
    cache.store({"moments": torch.ones(2)}, "image", "vae")
    assert torch.equal(cache.load("image", "vae")["moments"], torch.ones(2))
    assert cache.load("image", "other vae") is None
    file = next((tmp_path / "latents").iterdir())
    file.write_bytes(b"broken")
    assert cache.load("image", "vae") is None


@pytest.mark.parametrize(
    "name", sorted(n for n, f in FAMILIES.items() if f.pipeline.endswith(("DiffusionPipeline", "XLPipeline")))
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "extra",
    [{}, {"snr_gamma": 5.0}, {"loss_type": "huber"}, {"input_perturbation": 0.1}, {"noise_offset": 0.1}],
)
def test_noise_prediction_loss_against_its_formula(name, prediction, extra):
    from diffusers import DDPMScheduler

    script = load_script(FAMILIES[name].script)
    args = argparse.Namespace(
        **(
            {
                "snr_gamma": None,
                "loss_type": "l2",
                "huber_c": 0.1,
                "input_perturbation": 0.0,
                "noise_offset": 0.0,
            }
            | {"min_timestep": 0, "max_timestep": 1000}
            | extra
        )
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
    )
    rows = [script.draw_noise(torch.Generator().manual_seed(i), (4, 8, 8), scheduler, args) for i in range(3)]
    batch = {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
    batch |= {
        "original_size": torch.ones(3, 2),
        "crop_top_left": torch.zeros(3, 2),
        "target_size": torch.ones(3, 2),
    }
    latents, seen = torch.randn(3, 4, 8, 8), {}

    class Denoiser:
        dtype = torch.float32

        def __call__(self, noisy, *rest, **options):
            seen["noisy"] = noisy
            return argparse.Namespace(sample=noisy * 0.3 + 0.1)

    embeds = {"prompt_embeds": torch.zeros(3, 7, 5), "pooled_prompt_embeds": torch.zeros(3, 5)}
    loss = script.compute_loss(batch, latents, embeds, Denoiser(), scheduler, args)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    level = torch.cumprod(1 - betas, 0)[batch["timesteps"]].view(3, 1, 1, 1)
    a, s = level.sqrt(), (1 - level).sqrt()
    noise = batch["noise"].double()
    used = noise + 0.1 * batch["perturbation"] if "input_perturbation" in extra else noise
    noisy = a * latents + s * used
    assert torch.allclose(seen["noisy"].double(), noisy, atol=1e-5)
    target = noise if prediction == "epsilon" else a * noise - s * latents
    error = (noisy * 0.3 + 0.1 - target) ** 2
    if "loss_type" in extra:
        error = 0.2 * ((error + 0.01).sqrt() - 0.1)
    wanted = error.mean((1, 2, 3))
    if "snr_gamma" in extra:
        snr = (a**2 / s**2).flatten()
        wanted = (
            wanted * torch.minimum(snr, torch.tensor(5.0)) / (snr if prediction == "epsilon" else snr + 1)
        )
    assert torch.allclose(loss.double(), wanted, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(n for n in FAMILIES if n == "sd3"))
@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "cosmap", "sigma_sqrt", "none"])
@pytest.mark.parametrize("precondition", [True, False])
def test_flow_loss_against_its_formula(name, scheme, precondition):
    import math

    from diffusers import FlowMatchEulerDiscreteScheduler

    script = load_script(FAMILIES[name].script)
    args = argparse.Namespace(
        weighting_scheme=scheme,
        logit_mean=0.0,
        logit_std=1.0,
        mode_scale=1.29,
        timestep_sampling="weighting_scheme",
        min_timestep=0,
        max_timestep=1000,
        precondition_outputs=precondition,
        loss_type="l2",
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    rows = [script.draw_noise(torch.Generator().manual_seed(i), (4, 8, 8), scheduler, args) for i in range(3)]
    batch = {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
    latents, seen = torch.randn(3, 4, 8, 8), {}

    class Denoiser:
        dtype = torch.float32

        def __call__(self, hidden_states, timestep, **options):
            seen["noisy"], seen["timestep"] = hidden_states, timestep
            return argparse.Namespace(sample=hidden_states * 0.3 + 0.1)

    embeds = {"prompt_embeds": torch.zeros(3, 7, 5), "pooled_prompt_embeds": torch.zeros(3, 5)}
    loss = script.compute_loss(batch, latents, embeds, Denoiser(), scheduler, args)
    t = batch["sigmas"].double().view(3, 1, 1, 1)
    u = t / (3 - 2 * t)  # the shift of 3 undone
    assert torch.allclose(u.flatten() * 1000, (u.flatten() * 1000).round(), atol=1e-2)
    assert torch.allclose(seen["timestep"].double(), t.flatten() * 1000, rtol=1e-4)
    noise = batch["noise"].double()
    noisy = (1 - t) * latents + t * noise
    assert torch.allclose(seen["noisy"].double(), noisy, atol=1e-5)
    output = noisy * 0.3 + 0.1
    error = (noisy - t * output - latents) ** 2 if precondition else (output - (noise - latents)) ** 2
    weight = {"sigma_sqrt": t**-2, "cosmap": 2 / (math.pi * (1 - 2 * t + 2 * t**2))}.get(
        scheme, torch.ones_like(t)
    )
    assert torch.allclose(loss.double(), (weight * error).mean((1, 2, 3)), rtol=1e-3)


def test_sd3_fused_keys_give_the_same_update():
    """q, k and v as one layer with the names of the original checkpoint: the same change of weights, alpha/rank kept."""
    script = load_script("train_lora_sd3.py")
    names = {"attn.to_q": 0, "attn.to_k": 1, "attn.to_v": 2}
    state = {}
    for name in ("attn.to_q", "attn.to_v", "attn.to_out.0", "ff.net.2"):  # no LoRA on k
        state[f"transformer_blocks.3.{name}.lora_A.weight"] = torch.randn(4, 16)
        state[f"transformer_blocks.3.{name}.lora_B.weight"] = torch.randn(16, 4)
    out = kohya_state(script.FAMILY, {"transformer": state}, 2.0, {"num_layers": 24})
    expected = {"x_block_attn_qkv", "x_block_attn_proj", "x_block_mlp_fc2"}
    assert {k.split(".")[0] for k in out} == {f"lora_unet_joint_blocks_3_{e}" for e in expected}
    key = "lora_unet_joint_blocks_3_x_block_attn_qkv"
    down, up, alpha = (out[f"{key}.{k}"] for k in ("lora_down.weight", "lora_up.weight", "alpha"))
    update = up @ down * (alpha / len(down))
    for name, row in names.items():
        part = update[row * 16 : (row + 1) * 16]
        if name == "attn.to_k":
            assert not part.any()
        else:
            a, b = (state[f"transformer_blocks.3.{name}.lora_{m}.weight"] for m in "AB")
            assert torch.allclose(part, b @ a * (2.0 / 4), atol=1e-5)


def flux_state(names_and_shapes: dict, rank: int) -> dict:
    """A LoRA with peft's keys, by layer name and (out, in)."""
    state = {}
    for name, (rows, columns) in names_and_shapes.items():
        state[f"{name}.lora_A.weight"] = torch.randn(rank, columns)
        state[f"{name}.lora_B.weight"] = torch.randn(rows, rank)
    return state


def test_flux_file_for_other_tools_reads_back_as_the_same_lora():
    """At the real model's width, through diffusers' own reader of kohya's Flux files; alpha half the rank."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    script = load_script("train_dreambooth_lora_flux_advanced.py")
    d = 3072
    layers = {}
    for k in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj"):
        layers[f"transformer_blocks.18.{k}"] = (d, d)
    layers |= {
        "transformer_blocks.18.attn.add_v_proj": (d, d),
        "transformer_blocks.18.attn.to_add_out": (d, d),
    }
    layers |= {
        "transformer_blocks.0.ff.net.0.proj": (4 * d, d),
        "transformer_blocks.0.ff_context.net.2": (d, 4 * d),
    }
    layers |= {f"single_transformer_blocks.37.attn.to_{k}": (d, d) for k in "qkv"}
    layers |= {
        "single_transformer_blocks.37.proj_mlp": (4 * d, d),
        "single_transformer_blocks.37.proj_out": (d, 5 * d),
    }
    state = flux_state(layers, 2)
    config = {"num_attention_heads": 24, "attention_head_dim": 128}
    out = kohya_state(script.FAMILY, {"transformer": state}, 1.0, config)
    names = {k.split(".")[0].removeprefix("lora_unet_") for k in out}
    double = {
        f"double_blocks_18_{e}" for e in ("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj")
    }
    double |= {"double_blocks_0_img_mlp_0", "double_blocks_0_txt_mlp_2"}
    assert names == double | {"single_blocks_37_linear1", "single_blocks_37_linear2"}
    back = _convert_kohya_flux_lora_to_diffusers(dict(out))
    for name in layers:
        a, b = (state[f"{name}.lora_{m}.weight"] for m in "AB")
        a2, b2 = (back[f"transformer.{name}.lora_{m}.weight"] for m in "AB")
        x = torch.randn(a.shape[1])
        assert torch.allclose(b2 @ (a2 @ x), b @ (a @ x) / 2, atol=1e-3), name


def test_flux_fuses_what_is_there_and_keeps_dora():
    script = load_script("train_dreambooth_lora_flux_advanced.py")
    config = {"num_attention_heads": 2, "attention_head_dim": 4}
    block = "single_transformer_blocks.0"
    state = flux_state({f"{block}.attn.to_k": (8, 8), f"{block}.proj_mlp": (32, 8)}, 2)
    out = kohya_state(script.FAMILY, {"transformer": state}, 2.0, config)
    up, down = (out[f"lora_unet_single_blocks_0_linear1.lora_{w}.weight"] for w in ("up", "down"))
    update = up @ down * (out["lora_unet_single_blocks_0_linear1.alpha"] / len(down))
    expected = torch.zeros(56, 8)
    for name, rows in (("attn.to_k", slice(8, 16)), ("proj_mlp", slice(24, 56))):
        expected[rows] = state[f"{block}.{name}.lora_B.weight"] @ state[f"{block}.{name}.lora_A.weight"]
    assert torch.allclose(update, expected, atol=1e-5)
    dora = state | {
        f"{block}.{n}.lora_magnitude_vector": torch.ones(r) for n, r in (("attn.to_k", 8), ("proj_mlp", 32))
    }
    with pytest.raises(ValueError, match="DoRA on some"):
        kohya_state(script.FAMILY, {"transformer": dora}, 2.0, config)


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("guided", [True, False])
def test_flux_loss_against_its_formula(scheme, guided):
    """Velocity noise - latents on packed latents; weights by hand; guidance only where the base has it."""
    from diffusers import FluxPipeline

    script = load_script("train_dreambooth_lora_flux_advanced.py")
    args = argparse.Namespace(weighting_scheme=scheme, loss_type="l2", huber_c=0.1, guidance_scale=2.5)
    generator = torch.Generator().manual_seed(0)
    latents, noise, made = (torch.randn(3, 16, 6, 4, generator=generator) for _ in range(3))
    sigmas = torch.tensor([0.9, 0.5, 0.1])
    seen = {}

    class Denoiser:
        dtype, config = torch.float32, argparse.Namespace(guidance_embeds=guided)

        def __call__(self, **inputs):
            seen.update(inputs)
            return argparse.Namespace(sample=FluxPipeline._pack_latents(made, 3, 16, 6, 4))

    scheduler = argparse.Namespace(config=argparse.Namespace(num_train_timesteps=1000))
    batch = {"noise": noise, "sigmas": sigmas, "timesteps": sigmas * 1000}
    embeds = {"prompt_embeds": torch.zeros(3, 5, 8), "pooled_prompt_embeds": torch.zeros(3, 4)}
    loss = script.compute_loss(batch, latents, embeds, Denoiser(), scheduler, args)
    weight = {"sigma_sqrt": sigmas**-2.0, "cosmap": 2 / (torch.pi * (1 - 2 * sigmas + 2 * sigmas**2))}
    expected = ((made - (noise - latents)) ** 2).mean((1, 2, 3)) * weight.get(scheme, torch.ones(3))
    assert torch.allclose(loss, expected, rtol=1e-4)
    noisy = torch.stack([(1 - s) * x + s * n for s, x, n in zip(sigmas, latents, noise, strict=True)])
    assert torch.allclose(seen["hidden_states"], FluxPipeline._pack_latents(noisy, 3, 16, 6, 4), atol=1e-6)
    assert torch.equal(seen["timestep"], sigmas) and seen["txt_ids"].shape == (5, 3)
    assert torch.equal(seen["img_ids"], FluxPipeline._prepare_latent_image_ids(1, 3, 2, "cpu", torch.float32))
    assert torch.equal(seen["guidance"], torch.full((3,), 2.5)) if guided else seen["guidance"] is None
    packed = pack_latents(latents)
    assert torch.equal(unpack_latents(packed, 6, 4), latents)


@pytest.mark.parametrize("side", [32, 128])
def test_flux_sigmas_are_shifted_as_the_pipeline_shifts_them(side):
    """Quantile by quantile: the sigmas of training at a size are those that the pipeline's scheduler would step through."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    script = load_script("train_dreambooth_lora_flux_advanced.py")
    shift = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **shift)
    args = argparse.Namespace(weighting_scheme="none", logit_mean=0.0, logit_std=1.0, mode_scale=1.29)
    vars(args).update(timestep_sampling="weighting_scheme", min_timestep=0, max_timestep=1000)
    drawn = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    drawn.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=calculate_shift(side * side // 4))
    for k, quantile in enumerate((0.0, 0.25, 0.5, 0.75)):
        item = script.draw_noise(torch.Generator(), (16, side, side), scheduler, args, quantile=quantile)
        assert item["sigmas"].item() == pytest.approx(drawn.sigmas[k].item(), abs=1e-3)
        assert item["timesteps"].item() == pytest.approx(drawn.timesteps[k].item(), abs=1)
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0)  # schnell
    item = script.draw_noise(torch.Generator(), (16, side, side), plain, args, quantile=0.5)
    assert item["sigmas"].item() == pytest.approx(0.5)


def test_prompts_are_encoded_as_the_pipeline_does(script, family, studio):
    """The embeddings of training are the pipeline's own, for short, empty and too long prompts."""
    pipeline = studio.pipeline(None)
    components = Components(
        __import__("pathlib").Path(family.base), arguments(script), torch.float32, torch.device("cpu")
    )
    extra = {"max_sequence_length": 40} if family.extra else {}
    args = arguments(script, *(f"--{k}={v}" for k, v in extra.items()))
    prompts = prompts_of(script, args, components)
    texts = ["a red circle on a blue background", "", "a blue star " * 40]
    ours = prompts.lookup(texts)
    if family.name == "sd15":
        theirs = {"prompt_embeds": pipeline.encode_prompt(texts, "cpu", 1, False)[0]}
    elif family.name == "flux":
        theirs = dict(
            zip(
                ("prompt_embeds", "pooled_prompt_embeds"),
                pipeline.encode_prompt(texts, **extra),
                strict=False,
            )
        )
    else:
        options = {"prompt_3": None, **extra} if family.name == "sd3" else {}
        found = pipeline.encode_prompt(
            texts, prompt_2=None, do_classifier_free_guidance=False, device="cpu", **options
        )
        theirs = {"prompt_embeds": found[0], "pooled_prompt_embeds": found[2]}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, atol=1e-5), name


def test_every_flag_is_used(script):
    """Every flag's value is read outside the argument parser and its rules: none is parsed and ignored."""
    tree = ast.parse((ROOT / f"{script.__name__.removesuffix('_under_test')}.py").read_text())
    apart = ("add_shared_args", "add_family_args", "RULES", "FAMILY_RULES")
    body = [n for n in tree.body if getattr(n, "name", None) not in apart]
    body = [n for n in body if not (isinstance(n, ast.Assign) and n.targets[0].id in apart)]
    nodes = [n for top in body for n in ast.walk(top)]
    used = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    used |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    composed = {f"prodigy_{name}" for name in ("decouple", "use_bias_correction", "safeguard_warmup")}
    needless = {"local_rank", "config", "cache_text_embeddings"}  # the last: what it asks for is always done
    assert not set(vars(arguments(script))) - used - composed - needless


def test_lower_parts_are_the_same():
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "sync_shared.py")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_reader_finds_the_parts_within_a_minute(name):
    """What is the family's own stands first and whole, and the loop above line 700; the index names the right lines."""
    lines = (ROOT / FAMILIES[name].script).read_text().splitlines()
    seam = next(i for i, line in enumerate(lines, 1) if line.startswith("# ==== From here on"))
    assert seam <= 301
    places = {line.split("(")[0][4:]: i for i, line in enumerate(lines, 1) if line.startswith("def ")}
    assert all(places[f] < seam for f in ("draw_noise", "compute_loss", "encode_prompts", "add_family_args"))
    assert seam < places["main"] < places["execute"] < places["train"] < 700
    index = " ".join(lines[: seam - 2]).split("# By line: ")[1].replace(" # ", " ")
    for number, title in re.findall(r"(\d+) ([^·]+?)(?: ·|$)", index):
        assert lines[int(number) - 1].startswith(f"# ---- {title} -")


@pytest.mark.parametrize("name", [*(f.script for f in FAMILIES.values()), "infer_lora.py"])
def test_a_copied_file_brings_its_packages_as_pinned(name):
    """The PEP 723 header names the pins of requirements.txt, all that the file imports, and nothing else."""
    import tomllib

    text = (ROOT / name).read_text()
    header = text.split("# /// script\n")[1].split("# ///\n")[0]
    pins = tomllib.loads(
        "".join(line.removeprefix("# ").removeprefix("#") for line in header.splitlines(True))
    )
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    known = {line.split("==")[0]: line for line in lines if line and not line.startswith("#")}
    chosen = {pin.split("==")[0]: pin for pin in pins["dependencies"]}
    assert chosen.items() <= known.items()
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]
    imported = {(n.module or "") if isinstance(n, ast.ImportFrom) else a.name for n in nodes for a in n.names}
    renamed = {"PIL": "pillow", "yaml": "pyyaml"}
    imported = {renamed.get(m.split(".")[0], m.split(".")[0]) for m in imported}
    assert imported & set(known) <= set(chosen)
    assert set(chosen) - imported <= {
        "torch",
        "accelerate",
        "peft",
        "bitsandbytes",
        "tensorboard",
        "schedulefree",
    }


def seamed(upper, lower):
    return f"{upper}\n# By line: \n\n# ==== From here on, the same ====\n\n# ---- one ----\n{lower}\n"


@pytest.mark.parametrize(
    ("texts", "code", "words"),
    [
        ([seamed("a", "x = 1"), seamed("b", "x = 1")], 0, "the same in 2 scripts"),
        ([seamed("a", "x = 1"), seamed("a", "x = 2")], 1, "+x = 2"),
        ([seamed("a", "x = 1"), "y = 1\n"], 2, "found 0"),
        ([seamed("a", "x"), seamed("a", "x") * 2], 2, "found 2"),
    ],
)
def test_sync_shared_finds(tmp_path, capsys, texts, code, words):
    sync = load_script("scripts/sync_shared.py")
    for i, text in enumerate(texts):
        (tmp_path / f"train_{i}.py").write_text(text)
    if code < 2:
        for i in range(len(texts)):  # each with its own index of lines
            upper, lower = sync.split(tmp_path / f"train_{i}.py")
            (tmp_path / f"train_{i}.py").write_text(sync.joined(upper, lower))
    assert sync.main(["--root", str(tmp_path)]) == code
    said = capsys.readouterr()
    assert words in said.out + said.err
    kept = [(tmp_path / f"train_{i}.py").read_text() for i in range(len(texts))]
    assert sync.main(["--root", str(tmp_path), "--from", "train_0.py"]) == (2 if code == 2 else 0)
    if code == 2:  # no file is written while one has no seam
        assert kept == [(tmp_path / f"train_{i}.py").read_text() for i in range(len(texts))]
    else:
        first, second = (sync.split(tmp_path / f"train_{i}.py") for i in (0, 1))
        assert first[1] == second[1] and second[0] == kept[1].split("# By line")[0]
        assert sync.main(["--root", str(tmp_path)]) == 0


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_off_values_of_another_familys_flags_are_taken(name, capsys):
    script = load_script(FAMILIES[name].script)
    off = ("--snr_gamma", "0", "--noise_offset", "0.0", "--prediction_type", "none", "--input_perturbation=0")
    assert arguments(script, *off).train_batch_size == 1
    with pytest.raises(UserError, match="--snr_gamma: rectified flow has none"):
        arguments(script, "--snr_gamma", 5)


def test_names_of_other_trainers_are_known(recipe, tmp_path, capsys):
    pairs = {
        "--network_dim": "--rank",
        "--unet_lr": "--learning_rate",
        "--save_every_n_steps": "--checkpointing_steps",
    }
    for wrong, ours in pairs.items():
        with pytest.raises(SystemExit):
            arguments(recipe, wrong, 4)
        assert f"unknown flag {wrong}; did you mean {ours}?" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("network_alpha: 4\n")
    with pytest.raises(UserError, match="unknown key 'network_alpha'; the nearest is 'lora_alpha'"):
        arguments(recipe, "--config", tmp_path / "c.yaml")
    with pytest.raises(SystemExit):
        arguments(recipe, "--local_rnk", 0)
    assert "local_rank" not in capsys.readouterr().err


def test_text_learning_rate_of_zero_is_given(recipe):
    with pytest.raises(UserError, match="--text_encoder_lr has no effect without --train_text_encoder"):
        arguments(recipe, "--text_encoder_lr", 0)
    with pytest.raises(UserError, match="--text_encoder_lr 0 trains nothing"):
        arguments(recipe, "--text_encoder_lr", 0, "--train_text_encoder")
    assert arguments(recipe, "--validation_prompt", "").validation_prompt is None


def test_a_trigger_word_in_front_stays_there(recipe):
    args = arguments(recipe, "--shuffle_tags", "--trigger_word", "sks")
    drawn = {recipe.draw_caption(["sks dog, red, round, small"], random.Random(i), args) for i in range(60)}
    assert len(drawn) == 6 and all(caption.startswith("sks dog, ") for caption in drawn)


def test_crop_coordinates_are_those_of_the_picture_as_it_is_seen(script, tmp_path):
    """Of a mirrored picture they are counted in the mirrored one."""
    from PIL import Image

    Image.new("RGB", (160, 64)).save(tmp_path / "x.png")
    example = Example("x", [""], (tmp_path / "x.png").read_bytes)
    args = arguments(script, "--random_flip")
    store = prepare_examples([example], [(64, 64)], args)
    base = Components(__import__("pathlib").Path(FAMILIES[script.FAMILY].base), args, None, None)
    schedule = import_class("diffusers", script.FAMILY.training_scheduler).from_config(
        base.get("scheduler").config
    )
    data = training_data(script, store, None, args, base.config("vae"), schedule)
    seen = set()
    for epoch in range(30):
        slot = Slot(0, 0, epoch, 0, 1.0)
        place = (args.seed, epoch, False, "x", 0)
        crop = draw_crop((160, 64), (64, 64), random.Random(stable_seed("image", *place)), args)
        expected = 160 - 64 - crop.left if crop.flip else crop.left
        assert data[slot]["crop_top_left"].tolist() == [0, expected]
        seen.add(crop.flip)
    assert seen == {True, False}


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_min_snr_at_an_snr_of_zero(name):
    """Zero-terminal-SNR schedules reach it; the weight there is 1 for noise, 0 for velocity."""
    from diffusers import DDPMScheduler

    script = load_script(FAMILIES[name].script)
    settings = {
        "snr_gamma": 5.0,
        "loss_type": "l2",
        "huber_c": 0.1,
        "input_perturbation": 0.0,
        "noise_offset": 0.0,
    }
    for prediction, weight in (("epsilon", 1.0), ("v_prediction", 0.0)):
        scheduler = DDPMScheduler(
            beta_schedule="scaled_linear", rescale_betas_zero_snr=True, prediction_type=prediction
        )
        batch = {"noise": torch.ones(1, 4, 8, 8), "timesteps": torch.tensor([999])}
        batch |= {k: torch.ones(1, 2) for k in ("original_size", "crop_top_left", "target_size")}

        def denoiser(noisy, *rest, **options):
            return argparse.Namespace(sample=torch.full_like(noisy, 3.0))

        denoiser.dtype = torch.float32
        embeds = {"prompt_embeds": torch.zeros(1, 7, 5), "pooled_prompt_embeds": torch.zeros(1, 5)}
        loss = script.compute_loss(
            batch, torch.zeros(1, 4, 8, 8), embeds, denoiser, scheduler, argparse.Namespace(**settings)
        )
        assert loss.item() == pytest.approx(weight * (4.0 if prediction == "epsilon" else 0.0), abs=1e-4)


def test_only_our_checkpoints_count(tmp_path):
    for name in ("checkpoint-5", "checkpoint-12", "checkpoint-backup-900", "checkpoint-²", "checkpoint-"):
        (tmp_path / name).mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-12", "checkpoint-5"]
