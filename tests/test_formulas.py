"""What training computes, against the same formulas written down once more, and against the pipelines themselves."""

import argparse
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, SAMPLE, load_script, losses, prompts_of, run_here, to_pixels, training_data
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_training.base_model.components import Components
from lora_training.base_model.reading import import_class
from lora_training.base_model.vae import encode_pixels, pack_latents, unpack_latents, unscale_latents
from lora_training.data.batches import BatchPlan, Slot
from lora_training.data.examples import hold_out
from lora_training.data.folders import Example
from lora_training.data.image_store import prepare_examples
from lora_training.data.images import decode_image
from lora_training.data.latents import cache_latents
from lora_training.lora.adapters import add_lora
from lora_training.lora.formats import reference_free
from lora_training.optim.guard import NonFiniteGuard
from lora_training.optim.optimizers import prepare_parts
from lora_training.optim.parts import TrainedPart, averaged_weights
from lora_training.text.tokens import TokenRows
from lora_training.training.run import Run

pytestmark = pytest.mark.unit


def arguments(script, *flags):
    return script.parse_args(["-m", "base", "-d", str(SAMPLE), "--seed", "5", *(str(f) for f in flags)])


def components_of(script, family, *flags):
    return Components(Path(family.base), arguments(script, *flags), torch.float32, torch.device("cpu"))


def data_of(script, family, folder, size, bucket, *flags, captions=("a",)):
    """Training data of one picture that says in its colours where each pixel was: red its column, green its row."""
    image = Image.new("RGB", size)
    image.putdata([(x, y, 0) for y in range(size[1]) for x in range(size[0])])
    image.save(folder / "x.png")
    args, base = arguments(script, *flags), components_of(script, family, *flags)
    example = Example("x", list(captions), (folder / "x.png").read_bytes)
    store = prepare_examples([example], [bucket], args)
    schedule = import_class("diffusers", script.FAMILY.training_scheduler).from_config(
        base.get("scheduler").config
    )
    return training_data(script, store, store, args, base.config("vae"), schedule), base


# ---- latents and loss ------------------------------------------------------------------------------------------------


def test_latents_are_those_that_the_pipeline_decodes(script, family):
    """(z - shift) x scale, and about as large as noise: what the pipeline undoes before its VAE."""
    base = components_of(script, family)
    vae, config = base.vae(), base.config("vae")
    image = decode_image((SAMPLE / "smiley_00.png").read_bytes()).resize((64, 64))
    moments = encode_pixels(to_pixels(image)[None], vae)
    mean, std = moments.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    latents = script.sample_latents(moments, noise, config)
    shifted = {"scaling_factor": 0.3611, "shift_factor": 0.1159}  # FLUX.1's
    assert torch.allclose(
        script.sample_latents(moments, noise, shifted), (mean + std * noise - 0.1159) * 0.3611, atol=1e-5
    )
    assert torch.allclose(unscale_latents(mean, shifted), mean / 0.3611 + 0.1159, atol=1e-5)
    undone = latents / config["scaling_factor"] + (config.get("shift_factor") or 0)  # as the pipelines do
    assert torch.allclose(undone, mean + std * noise, atol=1e-4)
    assert (std * noise).abs().max() > 1e-4
    assert torch.allclose(unscale_latents(latents, config), undone, atol=1e-4)
    with torch.no_grad():
        shown = vae.decode(undone.float()).sample
    assert (shown - (to_pixels(image)[None] / 127.5 - 1)).abs().mean() < 0.15


@pytest.mark.families("flux", "sdxl")
def test_accumulated_batches_are_averaged(family, script, tmp_path, monkeypatch):
    seen, original = [], script.compute_loss

    def recorded(*rest):
        loss = original(*rest)
        seen.append(loss.detach())
        return loss

    monkeypatch.setattr(script, "compute_loss", recorded)
    flags = (
        "-d",
        SAMPLE,
        "--gradient_accumulation_steps",
        3,
        "--train_batch_size",
        2,
        "--max_train_steps",
        1,
    )
    assert (
        run_here(family, tmp_path / "x", *flags, "--rank", 3, "--lora_alpha", 5, "--resolution", 64, 48) == 0
    )
    assert losses(tmp_path / "x") == pytest.approx(
        [torch.stack([loss.mean() for loss in seen]).mean().item()], rel=1e-5
    )
    from safetensors import safe_open

    with safe_open(tmp_path / "x" / "x.safetensors", "pt") as file:
        about = file.metadata()
        assert (about["ss_network_dim"], float(about["ss_network_alpha"])) == ("3", 5.0)
        assert about["modelspec.resolution"] == "64x48"
    with safe_open(tmp_path / "x" / "pytorch_lora_weights.safetensors", "pt") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (about[f"{script.FAMILY.denoiser}.lora_alpha"], about[f"{script.FAMILY.denoiser}.r"]) == (5, 3)


def test_noise_is_drawn_over_all_levels(script, family):
    """Timesteps over the whole schedule, and the timestep that the denoiser is told belongs to its noise."""
    base, args = components_of(script, family), arguments(script)
    schedule = import_class("diffusers", script.FAMILY.training_scheduler).from_config(
        base.get("scheduler").config
    )
    generator = torch.Generator().manual_seed(0)
    drawn = [script.draw_noise(generator, (4, 8, 8), schedule, args) for _ in range(400)]
    steps = torch.stack([d["timesteps"] for d in drawn]).double()
    assert steps.min() < 200 and steps.max() > 900 and 350 < steps.mean() < 750
    if script.FAMILY.predicts_flow:
        assert torch.allclose(torch.stack([d["sigmas"] for d in drawn]).double() * 1000, steps, atol=0.1)
    assert abs(torch.stack([d["noise"] for d in drawn]).std().item() - 1) < 0.02


@pytest.mark.families("sd15", "sdxl")
def test_offset_noise_has_an_offset_for_each_channel(script, family):
    from diffusers import DDPMScheduler

    args = arguments(script, "--noise_offset", 50)
    noise = script.draw_noise(torch.Generator().manual_seed(0), (4, 16, 16), DDPMScheduler(), args)["noise"]
    means = noise.mean((1, 2))
    assert (means[:, None] - means).abs().fill_diagonal_(99).min() > 1 and noise.std((1, 2)).max() < 1.5


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(160, 64), (64, 160)], ids=["wide", "tall"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.families("sdxl")
def test_pixels_sizes_and_crops_belong_together(script, family, tmp_path, size, flip):
    """What a sample says of its crop is what its pixels show; numbers are (height, width) and (top, left)."""
    flags = ("--random_flip",) if flip else ()
    data, _ = data_of(script, family, tmp_path, size, (64, 64), *flags)
    tops, lefts, mirrored = set(), set(), set()
    for epoch in range(40):
        item = data[Slot(0, 0, epoch, 0, 1.0)]
        pixels = item["pixels"].int()
        columns, row = pixels[0, 0], pixels[1, 0, 0].item()
        turned = bool(columns[0] > columns[-1])
        left = size[0] - 1 - columns[0].item() if turned else columns[0].item()
        assert item["crop_top_left"].tolist() == [row, left]
        assert item["original_size"].tolist() == [size[1], size[0]]
        assert item["target_size"].tolist() == [64, 64]
        assert pixels.shape == (3, 64, 64) and pixels.min() == 0
        tops.add(row), lefts.add(left), mirrored.add(turned)
    varied, still = (lefts, tops) if size[0] > size[1] else (tops, lefts)
    assert still == {0} and min(varied) < 15 and max(varied) > 80
    assert mirrored == ({True, False} if flip else {False})


def test_sdxl_is_told_sizes_in_the_pipelines_order():
    """Time ids are those of the pipeline's own function."""
    import diffusers
    from diffusers import DDPMScheduler

    family = FAMILIES["sdxl"]
    script = load_script(family.script)
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(family.base)
    width = pipeline.text_encoder_2.config.projection_dim
    wanted = pipeline._get_add_time_ids(
        (11, 12), (13, 14), (15, 16), torch.float32, text_encoder_projection_dim=width
    )
    seen = {}

    def denoiser(noisy, timesteps, text, added_cond_kwargs):
        seen.update(added_cond_kwargs)
        return argparse.Namespace(sample=noisy)

    denoiser.dtype = torch.float32
    batch = {"original_size": (11, 12), "crop_top_left": (13, 14), "target_size": (15, 16)}
    batch = {k: torch.tensor([v]) for k, v in batch.items()}
    batch |= {"noise": torch.randn(1, 4, 8, 8), "timesteps": torch.tensor([5])}
    embeds = {"prompt_embeds": torch.zeros(1, 7, 5), "pooled_prompt_embeds": torch.zeros(1, 5)}
    script.compute_loss(batch, torch.randn(1, 4, 8, 8), embeds, denoiser, DDPMScheduler(), arguments(script))
    assert torch.equal(seen["time_ids"], wanted)


@pytest.mark.families("flux", "sdxl")
def test_pictures_are_read_as_people_see_them(script, family, tmp_path):
    """Turned as EXIF says, transparency on white, white as 1 and black as -1."""
    image = Image.new("RGB", (30, 20), "black")
    image.paste("white", (0, 0, 15, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: its left side is the top
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = to_pixels(decode_image((tmp_path / "turned.png").read_bytes()))
    assert pixels.shape == (3, 30, 20)
    assert pixels[:, 0].eq(255).all() and pixels[:, -1].eq(0).all()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert to_pixels(decode_image((tmp_path / "clear.png").read_bytes())).eq(255).all()


@pytest.mark.families("flux", "sdxl")
def test_mirrored_latents_are_those_of_the_mirrored_picture(script, family, tmp_path):
    flags = ("--random_flip", "--cache_latents", "--cache_dir", tmp_path)
    for _ in range(2):  # computed, then read
        data, base = data_of(script, family, tmp_path, (64, 64), (64, 64), *flags)
        data.args.cache_folder = str(tmp_path / "cache")
        plan = BatchPlan(data.examples, data.args, 1, 0)
        data.stores = (data.stores[0], None)
        cache_latents(data, plan, base, data.args)
        pixels = to_pixels(Image.open(tmp_path / "x.png"))
        for flip in (False, True):
            wanted = encode_pixels((pixels.flip(2) if flip else pixels)[None], base.vae())[0]
            assert torch.allclose(data.moments[False, 0, 0, flip], wanted, atol=1e-4)


# ---- which images, which draws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.families("flux", "sdxl")
def test_held_out_images_are_never_trained_on(script, family, share):
    args = arguments(script, "--validation_split", share, "--repeats", 2, "--train_batch_size", 3)
    examples = [Example(f"{i}", ["a"], None, size=(64, 64)) for i in range(20)]
    hold_out(examples, args)
    held = {i for i, e in enumerate(examples) if e.held_out}
    assert len(held) == 20 * share
    plan = BatchPlan(examples, args, 2, 0)
    slots = [s for number in range(3 * plan.per_epoch) for p in range(2) for s in plan.share(number, p)]
    assert {s.index for s in slots} == set(range(20)) - held


@pytest.mark.families("flux", "sdxl")
def test_each_repeat_and_epoch_has_its_own_noise(script, family, tmp_path):
    data, _ = data_of(script, family, tmp_path, (96, 64), (64, 64))
    slots = [Slot(0, 0, epoch, repeat, 1.0) for epoch in range(3) for repeat in range(3)]
    items = [data[slot] for slot in slots]
    for key in ("noise", "posterior_noise"):
        assert len({tuple(item[key].flatten()[:4].tolist()) for item in items}) == 9
    assert len({item["timesteps"].item() for item in items}) > 5
    again = [data[slot] for slot in slots]
    assert all(torch.equal(a["noise"], b["noise"]) for a, b in zip(items, again, strict=True))


@pytest.mark.families("flux", "sdxl")
def test_class_images_keep_their_prompt(script, family, tmp_path):
    flags = ("--trigger_word", "sks", "--caption_dropout", 0.9)
    data, _ = data_of(script, family, tmp_path, (64, 64), (64, 64), *flags, captions=("a cat",))
    both = [
        [data[Slot(0, 0, n, 0, 1.0, is_class)]["caption"] for n in range(30)] for is_class in (False, True)
    ]
    assert set(both[0]) == {"", "sks, a cat"} and both[0].count("") > 20
    assert set(both[1]) == {"a cat"}


# ---- text ------------------------------------------------------------------------------------------------------------


def test_text_from_the_cache_is_the_computed_one(script, family, tmp_path):
    """Of every encoder; read by a second run that computes nothing."""
    texts = ["a red circle", "a blue star"]
    found = []
    for _ in range(2):
        base = components_of(script, family)
        base.args.cache_folder = str(tmp_path)
        prompts = prompts_of(script, base.args, base)
        found.append(prompts.lookup(texts))
    assert not set(base.loaded) & {encoder for _, encoder in script.FAMILY.text_encoders.values()}
    plain = components_of(script, family)
    wanted = prompts_of(script, plain.args, plain).lookup(texts)
    for result in found:
        assert all(torch.allclose(result[k], wanted[k], atol=1e-5) for k in wanted)


@pytest.mark.families("flux", "sdxl")
def test_text_of_another_base_is_not_taken_from_the_cache(script, family, tmp_path):
    base, encoder = tmp_path / "base", next(iter(script.FAMILY.text_encoders.values()))[1]
    shutil.copytree(family.base, base)
    (file,) = (base / encoder).glob("*.safetensors")
    save_file({k: v * 1.3 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    found = []
    for folder in (Path(family.base), base):
        args = arguments(script)
        args.cache_folder = str(tmp_path / "cache")
        found.append(
            prompts_of(script, args, Components(folder, args, torch.float32, torch.device("cpu"))).lookup(
                ["a circle"]
            )
        )
    names = (
        ("pooled_prompt_embeds",) if family.name == "flux" else ("prompt_embeds",)
    )  # what the first encoder gives
    assert all((found[0][k] - found[1][k]).abs().max() > 0.01 for k in names)


@pytest.mark.families("sd15", "sdxl")
def test_skipped_layers_are_as_good_as_absent(script, family):
    """clip_skip 1 gives what an encoder without its last layer gives."""
    base = components_of(script, family)
    tokenizer, name = script.FAMILY.text_encoders["clip_l"]
    tokenizer, encoder = base.get(tokenizer), base.get(name)
    skipped = script.encode_prompts(
        "clip_l", ["a red circle"], tokenizer, encoder, arguments(script, "--clip_skip", 1)
    )
    body = getattr(encoder, "text_model", encoder)
    body.encoder.layers = body.encoder.layers[:-1]
    shorter = script.encode_prompts("clip_l", ["a red circle"], tokenizer, encoder, arguments(script))
    assert torch.allclose(skipped["hidden"], shorter["hidden"], atol=1e-5)


@pytest.mark.families("sd15", "sdxl", "sd3")
def test_the_empty_prompt_is_the_pipelines(script, family, studio):
    pipeline, base = studio.pipeline(None), components_of(script, family)
    ours = prompts_of(script, base.args, base).for_pipeline("a red circle")
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    if family.name == "sd3":
        options |= {"prompt_2": None, "prompt_3": None, "max_sequence_length": 77}
    theirs = pipeline.encode_prompt("a red circle", **options)
    names = [
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ]
    for name, value in zip(names, theirs, strict=False):
        assert torch.allclose(ours[name], value, atol=1e-4), name


def test_new_tokens_are_as_large_as_the_table(script, family):
    base = components_of(script, family)
    for key in script.TI_ENCODERS:
        tokenizer, encoder = (base.get(name) for name in script.FAMILY.text_encoders[key])
        size = encoder.get_input_embeddings().weight.std().item()
        rows = TokenRows(tokenizer, encoder, [f"<s{i}>" for i in range(8)], None, 3)
        assert rows.weight.std().item() == pytest.approx(size, rel=0.2)


@pytest.mark.families("flux", "sdxl")
def test_text_moves_up_to_the_pivot(script, family):
    parts = [argparse.Namespace(name=n, last_step=s) for n, s in (("embeddings", 3), ("denoiser", 9))]
    run = argparse.Namespace(parts=parts)
    assert [Run.text_moves(run, step) for step in (0, 2, 3, 8)] == [True, True, False, False]


# ---- LoRA, optimizer, exports ----------------------------------------------------------------------------------------


@pytest.mark.families("flux", "sdxl")
def test_the_update_is_alpha_by_rank(script, family):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5)).requires_grad_(False)
    model.add_adapter = lambda config: __import__("peft").inject_adapter_in_model(config, model)
    add_lora(model, ["0"], arguments(script, "--rank", 2, "--lora_alpha", 7))
    up = next(p for n, p in model.named_parameters() if "lora_B" in n)
    up.data.normal_()
    down = next(p for n, p in model.named_parameters() if "lora_A" in n)
    x, base = torch.randn(3, 6), model[0].get_base_layer()
    wanted = x @ base.weight.T + base.bias + 7 / 2 * x @ down.T @ up.T
    assert torch.allclose(model(x), wanted, atol=1e-5)


@pytest.mark.families("flux", "sdxl")
def test_steps_are_those_of_a_plain_loop(script, family):
    """Warm-up, a rate that falls to zero at the end, decay, an average: each as its formula says, gradients fresh each time."""
    steps, rate, warm, decay, average = 8, 1e-2, 3, 0.1, 0.6
    flags = ("--lr_scheduler", "linear", "--lr_warmup_steps", warm, "--use_ema", "--ema_decay", average)
    args = arguments(script, *flags, "--adam_beta1", 0.8, "--adam_beta2", 0.95)
    torch.manual_seed(0)
    start = torch.randn(7)
    part = TrainedPart("denoiser", {"x": torch.nn.Parameter(start.clone())}, rate, decay, steps)
    prepare_parts([part], args)
    weights, shown = start.double(), start.double()
    m = v = torch.zeros(7, dtype=torch.float64)
    for t in range(1, steps + 1):
        gradient = torch.randn(7)
        next(iter(part.parameters.values())).grad.add_(gradient)
        part.step()
        now = rate * min((t - 1) / warm, (steps - t + 1) / (steps - warm))
        assert part.current_lr == pytest.approx(now)
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient.double() ** 2
        weights = weights * (1 - now * decay)
        weights = weights - now * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + args.adam_epsilon)
        kept = min(average, t / (9 + t)) if t > 1 else 0.0  # https://arxiv.org/abs/1806.04498, warmed up
        shown = kept * shown + (1 - kept) * weights
        assert torch.allclose(part.weights.detach().double(), weights, atol=1e-5)
    with averaged_weights([part]):
        assert torch.allclose(part.weights.detach().double(), shown, atol=1e-3)
        assert not torch.allclose(shown, weights, atol=1e-3)


@pytest.mark.families("flux", "sdxl")
def test_all_parts_are_clipped_by_one_norm(script, family):
    parts = [
        TrainedPart(n, {"x": torch.nn.Parameter(torch.ones(k))}, 1.0, 0.0, 5)
        for n, k in (("a", 9), ("b", 16))
    ]
    for part in parts:
        part.allocate()
        part.gradients.fill_(2.0)
    guard = NonFiniteGuard("cpu", half=False)
    assert guard.apply(parts, argparse.Namespace(num_processes=1), 1.0).item() == pytest.approx(
        2 * math.sqrt(25)
    )
    assert torch.allclose(parts[0].gradients, torch.full((9,), 0.2)) and torch.allclose(
        parts[1].gradients, torch.tensor(0.2)
    )
    guard.apply(parts, argparse.Namespace(num_processes=1), 100.0)
    assert torch.allclose(parts[0].gradients, torch.full((9,), 0.2))  # what is small enough is left alone


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.families("flux", "sdxl")
def test_starts_that_change_the_base_are_taken_out(script, family, start):
    args = arguments(script, "--init_lora_weights", start, "--rank", 2, "--lora_alpha", 3)
    torch.manual_seed(0)
    states, initials = (
        {"d": {"x.lora_A.weight": torch.randn(2, 6), "x.lora_B.weight": torch.randn(5, 2)}} for _ in "ab"
    )
    out, alpha, rank = reference_free(states, initials, args)
    update = alpha / rank * out["d"]["x.lora_B.weight"] @ out["d"]["x.lora_A.weight"]
    a, b = (s["d"]["x.lora_B.weight"] @ s["d"]["x.lora_A.weight"] for s in (states, initials))
    assert rank == 4 and torch.allclose(update, 3 / 2 * (a - b), atol=1e-5)


def test_flux_tokens_and_their_places_are_the_pipelines():
    from diffusers import FluxPipeline

    script = load_script(FAMILIES["flux"].script)
    latents = torch.randn(2, 16, 8, 12)
    tokens = FluxPipeline._pack_latents(latents, 2, 16, 8, 12)
    assert torch.equal(pack_latents(latents), tokens) and torch.equal(unpack_latents(tokens, 8, 12), latents)
    places = FluxPipeline._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
    assert torch.equal(script.position_ids(8, 12, "cpu"), places)
