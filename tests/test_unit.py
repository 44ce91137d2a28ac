"""Functions by themselves: sampling, captions, crops, token rows, loss, exports, shared blocks."""

import argparse
import random
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import FAMILIES, ROOT, SAMPLE, load_script

pytestmark = pytest.mark.unit


def arguments(script, *flags):
    return script.parse_args(["-m", "base", "-d", str(SAMPLE), "--seed", "5", *(str(f) for f in flags)])


def examples_in(script, buckets):
    return [script.Example(f"{i}", ["a b"], None, bucket=b, size=(64, 64)) for i, b in enumerate(buckets)]


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_image_is_trained_once_per_epoch_whatever_the_batch(script, batch, processes):
    args = arguments(script, "--train_batch_size", batch, "--repeats", 2)
    plan = script.BatchPlan(examples_in(script, [0, 0, 1, 0, 2, 1, 0]), args, processes, 0)
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


def test_processes_share_what_one_process_does(script):
    images = examples_in(script, [0] * 5 + [1] * 4)
    one = script.BatchPlan(images, arguments(script, "--train_batch_size", 4), 1, 0)
    two = script.BatchPlan(images, arguments(script, "--train_batch_size", 2), 2, 0)
    for number in range(2 * one.per_epoch):
        joined = [s for p in range(2) for s in two.share(number, p) if s.weight]
        assert joined == one.share(number, 0)


def test_order_differs_between_epochs_and_seeds(script):
    images = examples_in(script, [0] * 12)
    plans = [script.BatchPlan(images, arguments(script, "--seed", s), 1, 0) for s in (5, 6)]
    orders = [[b[0].index for b in plan.epoch(e)] for plan in plans for e in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_prior_preservation_weighs_each_half_on_its_own(script, batch):
    flags = (
        "--with_prior_preservation",
        "--class_prompt",
        "x",
        "--prior_loss_weight",
        0.3,
        "--train_batch_size",
        batch,
    )
    plan = script.BatchPlan(examples_in(script, [0] * 7), arguments(script, *flags), 2, 4)
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
def test_trigger_word_stands_once(script, caption, trigger, expected):
    assert script.with_trigger(caption, trigger) == expected


def test_caption_draws(script):
    args = arguments(script, "--shuffle_tags", "--trigger_word", "sks", "--caption_dropout", 0.25)
    drawn = [script.draw_caption(["a, b, c", "d"], random.Random(i), args) for i in range(400)]
    assert 60 < drawn.count("") < 140
    kept = [c for c in drawn if c]
    assert all(c.startswith("sks, ") for c in kept)
    assert {tuple(sorted(c.split(", "))) for c in kept} == {("a", "b", "c", "sks"), ("d", "sks")}
    assert len(set(kept)) == 7


def test_nearest_bucket_goes_by_aspect_ratio(script):
    buckets = [(64, 64), (96, 48), (48, 96), (128, 64)]
    assert script.nearest_bucket((1000, 1000), buckets) == 0
    assert script.nearest_bucket((2000, 1000), buckets) == 3  # the larger of two with the same ratio
    assert script.nearest_bucket((100, 50), buckets) == 1
    assert script.nearest_bucket((300, 900), buckets) == 2


def test_images_are_covered_and_cropped_never_squashed(script, tmp_path):
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (400, 200), "white")
    ImageDraw.Draw(image).ellipse((150, 50, 250, 150), fill="black")
    image.save(tmp_path / "x.png")
    example = script.Example("x", [""], (tmp_path / "x.png").read_bytes)
    store = script.ImageStore([example], [(64, 64)], "lanczos", 1 << 20)
    cover = store.cover(0, 0)
    assert cover.size == (128, 64)
    args = arguments(script, "--center_crop")
    crop = script.draw_crop(cover.size, (64, 64), random.Random(0), args)
    view = script.to_pixels(script.cropped(cover, (64, 64), crop, random.Random(0), args))
    dark = (view.mean(0) < 0).nonzero()
    height, width = (dark.max(0).values - dark.min(0).values).tolist()
    assert abs(height - width) <= 1 and 28 <= width <= 34
    assert view.shape == (3, 64, 64) and view.max() == 1.0


def test_rotation_leaves_no_empty_corner(script):
    from PIL import Image

    args = arguments(script, "--random_rotation", 30, "--random_rotation_prob", 1)
    for seed in range(20):
        view = script.cropped(
            Image.new("RGB", (64, 96), "white"), (64, 64), script.Crop(0, 16, False), random.Random(seed), args
        )
        assert min(view.convert("L").tobytes()) > 250


def test_draws_depend_on_the_place_alone(script):
    assert script.stable_seed(1, "a", 2) == script.stable_seed(1, "a", 2) != script.stable_seed(1, "a", 3)
    assert 0 <= script.stable_seed("x") < 2**63


def test_token_rows_change_nothing_else(script, family):
    components = script.Components(
        __import__("pathlib").Path(family.base), arguments(script), torch.float32, torch.device("cpu")
    )
    for key in script.TI_ENCODERS:
        tokenizer, encoder = (components.get(n) for n in script.TEXT_ENCODERS[key])
        before = encoder.get_input_embeddings().weight.detach().clone()
        row = script.TokenRows(tokenizer, encoder, ["<s0>", "<s1>"], None, 0)
        assert row.initial.std() == pytest.approx(before.std().item(), rel=0.3)
        ids = tokenizer(["a <s0><s1> b"], return_tensors="pt").input_ids
        encoder(ids)[0].sum().backward()
        assert row.weight.grad.abs().sum() > 0
        table = encoder.get_input_embeddings().weight
        assert torch.equal(table[: len(before)], before) and table.grad is None
        started = script.TokenRows(tokenizer, encoder, ["<s2>"], "star", 0)
        assert torch.equal(started.initial, before[tokenizer("star", add_special_tokens=False).input_ids])


def test_insert_tokens(script):
    args = argparse.Namespace(
        train_text_encoder_ti=True,
        num_new_tokens_per_abstraction=2,
        initializer_concept=None,
        token_abstraction="TOK, TOKEN",
    )
    words = script.abstraction_tokens(args, None)
    assert words == {"TOK": ["<s0>", "<s1>"], "TOKEN": ["<s2>", "<s3>"]}
    assert script.insert_tokens("a TOKEN and TOK", words) == "a <s2><s3> and <s0><s1>"


def test_kohya_keys_carry_each_alpha(script, family):
    """Every layer that a LoRA can have gets its own alpha, and no two layers the same key."""
    config = script.json.loads((ROOT / "assets" / f"toy_{family.name}" / script.DENOISER / "config.json").read_text())
    denoiser = load_denoiser(script, family)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    names = [n for n, m in denoiser.named_modules() if isinstance(m, kinds)]
    shapes = {"A": (4, 8), "B": (8, 4)}
    state = {f"{n}.lora_{m}.weight": torch.ones(shape) for n in names for m, shape in shapes.items()}
    text = {f"encoder.layers.0.self_attn.q_proj.lora_{m}.weight": torch.ones(4, 8) for m in "AB"}
    out = script.kohya_state({script.DENOISER: state, "text_encoder": text}, 2.0, config)
    modules = {k.split(".")[0] for k in out}
    assert all(f"{m}.{end}" in out for m in modules for end in ("alpha", "lora_down.weight", "lora_up.weight"))
    assert len(out) == 3 * len(modules) and all("." not in m for m in modules)
    prefix = script.KOHYA_PREFIXES["text_encoder"]
    assert out[f"{prefix}_text_model_encoder_layers_0_self_attn_q_proj.alpha"] == 2
    if family.name in ("sd15", "sdxl"):  # no projections are fused
        assert len(modules) == len(names) + 1
        assert all(v == 2 for k, v in out.items() if k.endswith("alpha"))


def load_denoiser(script, family):
    path = __import__("pathlib").Path(family.base)
    return script.Components(path, arguments(script), torch.float32, torch.device("cpu")).denoiser()


def test_sdxl_keys_are_those_of_the_original_checkpoint():
    """Spot checks with the real model's layer counts (two per level), from the public key lists of kohya's files."""
    script = load_script("train_lora_sdxl.py")
    config = {"layers_per_block": 2, "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}
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
    out = script.kohya_state({"unet": state}, 1.0, config)
    assert {k.split(".")[0] for k in out} == {f"lora_unet_{v}" for v in pairs.values()}


def test_lora_is_float32_on_a_bf16_base_and_the_clip_clips(script, family):
    args = arguments(script, "--rank", 2)
    components = script.Components(__import__("pathlib").Path(family.base), args, torch.bfloat16, torch.device("cpu"))
    denoiser = components.denoiser()
    script.add_lora(denoiser, script.lora_targets(denoiser, args), args)
    trained = script.lora_parameters(denoiser)
    assert trained and all(p.dtype == torch.float32 for p in trained.values())
    assert all(p.dtype == torch.bfloat16 for p in denoiser.parameters() if not p.requires_grad)
    part = script.Part("denoiser", trained, 1e-4, 0.0, 10)
    part.allocate()
    part.gradients.fill_(3.0)
    accelerator = argparse.Namespace(num_processes=1)
    guard = script.StepGuard(torch.device("cpu"), half=False)
    norm = guard.apply([part], accelerator, 0.5)
    assert norm == pytest.approx(3.0 * len(part.gradients) ** 0.5, rel=1e-4)
    flat = torch.cat([p.grad.flatten() for p in trained.values()])
    assert torch.linalg.vector_norm(flat) == pytest.approx(0.5, rel=1e-3)


def test_averages_are_swapped_back_exactly(script):
    parameter = torch.nn.Parameter(torch.randn(5))
    part = script.Part("denoiser", {"x": parameter}, 1e-2, 0.0, 10)
    script.prepare_parts([part], arguments(script, "--use_ema", "--ema_decay", 0.5))
    for _ in range(3):
        parameter.grad.copy_(torch.randn(5))
        part.step()
    raw = parameter.detach().clone()
    with script.averaged([part]):
        assert not torch.equal(parameter, raw)
    assert torch.equal(parameter, raw)


def test_cache_entries_belong_to_their_content(script, tmp_path):
    cache = script.DiskCache(str(tmp_path), "latents")
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
    "extra", [{}, {"snr_gamma": 5.0}, {"loss_type": "huber"}, {"input_perturbation": 0.1}, {"noise_offset": 0.1}]
)
def test_noise_prediction_loss_against_its_formula(name, prediction, extra):
    from diffusers import DDPMScheduler

    script = load_script(FAMILIES[name].script)
    args = argparse.Namespace(
        **(
            {"snr_gamma": None, "loss_type": "l2", "huber_c": 0.1, "input_perturbation": 0.0, "noise_offset": 0.0}
            | extra
        )
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
    )
    rows = [script.draw_noise(torch.Generator().manual_seed(i), (4, 8, 8), scheduler, args) for i in range(3)]
    batch = {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
    batch |= {"original_size": torch.ones(3, 2), "crop_top_left": torch.zeros(3, 2), "target_size": torch.ones(3, 2)}
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
        wanted = wanted * torch.minimum(snr, torch.tensor(5.0)) / (snr if prediction == "epsilon" else snr + 1)
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
    weight = {"sigma_sqrt": t**-2, "cosmap": 2 / (math.pi * (1 - 2 * t + 2 * t**2))}.get(scheme, torch.ones_like(t))
    assert torch.allclose(loss.double(), (weight * error).mean((1, 2, 3)), rtol=1e-3)


def test_sd3_fused_keys_give_the_same_update():
    """q, k and v as one layer with the names of the original checkpoint: the same change of weights, alpha/rank kept."""
    script = load_script("train_lora_sd3.py")
    names = {"attn.to_q": 0, "attn.to_k": 1, "attn.to_v": 2}
    state = {}
    for name in ("attn.to_q", "attn.to_v", "attn.to_out.0", "ff.net.2"):  # no LoRA on k
        state[f"transformer_blocks.3.{name}.lora_A.weight"] = torch.randn(4, 16)
        state[f"transformer_blocks.3.{name}.lora_B.weight"] = torch.randn(16, 4)
    out = script.kohya_state({"transformer": state}, 2.0, {})
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


def test_compiled_and_script_flags_are_all_used(script):
    """Every flag's name appears outside the argument parser: none is parsed and ignored."""
    source = (ROOT / f"{script.__name__.removesuffix('_under_test')}.py").read_text()
    names = [n for n in vars(arguments(script)) if n not in ("local_rank", "config")]
    body = (
        source.split("# <<< shared: arguments")[1]
        + source.split("def check_args")[1].split("# <<< shared: arguments")[0]
    )
    body = body.replace('add("', "")
    unused = [n for n in names if f"args.{n}" not in body and f'"{n}"' not in body]
    assert not unused


def test_shared_blocks_are_the_same():
    result = subprocess.run([sys.executable, str(ROOT / "scripts" / "sync_shared.py")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def block(name, body):
    return f"# >>> shared: {name}\n{body}\n# <<< shared: {name}\n"


@pytest.mark.parametrize(
    ("texts", "code", "words"),
    [
        ([block("a", "x = 1"), block("a", "x = 1")], 0, "the same in 2 scripts"),
        ([block("a", "x = 1"), block("a", "x = 2")], 1, "+x = 2"),
        ([block("a", "x = 1"), "y = 1\n"], 2, "no shared blocks"),
        ([block("a", "x"), "# >>> shared: a\nx\n"], 2, "never ends"),
        ([block("a", "x"), block("a", "x") * 2], 2, "stands twice"),
        ([block("a", "x") + block("b", "y"), block("b", "y") + block("a", "x")], 2, "another order"),
        ([block("a", "x") + block("b", "y"), block("a", "x")], 2, "lacks b"),
    ],
)
def test_sync_shared_finds(tmp_path, capsys, texts, code, words):
    sync = load_script("scripts/sync_shared.py")
    for i, text in enumerate(texts):
        (tmp_path / f"train_{i}.py").write_text(text)
    assert sync.main(["--root", str(tmp_path)]) == code
    said = capsys.readouterr()
    assert words in said.out + said.err
    kept = [(tmp_path / f"train_{i}.py").read_text() for i in range(len(texts))]
    assert sync.main(["--root", str(tmp_path), "--from", "train_0.py"]) == (2 if code == 2 else 0)
    if code == 2:  # no file is written while one has a structural problem
        assert kept == [(tmp_path / f"train_{i}.py").read_text() for i in range(len(texts))]
    else:
        assert (tmp_path / "train_1.py").read_text() == texts[0]
