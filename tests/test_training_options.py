"""What people bring to a run besides pictures: a LoRA to start from, prompts of their own, a class to keep, timesteps."""

import argparse
import json

import pytest
import torch
from conftest import FAMILIES, ROOT, SAMPLE, family_and, load_script, run_here, training_data
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_training.base_model.reading import import_class
from lora_training.cli.flags import add_shared_args
from lora_training.cli.parser import OneLineParser
from lora_training.data.batches import BatchPlan, Slot
from lora_training.data.buckets import bucket_sizes
from lora_training.data.examples import hold_out, load_examples
from lora_training.data.folders import folder_examples
from lora_training.data.image_store import prepare_examples
from lora_training.errors import UserError
from lora_training.text.chunks import chunk_ids, join_chunks
from lora_training.training.machine import choose_seed
from lora_training.validation.prompts import control_prompts

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{family name: the folder of a run of rank 3 and alpha 6}, made when it is first asked for."""
    made = {}

    def of(family):
        if family.name not in made:
            folder = tmp_path_factory.mktemp(f"start-{family.name}") / "mine"
            flags = ("--rank", 3, "--lora_alpha", 6, "--learning_rate", 1e-2, "--lora_layers", "to_q", "to_v")
            assert run_here(family, folder, "-d", SAMPLE, "--upcast_before_saving", *flags) == 0
            made[family.name] = folder
        return made[family.name]

    return of


@family_and("spelling", ("folder", "kohya"), ("kohya",))
def test_a_run_starts_from_a_lora_with_its_rank_alpha_and_layers(family, trained, spelling, tmp_path):
    source = trained(family)
    given = source if spelling == "folder" else source / "mine.safetensors"
    flags = ("--init_lora", given, "--learning_rate", 1e-7, "--max_train_steps", 1, "--upcast_before_saving")
    assert run_here(family, tmp_path, "-d", SAMPLE, *flags) == 0
    before, after = load_file(source / LORA), load_file(tmp_path / LORA)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.allclose(after[key], value, atol=1e-6)


@pytest.mark.families("sdxl")
def test_what_a_start_refuses(family, trained, tmp_path, capsys):
    source, other = trained(family), trained(FAMILIES["flux"])
    uneven = tmp_path / "uneven.safetensors"
    tensors = load_file(source / LORA)
    first = next(key for key in tensors if ".lora_A." in key or ".lora.down." in key)
    save_file(tensors | {first: torch.cat([tensors[first]] * 2)}, uneven)
    (tmp_path / "text.safetensors").write_text("no tensors")
    cases = {
        (source, "--rank", 5): "--rank 5: --init_lora",
        (source, "--init_lora_weights", "orthogonal"): "--init_lora_weights has no effect with --init_lora",
        (other,): "is it a LoRA for another family?",
        (other / "mine.safetensors",): "--init_lora: ",
        (uneven,): "layers of several ranks",
        (tmp_path / "text.safetensors",): "--init_lora",
        (tmp_path / "none.safetensors",): "no such file",
    }
    for (start, *flags), message in cases.items():
        assert run_here(family, tmp_path / "out", "-d", SAMPLE, "--init_lora", start, *flags) == 2
        assert message in capsys.readouterr().err


@pytest.mark.families("sdxl", "flux")
def test_new_tokens_start_from_those_beside_the_lora(family, tmp_path):
    flags = ("-d", SAMPLE, "--trigger_word", "TOK", "--train_text_encoder_ti", "--text_encoder_lr")
    assert run_here(family, tmp_path / "first", *flags, 1e-2) == 0
    again = (*flags, 1e-7, "--init_lora", tmp_path / "first", "--max_train_steps", 2, "--learning_rate", 1e-7)
    assert run_here(family, tmp_path / "second", *again) == 0
    before, after = (load_file(tmp_path / n / f"{n}_emb.safetensors") for n in ("first", "second"))
    for key, value in before.items():
        assert torch.allclose(after[key], value, atol=1e-5)


@pytest.mark.families("sd15", "sdxl")
def test_long_captions_are_read_in_chunks(family, script):
    """One chunk is what the tokenizer makes by itself; of three, each is what its own 75 tokens give alone."""
    from transformers import CLIPTokenizer

    tokenizer, words = (
        CLIPTokenizer.from_pretrained(f"{family.base}/tokenizer"),
        "a red circle on a blue background, ",
    )
    prompts = ["", "a circle", words * 40]
    cut = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    assert torch.equal(chunk_ids(tokenizer, prompts, 1), tokenizer(prompts, **cut).input_ids)
    ids = chunk_ids(tokenizer, prompts, 3).view(3, 3, 77)
    content = tokenizer(words * 40, add_special_tokens=False).input_ids
    assert ids[2, :, 1:-1].flatten().tolist() == content[:225]
    hidden = join_chunks(ids.view(9, 77, 1).float(), 3)
    assert hidden.shape == (3, 227, 1)
    assert hidden[2, 1:-1, 0].tolist() == content[:225]


@pytest.mark.families("sd15", "sdxl")
def test_what_stands_after_75_tokens_is_learned_from(family, tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "data" / "a.png")
    found = {}
    for length in (75, 225):
        for end in ("star", "heart"):
            (tmp_path / "data" / "a.txt").write_text(
                "a red circle, " * 50 + end if length == 75 else "a red circle, " * 30 + end
            )
            folder = tmp_path / f"{length}-{end}"
            assert run_here(family, folder, "-d", tmp_path / "data", "--max_token_length", length) == 0
            found[length, end] = (
                (folder / "metrics.jsonl").read_text().splitlines()[0].split('"loss": ')[1].split(",")[0]
            )
    assert found[75, "star"] == found[75, "heart"]
    assert found[225, "star"] != found[225, "heart"]


def captions_drawn(words, *flags):
    """What a caption is trained as, over 400 draws."""
    import random

    script = load_script("train_lora_sd15.py")
    args = script.parse_args(["-m", "base", "-d", str(SAMPLE), *flags])
    return [script.draw_caption(words, random.Random(k), args) for k in range(400)]


def test_tags_are_dropped_and_the_first_ones_kept():
    drawn = captions_drawn(["1girl, hat, sea, sun"], "--tag_dropout", "0.25", "--keep_tokens", "2")
    assert all(caption.startswith("1girl, hat") for caption in drawn)
    assert sum("sea" in c for c in drawn) / 400 == pytest.approx(0.75, abs=0.06)
    assert sum("sea" in c and "sun" in c for c in drawn) / 400 == pytest.approx(0.5625, abs=0.07)
    assert not any("sun, sea" in c for c in drawn)
    shuffled = captions_drawn(["1girl, hat, sea, sun"], "--shuffle_tags", "--keep_tokens", "1")
    assert all(c.startswith("1girl, ") for c in shuffled) and len(set(shuffled)) == 6
    word = captions_drawn(["1girl, hat"], "--tag_dropout", "1", "--trigger_word", "sks")
    assert set(word) == {"sks"}


def test_each_line_may_be_a_caption(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a dog\n\nan animal\nin a field\n")
    script = load_script("train_lora_sd15.py")
    found = [folder_examples(tmp_path, None, None, per_line)[0].captions for per_line in (True, False)]
    assert found == [["a dog", "an animal", "in a field"], ["a dog an animal in a field"]]


def noise_arguments(script, **settings):
    """A family's settings for drawing noise, and its toy's scheduler."""
    parser = OneLineParser()
    add_shared_args(parser)
    script.add_family_args(parser.add_argument)
    args = argparse.Namespace(**vars(parser.parse_args([])) | settings)
    return import_class("diffusers", script.FAMILY.training_scheduler), args


def test_timesteps_stay_in_their_range(family, script):
    kind, args = noise_arguments(script, min_timestep=200, max_timestep=600)
    scheduler, generator = kind(num_train_timesteps=1000), torch.Generator().manual_seed(0)
    drawn = [script.draw_noise(generator, (4, 8, 8), scheduler, args)["timesteps"].item() for _ in range(300)]
    assert min(drawn) >= 199 and max(drawn) <= 601
    assert min(drawn) < 250 and max(drawn) > 550


@pytest.mark.families("sd3", "flux")
def test_how_a_flow_draws_its_timesteps(family, script):
    """Means of 4,000 sigmas against those of the distributions."""
    expected = {"uniform": (0.5, 1 / 12), "sigmoid": (0.5, 0.0434), "shift": (0.716, None)}
    for sampling, (mean, variance) in expected.items():
        kind, args = noise_arguments(script, timestep_sampling=sampling, timestep_shift=3.0)
        scheduler, generator = kind(num_train_timesteps=1000), torch.Generator().manual_seed(0)
        sigmas = [script.draw_noise(generator, (4, 8, 8), scheduler, args)["sigmas"] for _ in range(4000)]
        assert torch.stack(sigmas).mean().item() == pytest.approx(mean, abs=0.02)
        assert variance is None or torch.stack(sigmas).var().item() == pytest.approx(variance, abs=0.006)


@pytest.mark.families("sdxl", "flux")
def test_a_kept_class_has_a_loss_of_its_own(family, trained, tmp_path):
    """At the start the LoRA changes nothing, so that there is nothing to keep; from a trained LoRA there is."""
    word = ("-d", SAMPLE, "--trigger_word", "sks", "--max_grad_norm", 0, "--max_train_steps", 1)
    kept = ("--preserve_class", "circle", "--preserve_weight", 1000)
    norms = {}
    for name, flags in {"plain": (), "kept": kept}.items():
        for start in ("none", "lora"):
            more = ("--init_lora", trained(family)) if start == "lora" else ()
            assert run_here(family, tmp_path / f"{name}-{start}", *word, *flags, *more) == 0
            row = json.loads((tmp_path / f"{name}-{start}" / "metrics.jsonl").read_text().splitlines()[0])
            norms[name, start] = row["grad_norm"]
    assert norms["kept", "none"] == pytest.approx(norms["plain", "none"], rel=1e-4)
    assert norms["kept", "lora"] > 1.5 * norms["plain", "lora"]


def test_the_class_takes_the_place_of_the_word():
    script = load_script("train_lora_sd15.py")
    run = argparse.Namespace(
        args=argparse.Namespace(preserve_class="dog", triggers=["sks"]), abstractions={"TOK": []}
    )
    captions = {
        "a photo of sks dog": "a photo of dog",
        "sks, on a beach": "dog, on a beach",
        "a TOK dog": "a dog",
    }
    for caption, wanted in captions.items():
        assert script.class_caption(caption, run) == wanted


@pytest.mark.families("sdxl", "flux")
def test_b_matrices_learn_at_a_rate_of_their_own(family, tmp_path):
    """AdamW's first step is as large as the rate, whatever the gradient."""
    flags = ("-d", SAMPLE, "--learning_rate", 1e-4, "--loraplus_lr_ratio", 16, "--max_train_steps", 1)
    assert run_here(family, tmp_path, *flags, "--upcast_before_saving", "--adam_weight_decay", 0) == 0
    steps = [
        v.abs().max().item() for k, v in load_file(tmp_path / LORA).items() if ".up." in k or ".lora_B." in k
    ]
    assert max(steps) == pytest.approx(1.6e-3, rel=0.01)


OPTIMIZERS = {  # flags: how large a first step is, or what is said
    ("--optimizer", "torch.optim.RMSprop", "--optimizer_args", "alpha=0.75"): 2e-4,
    ("--optimizer", "adamw", "--optimizer_args", "lr=3e-4", "amsgrad=True"): 3e-4,
    ("--optimizer", "torch.optim.Nix"): "--optimizer torch.optim.Nix",
    (
        "--optimizer",
        "torch.optim.SGD",
        "--optimizer_args",
        "betas=(0,1)",
    ): "unexpected keyword argument 'betas'",
    ("--optimizer_args", "eps"): "--optimizer_args eps is not key=value",
    ("--optimizer", "lion"): "dotted name",
    ("--optimizer", "prodigy", "--loraplus_lr_ratio", "4"): "one rate for all",
}


@pytest.mark.families("sdxl")
@pytest.mark.parametrize("flags", OPTIMIZERS, ids=" ".join)
def test_any_optimizer_with_its_own_arguments(family, flags, tmp_path, capsys):
    given = ("-d", SAMPLE, "--max_train_steps", 1, "--upcast_before_saving", "--adam_weight_decay", 0)
    wanted = OPTIMIZERS[flags]
    try:
        code = run_here(family, tmp_path, *given, *flags)
    except SystemExit as stop:
        code = stop.code
    if isinstance(wanted, str):
        assert code == 2 and wanted in capsys.readouterr().err
        return
    again = (*given, "-o", tmp_path / "again", "--config", tmp_path / "config.yaml")
    assert code == 0 and run_here(family, tmp_path, *again) == 0
    for folder in (tmp_path, tmp_path / "again"):
        steps = [v.abs().max().item() for k, v in load_file(folder / LORA).items() if ".up." in k]
        assert max(steps) == pytest.approx(wanted, rel=0.02)


PROMPTS = {
    "prompts.yaml": "- a circle\n- {prompt: a star, width: 96, seed: 5, steps: 3, guidance: 2, lora_scale: 0}\n",
    "prompts.txt": "# ours\na circle\na star --w 96 --d 5 --s 3 --l 2 --n a square\n",
}


@pytest.mark.parametrize(("kind", "name"), [("sdxl", "prompts.yaml"), ("flux", "prompts.txt")])
def test_prompts_have_sizes_seeds_and_scales_of_their_own(kind, name, tmp_path, capsys):
    family = FAMILIES[kind]
    (tmp_path / name).write_text(PROMPTS[name])
    flags = (
        "--validation_prompts_file",
        tmp_path / name,
        "--num_validation_images",
        1,
        "--learning_rate",
        1e-2,
    )
    flags += ("--validation_inference_steps", 2, "--report_to", "tensorboard")
    assert run_here(family, tmp_path / "out", "-d", SAMPLE, *flags) == 0
    told = "take no account of negative prompts" in capsys.readouterr().out
    assert told == (family.name == "flux" and "--n " in PROMPTS[name])
    before, after = (tmp_path / "out" / "samples" / f"step-00000{n}" for n in (0, 3))
    with Image.open(after / "00_00_a-circle.png") as first, Image.open(after / "01_00_a-star.png") as second:
        assert (first.size, second.size) == ((64, 64), (96, 64))
        assert second.text["seed"] == "5"
    pixels = [Image.open(f / "01_00_a-star.png").tobytes() for f in (before, after)]
    assert (pixels[0] == pixels[1]) == (name == "prompts.yaml")  # at scale 0 the LoRA changes nothing


def test_what_is_wrong_with_a_prompt_is_said(tmp_path, capsys):
    wrong = {
        "a.yaml": ("- {prompt: a, hight: 64}", "prompt 1: unknown key 'hight'"),
        "b.yaml": ("- a\n- {prompt: a, steps: many}", "prompt 2: steps 'many' is no count"),
        "c.yaml": ("prompt: a", "expected a list, found dict"),
        "d.txt": ("a --w 65", "width 65 is not divisible"),
        "e.txt": ("# nothing\n\n", "no prompt in it"),
        "f.yaml": ("- {seed: 1}", "prompt 1: has no prompt"),
    }
    for name, (text, message) in wrong.items():
        (tmp_path / name).write_text(text)
        words = [
            "-m",
            str(ROOT / "assets/toy_sd15"),
            "-d",
            str(SAMPLE),
            "--validation_prompts_file",
            str(tmp_path / name),
        ]
        assert load_script("train_lora_sd15.py").main(words) == 2
        assert message in capsys.readouterr().err


def masked_data(script, *flags):
    """TrainingData of 8 x 8 latents as a run has it, from flags."""
    args = script.parse_args(["-m", "base", "--resolution", "64", "--seed", "1", *map(str, flags)])
    store = prepare_examples(load_examples(args), bucket_sizes(args), args)
    scheduler = import_class("diffusers", "DDPMScheduler")()
    config = {"latent_channels": 4, "block_out_channels": [1, 1, 1, 1]}
    return training_data(script, store, None, args, config, scheduler)


def half(path, size=(96, 64), mode="L"):
    """A picture that is white on its left and black on its right, or clear there."""
    image = Image.new("L", size, 0)
    image.paste(255, (0, 0, size[0] // 3, size[1]))
    if mode == "RGBA":
        image.putalpha(image.copy())
    image.convert(mode).save(path)


@pytest.mark.parametrize("where", ["alpha", "folder", "-mask"])
def test_a_mask_goes_with_its_picture(where, tmp_path):
    """The picture is its own mask, so that both must look the same however they are cropped, mirrored and turned."""
    script, data = load_script("train_lora_sd15.py"), tmp_path / "data"
    (data / "inner").mkdir(parents=True)
    half(data / "inner" / "a.png", mode="RGBA" if where == "alpha" else "RGB")
    if where == "folder":
        where = tmp_path / "masks"
        (where / "inner").mkdir(parents=True)
        half(where / "inner" / "a.jpg", (192, 128))
    if where == "-mask":
        half(data / "inner" / "a-mask.png")
    flags = (
        "-d",
        data,
        "--trigger_word",
        "x",
        f"--masked_loss={where}",
        "--unmasked_weight",
        0,
        "--random_flip",
    )
    made = masked_data(script, *flags, "--random_rotation", 20, "--random_rotation_prob", 0.5)
    assert len(made.examples) == 1
    sides = set()
    for epoch in range(40):
        item = made[Slot(0, 0, epoch, 0, 1.0)]
        if where != "alpha":  # laid on white, it is white all over
            wanted = torch.nn.functional.avg_pool2d(item["pixels"][:1] / 255, 8) + 1e-3
            assert torch.allclose(item["mask"] * wanted.mean(), wanted, atol=0.06)
        assert item["mask"].shape == (1, 8, 8) and item["mask"].mean().item() == pytest.approx(1, abs=1e-5)
        sides.add(bool(item["mask"][0, :, 0].mean() > item["mask"][0, :, -1].mean()))
    assert sides == {True, False}  # mirrored, too


@pytest.mark.families("sdxl", "flux")
def test_a_white_mask_changes_nothing_and_a_mask_is_cached(family, tmp_path):
    data, masks = tmp_path / "data", tmp_path / "masks"
    for folder in (data, masks):
        folder.mkdir()
    for k in range(2):
        half(data / f"{k}.png", (64, 64), "RGB")
        Image.new("L", (64, 64), 255).save(masks / f"{k}.png")
    flags = ("-d", data, "--trigger_word", "sks")
    masked = (*flags, "--masked_loss", masks)
    found = {}
    for name, own in {"plain": flags, "white": masked}.items():
        assert run_here(family, tmp_path / name, *own) == 0
        found[name] = [
            json.loads(x)["loss"] for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
    assert found["white"] == found["plain"]
    half(masks / "0.png", (64, 64))
    half(masks / "1.png", (64, 64))
    for name, own in {"half": masked, "half cached": (*masked, "--cache_latents")}.items():
        assert run_here(family, tmp_path / name, *own) == 0
        found[name] = [
            json.loads(x)["loss"] for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
    assert found["half"] != found["plain"]
    assert found["half"] == pytest.approx(found["half cached"], rel=1e-4)


def test_what_is_wrong_with_masks_is_said(tmp_path, capsys):
    script, data, masks = load_script("train_lora_sd15.py"), tmp_path / "data", tmp_path / "masks"
    for folder in (data, masks):
        folder.mkdir()
    half(data / "a.png", (64, 64), "RGB")
    half(data / "b.png", (64, 64), "RGB")
    flags = ("-d", data, "--trigger_word", "x", "--masked_loss")
    with pytest.raises(UserError, match="no mask for any of 2 images"):
        masked_data(script, *flags, masks)
    with pytest.raises(UserError, match="neither alpha, nor a folder"):
        masked_data(script, *flags, "alfa")
    wrong = {"has another shape": (64, 32), "is black": (64, 64), "can't be read": None}
    for message, size in wrong.items():
        if size:
            Image.new("L", size, 255 if size[1] == 32 else 0).save(masks / "a.png")
        else:
            (masks / "a.png").write_bytes(b"no picture")
        with pytest.raises(UserError, match=message):
            masked_data(script, *flags, masks)[Slot(0, 0, 0, 0, 1.0)]
    assert "1 images have no mask" in capsys.readouterr().out


def pictures(folder, captions, size=(64, 64)):
    """A folder of pictures of one colour, with a .txt each."""
    folder.mkdir(parents=True)
    for k, caption in enumerate(captions):
        Image.new("RGB", size, (40 * k, 90, 200)).save(folder / f"{k}.png")
        if caption:
            (folder / f"{k}.txt").write_text(caption)
    return folder


SETS = """
- {{train_data_dir: {dogs}, trigger_word: sks, repeats: 3, weight: 0.5, validation_split: 0.5}}
- {{instance_data_dir: {cats}, instance_prompt: a photo of ukj cat, resolutions: [64, [128, 64]], caption_dropout: 0.4}}
- {{train_data_dir: {others}, class_prompt: a photo of an animal}}
"""


@pytest.mark.families("sdxl")
def test_a_file_of_several_sets(family, script, tmp_path):
    folders = {
        "dogs": pictures(tmp_path / "dogs", ["a dog", "a brown dog"]),
        "cats": pictures(tmp_path / "cats", [None, None], (128, 64)),
        "others": pictures(tmp_path / "others", ["an owl", None]),
    }
    (tmp_path / "sets.yaml").write_text(SETS.format(**folders))
    seen, data_of = {}, script.TrainingData

    class Watched(data_of):
        def __getitem__(self, slot):
            item = super().__getitem__(slot)
            name = self.stores[slot.is_class].examples[slot.index].name
            shape = tuple(item["posterior_noise"].shape[1:])
            seen.setdefault((name, shape, slot.is_class), []).append((item["caption"], item["weight"].item()))
            return item

    script.TrainingData = Watched
    try:
        flags = ("--dataset_config", tmp_path / "sets.yaml", "--num_train_epochs", 1, "--max_train_steps", 20)
        assert run_here(family, tmp_path / "out", *flags, "--validation_steps", 100) == 0
    finally:
        script.TrainingData = data_of
    names = {name for name, _, is_class in seen if not is_class}
    assert {"cats/0.png", "cats/1.png"} < names
    small, wide = ({shape for name, shape, _ in seen if name == n} for n in ("dogs/0.png", "cats/0.png"))
    assert len(wide) == 2 and small <= wide | small
    dogs = [pair for (name, _, _), pairs in seen.items() if name.startswith("dogs") for pair in pairs]
    trained = [c for c, weight in dogs if weight == 0.5]
    assert trained and all(caption.startswith("sks, a ") for caption in trained)
    cats = [c for (name, _, _), pairs in seen.items() if name.startswith("cats") for c, _ in pairs]
    assert set(cats) == {"a photo of ukj cat", ""}
    classes = {c for (_, _, is_class), pairs in seen.items() if is_class for c, _ in pairs}
    assert classes == {"an owl", "a photo of an animal"}


def test_what_a_class_set_draws_should_not_change():
    script = load_script("train_lora_sd15.py")
    sets = [
        argparse.Namespace(is_class=c, default_caption=text)
        for c, text in ((True, "an animal"), (False, "a dog"))
    ]
    args = argparse.Namespace(control_prompt=None, class_prompt=None, sets=sets, triggers=["sks"])
    example = argparse.Namespace(captions=["sks dog"], held_out=False)
    assert control_prompts(args, [example], {}) == ["an animal"]
    args.sets = sets[1:]
    assert control_prompts(args, [example], {}) == ["dog"]
    args.control_prompt = ["a cat"]
    assert control_prompts(args, [example], {}) == ["a cat"]


def test_kohyas_folders_say_repeats_and_caption(tmp_path):
    script = load_script("train_lora_sd15.py")
    pictures(tmp_path / "data" / "10_sks dog", [None, "sks dog in the sun"])
    pictures(tmp_path / "data" / "2_ukj cat", [None])
    args = script.parse_args(
        ["-m", "base", "-d", str(tmp_path / "data"), "--kohya_folders", "--resolution", "64"]
    )
    examples = [e for own in args.sets for e in load_examples(own, [(64, 64)], several=True)]
    found = {e.name: (e.set_args.repeats, e.captions) for e in examples}
    assert found == {
        "10_sks dog/0.png": (10, ["sks dog"]),
        "10_sks dog/1.png": (10, ["sks dog in the sun"]),
        "2_ukj cat/0.png": (2, ["ukj cat"]),
    }
    store = prepare_examples(examples, [(64, 64)], args)
    plan = BatchPlan(store.examples, args, 1, 0)
    shown = [slot.index for number in range(plan.per_epoch) for slot in plan.share(number, 0)]
    assert sorted(shown.count(i) for i in range(3)) == [2, 10, 10]


def test_repeats_of_sets_are_planned_in_rounds(tmp_path, monkeypatch):
    """Rounds shuffle some repeats at a time; each image still comes as often as its set says."""
    script = load_script("train_lora_sd15.py")
    monkeypatch.setattr(BatchPlan, "round_limit", 8)
    pictures(tmp_path / "data" / "11_a", [None, None])
    pictures(tmp_path / "data" / "3_b", [None])
    args = script.parse_args(
        [
            "-m",
            "base",
            "-d",
            str(tmp_path / "data"),
            "--kohya_folders",
            "--resolution",
            "64",
            "--train_batch_size",
            "2",
        ]
    )
    examples = [e for own in args.sets for e in load_examples(own, [(64, 64)], several=True)]
    store = prepare_examples(examples, [(64, 64)], args)
    plan = BatchPlan(store.examples, args, 1, 0)
    shown = [(s.index, s.repeat) for number in range(plan.per_epoch) for s in plan.share(number, 0)]
    assert len(shown) == len(set(shown)) and sorted(i for i, _ in shown) == [0] * 11 + [1] * 11 + [2] * 3


def test_what_is_wrong_with_sets_is_said(tmp_path, capsys):
    folder = pictures(tmp_path / "a", ["a"])
    wrong = {
        "- {train_data_dir: nowhere}": "set 1: --train_data_dir nowhere: no such folder",
        f"- {{train_data_dir: {folder}, repeat: 2}}": "set 1: unknown key 'repeat'",
        f"- {{train_data_dir: {folder}}}\n- {{repeats: 2}}": "set 2: no data",
        f"- {{train_data_dir: {folder}, weight: -1}}": "weight: -1",
        f"- {{train_data_dir: {folder}, masked_loss: alfa}}": "neither alpha",
        f"- {folder}": "unknown key",
        "train_data_dir: x": "expected a list",
    }
    for text, message in wrong.items():
        (tmp_path / "sets.yaml").write_text(text)
        words = ["-m", str(ROOT / "assets/toy_sd15"), "--dataset_config", str(tmp_path / "sets.yaml")]
        assert load_script("train_lora_sd15.py").main(words) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "sets.yaml").write_text(f"- {{train_data_dir: {folder}}}")
    assert load_script("train_lora_sd15.py").main([*words, "-d", str(folder)]) == 2
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.families("sdxl")
def test_sets_hold_out_by_the_runs_seed_and_class_sets_hold_out_none(family, script, tmp_path, monkeypatch):
    """As it is when the data have been read: there the run is ended."""
    dogs = pictures(tmp_path / "dogs", [f"dog {k}" for k in range(6)])
    others = pictures(tmp_path / "others", ["an owl"])
    sets = f"- {{train_data_dir: {dogs}}}\n- {{train_data_dir: {others}, class_prompt: an animal}}\n"
    (tmp_path / "sets.yaml").write_text(sets)
    held, hold_out = {}, hold_out

    def noted(examples, own):
        hold_out(examples, own)
        held.setdefault(own.seed, []).append([e.name for e in examples if e.held_out])

    def ended(run):
        held[run.args.seed].append([e.name for e in run.data.class_examples if e.held_out])
        raise UserError("the data have been read")

    monkeypatch.setattr(script, "hold_out", noted)
    monkeypatch.setattr(script, "load_text", ended)
    flags = ("--dataset_config", tmp_path / "sets.yaml", "--validation_split", 0.5, "--max_train_steps", 1)
    for seed in (1, 2):
        assert run_here(family, tmp_path / str(seed), *flags, "--seed", seed) == 2
    assert [len(names) for names in held[1]] == [len(names) for names in held[2]] == [3, 0]
    choose_seed(args := argparse.Namespace(seed=None), (tmp_path, {"seed": 7}))
    assert args.seed == 7
