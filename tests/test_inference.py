"""infer_lora.py as people use it: a training's folder, the YAML, mistakes, grids; the wrappers' family detection."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import FAMILIES, KINDS, ROOT, SAMPLE, copy_of, load_script, run_here
from PIL import Image
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.run


@pytest.fixture
def trained(family, shelf) -> Path:
    """A run with LoRA and embeddings, made once for each family."""
    output = shelf / f"infer-{family.name}"
    if not (output / "README.md").exists():
        flags = (
            "--train_text_encoder_ti",
            "--token_abstraction",
            "circle",
            "--text_encoder_lr",
            0.1,
            "--learning_rate",
            2e-2,
        )
        assert run_here(family, output, "-d", SAMPLE, *flags, "--lora_layers", *family.lora_layers) == 0
    return output


@pytest.fixture
def write(family, trained, tmp_path):
    """Writes a YAML file with changes to a small one; returns its path."""

    def write(**changes) -> str:
        values = {
            "paths": {
                "base_model_path": family.base,
                "lora_weights_path": str(trained),
                "infer_path": str(tmp_path / "out"),
            },
            "prompt": "a <s0><s1> on a blue background",
            "resolution": {"width": 64, "height": 64},
            "num_inference_steps": 2,
            "seed": 5,
            **dict(family.extra),
        }
        paths = changes.pop("paths", {})
        values |= changes
        values["paths"] |= paths
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
        return str(tmp_path / "c.yaml")

    return write


def drawn(tmp_path) -> dict[str, np.ndarray]:
    folders = sorted((tmp_path / "out").iterdir())
    return {f.name: np.asarray(Image.open(f)).astype(int) for f in sorted(folders[-1].glob("*.png"))}


@pytest.mark.families(*KINDS)
def test_prompts_scales_and_base_make_a_grid(write, tmp_path):
    infer = load_script("infer_lora.py")
    config = write(
        prompt=["a <s0><s1>", "a red star"], adapter_scale=[0.5, 1.0], compare_base=True, num_images_per_prompt=2
    )
    assert infer.main(["--config", config]) == 0
    pictures = drawn(tmp_path)
    assert len(pictures) == 2 * 3 * 2 + 1 and "grid.png" in pictures
    base, half, full = (pictures[f"000_scale{s}_000.png"] for s in ("0", "0.5", "1"))
    assert np.abs(base - half).max() > 2 and np.abs(half - full).max() > 2
    folder = next((tmp_path / "out").iterdir())
    text = Image.open(folder / "001_scale1_001.png").text
    assert text["prompt"] == "a red star" and text["seed"] == "6" and text["adapter_scale"] == "1.0"
    assert yaml.safe_load((folder / "config.yaml").read_text())["adapter_scale"] == [0.5, 1.0]


def test_images_equal_the_plain_pipelines(family, write, tmp_path, studio, trained):
    assert load_script("infer_lora.py").main(["--config", write(guidance_scale=3.0)]) == 0
    own = next(v for k, v in drawn(tmp_path).items() if k.startswith("000"))
    plain = studio.pipeline(trained)
    image = plain(
        "a <s0><s1> on a blue background",
        width=64,
        height=64,
        num_inference_steps=2,
        guidance_scale=3.0,
        **dict(family.extra),
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert np.abs(np.asarray(image).astype(int) - own).max() <= 1


@pytest.mark.families(*KINDS)
def test_several_loras_fusing_and_command_line(family, write, tmp_path, trained, capsys):
    infer = load_script("infer_lora.py")
    first = str(trained / "pytorch_lora_weights.safetensors")
    second = str(trained / f"{trained.name}.safetensors")  # the same LoRA with the other tools' keys
    both = [{"path": first, "weight": 0.5}, {"path": second, "weight": 0.5}]
    prompt = "a red circle"
    assert infer.main(["--config", write(paths={"lora_weights_path": both}, prompt=prompt)]) == 0
    halves = next(v for k, v in drawn(tmp_path).items() if k.startswith("000"))
    for flags in ([], ["--fuse", "true"]):  # two halves of the same LoRA are the whole, and so is the fused one
        assert (
            infer.main(
                [
                    "--config",
                    write(paths={"infer_path": str(tmp_path / "out" / "x" / str(len(flags)))}),
                    "--prompt",
                    prompt,
                    *flags,
                ]
            )
            == 0
        )
        folder = next((tmp_path / "out" / "x" / str(len(flags))).iterdir())
        whole = np.asarray(Image.open(next(folder.glob("000*.png")))).astype(int)
        assert np.abs(whole - halves).max() <= 2
    assert "knows <s0><s1>" in capsys.readouterr().out


@pytest.mark.families("sd15")
@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({"promt": "x"}, [], "unknown key promt; the nearest is prompt"),
        ({"resolution": {"widht": 64}}, [], "unknown key resolution.widht; the nearest is resolution.width"),
        ({"num_generations": "many"}, [], "num_generations: input should be a valid integer"),
        ({"guidance_scale": [1]}, [], "guidance_scale"),
        ({"paths": {"base_model_path": "./nowhere"}}, [], "paths.base_model_path: no such file or folder"),
        ({"paths": {"lora_weights_path": "nowhere"}}, [], "paths.lora_weights_path: no such file or folder"),
        ({"negative_prompt": ["a", "b"]}, [], "2 of them for 1 prompts"),
        ({}, ["--seeed", "3"], "unknown flag --seeed; the nearest is --seed"),
        ({}, ["--seed"], "--seed needs a value"),
        ({}, ["--resolution.width", "63"], "is not divisible by"),
        ({}, ["--scheduler", "Eulr"], "Eulr is not in diffusers"),
        ({"fuse": True, "compare_base": True}, [], "fuse bakes one scale"),
    ],
)
def test_mistakes_are_one_line(write, capsys, changes, flags, words):
    assert load_script("infer_lora.py").main(["--config", write(**changes), *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in lines[-1]


@pytest.mark.families("sd15")
def test_pickled_weights_are_refused_unopened(write, tmp_path, capsys):
    (tmp_path / "bad.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    assert (
        load_script("infer_lora.py").main(["--config", write(paths={"lora_weights_path": str(tmp_path / "bad.bin")})])
        == 2
    )
    assert "only .safetensors" in capsys.readouterr().err


def test_negative_prompts_of_flux(write, family, capsys, tmp_path):
    """With true_cfg_scale they change the picture; without it they'd be ignored, so they are refused."""
    if family.name != "flux":
        file = write(true_cfg_scale=2.0)
        assert load_script("infer_lora.py").main(["--config", file]) == 2
        assert "FLUX.1 alone" in capsys.readouterr().err
        return
    assert load_script("infer_lora.py").main(["--config", write(negative_prompt="a red star")]) == 2
    assert "without true_cfg_scale" in capsys.readouterr().err
    images = []
    for k, negative in enumerate((None, "a red star")):
        file = write(negative_prompt=negative, true_cfg_scale=3.0, paths={"infer_path": str(tmp_path / str(k))})
        assert load_script("infer_lora.py").main(["--config", file]) == 0
        images.append(np.asarray(Image.open(next((tmp_path / str(k)).rglob("*scale*.png")))).astype(int))
    assert np.abs(images[0] - images[1]).max() > 5


# ---- drawing is one word ----


def as_trained(family, trained, target, **settings) -> Path:
    """A copy of a training's folder with the config.yaml that training scripts leave."""
    shutil.copytree(trained, target)
    values = {
        "pretrained_model_name_or_path": family.base,
        "resolution": [64],
        "seed": 5,
        "validation_inference_steps": 2,
        "validation_guidance_scale": 3.0,
        "token_abstraction": "circle",
        "clip_skip": None,
        "rescale_betas_zero_snr": False,  # a flag that was not given: the base's own schedule holds
        **dict(family.extra),
    }
    (target / "config.yaml").write_text(yaml.safe_dump(values | settings))
    return target


@pytest.mark.families(*KINDS)
def test_a_folder_says_all_that_a_configuration_would(family, trained, write, tmp_path, capsys):
    """Base, size, steps, guidance and seed are the training's; TOK is its tokens; one flag takes several prompts."""
    infer = load_script("infer_lora.py")
    prompts = ["a <s0><s1> on a blue background", "a red star"]
    assert infer.main(["--infer_config", write(guidance_scale=3.0, prompt=prompts)]) == 0
    explicit = drawn(tmp_path)
    run, out = as_trained(family, trained, tmp_path / "run"), str(tmp_path / "mine" / "out")
    words = ["--prompt", "a circle on a blue background", "a red star", "--paths.infer_path", out]
    capsys.readouterr()
    assert infer.main([str(run), *words]) == 0
    said = capsys.readouterr().out
    assert said.count("note:") == 1 and f"note: no circle in 'a red star': nothing calls {run}" in said
    own = drawn(tmp_path / "mine")
    assert own.keys() == explicit.keys() and len(own) == 3
    assert all(np.abs(own[name] - explicit[name]).max() <= 1 for name in own)
    assert infer.main([str(run / f"{trained.name}.safetensors"), *words]) == 0  # the other tools' file of the same run
    other = drawn(tmp_path / "mine")
    assert all(np.abs(own[name] - other[name]).max() <= 2 for name in own if name != "grid.png")


def read_one(infer, *words):
    """The settings of a command line, with tokens put in."""
    settings = infer.read_settings([str(w) for w in words])
    infer.insert_tokens(settings, infer.look_at_trainings(settings))
    return settings


def test_what_wins_and_where_prompts_come_from(tmp_path, shelf, capsys):
    infer, family = load_script("infer_lora.py"), FAMILIES["sd15"]
    source = tmp_path / "source"
    source.mkdir()
    save_file({"unet.x.lora_A.weight": torch.zeros(1, 2)}, source / "pytorch_lora_weights.safetensors")
    save_file({"clip_l": torch.zeros(4, 8)}, source / "source_emb.safetensors")
    asked = {"validation_prompt": ["a DOG", "CAT and DOG"], "token_abstraction": "DOG, CAT", "instance_prompt": "x"}
    run = as_trained(family, source, tmp_path / "run", **asked, resolution=[72, 64])
    settings = read_one(infer, run)
    assert settings.prompt == ["a <s0><s1>", "<s2><s3> and <s0><s1>"]
    assert (settings.resolution.width, settings.resolution.height, settings.num_inference_steps) == (72, 64, 2)
    (tmp_path / "c.yaml").write_text("num_inference_steps: 7\nseed: null\nresolution: {height: 80}\n")
    settings = read_one(
        infer, run, "--config", tmp_path / "c.yaml", "--resolution.width", 88, "--adapter_scale", 0.5, 1
    )
    assert (settings.resolution.width, settings.resolution.height, settings.num_inference_steps) == (88, 80, 7)
    assert settings.seed == 5 and settings.adapter_scale == [0.5, 1.0] and settings.guidance_scale == 3.0
    assert settings.rescale_betas_zero_snr is None
    zeros = as_trained(family, source, tmp_path / "zeros", seed=0, validation_guidance_scale=0, instance_prompt="x")
    assert (read_one(infer, zeros).seed, read_one(infer, zeros).guidance_scale) == (0, 0.0)
    plain = {"token_abstraction": None, "instance_prompt": "a photo of TOK"}
    assert read_one(infer, as_trained(family, source, tmp_path / "b", **plain)).prompt == "a photo of <s0><s1><s2><s3>"
    assert read_one(infer, as_trained(family, source, tmp_path / "c", trigger_word="sks")).prompt == "sks"
    two = read_one(infer, run, tmp_path / "c", "--prompt", "DOG circle sks")  # a second run's tokens count on
    assert two.prompt == "<s0><s1> <s4><s5><s6><s7> sks"
    with pytest.raises(infer.UserError, match="is a LoRA; it comes first"):
        infer.read_settings(["--prompt", "a dog", str(run)])


def test_without_configuration_card_and_metadata_say_it(tmp_path, monkeypatch, capsys):
    infer = load_script("infer_lora.py")
    monkeypatch.chdir(tmp_path)
    tensors = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(1, 2)}
    metadata = {"ss_base_model": "toy_flux", "modelspec.resolution": "96x64", "modelspec.trigger_phrase": "sks"}
    save_file(tensors, "mine.safetensors", metadata=metadata)
    settings = infer.read_settings(["mine.safetensors"])
    assert settings.paths.base_model_path == FAMILIES["flux"].base and settings.prompt == "sks"
    assert (settings.resolution.width, settings.resolution.height) == (96, 64)
    Path("README.md").write_text("---\nbase_model: someone/a-base\ninstance_prompt: a photo of sks\n---\n# mine\n")
    settings = infer.read_settings(["mine.safetensors"])
    assert (settings.paths.base_model_path, settings.prompt) == ("someone/a-base", "a photo of sks")
    save_file(tensors, "other.safetensors")
    Path("README.md").unlink()
    capsys.readouterr()
    settings = infer.read_settings(["other.safetensors", "--prompt", "[a] cat"])
    assert settings.paths.base_model_path == "black-forest-labs/FLUX.1-dev" and settings.prompt == "[a] cat"
    assert "the usual one of FLUX.1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_another_familys_folder_is_told_in_one_line(name, tmp_path, shelf, capsys):
    infer, family = load_script("infer_lora.py"), FAMILIES[name]
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, "--max_train_steps", 1) == 0
    words = [
        "--paths.base_model_path",
        FAMILIES["flux"].base,
        "--prompt",
        "a",
        "--paths.infer_path",
        str(tmp_path / "o"),
    ]
    capsys.readouterr()
    assert infer.main([str(tmp_path / "x"), *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "was trained for S" in lines[0] and lines[0].endswith("is FLUX.1")


@pytest.mark.families(*KINDS)
def test_checkpoints_make_a_grid(family, trained, tmp_path, capsys):
    """A row for each checkpoint in the order of steps; each is drawn as if its folder were given, tokens included."""
    infer = load_script("infer_lora.py")
    run = as_trained(family, trained, tmp_path / "run", max_train_steps=10)
    names = ("pytorch_lora_weights.safetensors", f"{trained.name}_emb.safetensors")
    for step, factor in ((10, 1.0), (2, -1.0)):
        (run / f"checkpoint-{step}").mkdir()
        for name in names:
            with torch.no_grad():
                tensors = {
                    k: v * factor if "emb" in name else v * abs(factor) for k, v in load_file(run / name).items()
                }
            save_file(tensors, run / f"checkpoint-{step}" / name)
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-backup-3")
    common = ["--prompt", "a circle", "--num_generations", "2", "--paths.infer_path"]
    words = [str(run), *common, str(tmp_path / "a" / "out"), "--checkpoints", "all", "--compare_base"]
    assert infer.main(words) == 0
    shown = capsys.readouterr().out
    assert shown.index("step 2") < shown.index("step 10") and "step 3" not in shown and "the result" not in shown
    pictures = drawn(tmp_path / "a")
    steps = [f"000_{row}_{k:03d}.png" for row in ("scale0", "step_2_scale1", "step_10_scale1") for k in (0, 1)]
    assert set(pictures) == {*steps, "grid.png"}
    assert np.abs(pictures[steps[2]] - pictures[steps[4]]).max() > 2
    for step in (2, 10):
        out = tmp_path / str(step) / "out"
        assert infer.main([str(run / f"checkpoint-{step}"), *common, str(out)]) == 0
        alone = drawn(tmp_path / str(step))
        for k in (0, 1):
            assert np.abs(alone[f"000_scale1_{k:03d}.png"] - pictures[f"000_step_{step}_scale1_{k:03d}.png"]).max() <= 1
    settings = infer.read_settings([str(run), "--checkpoints", "10", "2"])
    assert list(infer.checkpoint_folders(settings)) == ["step 10", "step 2"]
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("max_train_steps: 10", "rank: 4"))
    settings = infer.read_settings([str(run), "--checkpoints", "all"])
    assert list(infer.checkpoint_folders(settings)) == ["step 2", "step 10", "the result"]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("negative", [None, "a red star"])
@pytest.mark.parametrize(("skip", "length"), [(1, 75), (None, 150)])
def test_both_halves_are_encoded_as_training_does(name, negative, skip, length, tmp_path):
    import argparse

    import diffusers

    family = FAMILIES[name]
    script, settings = load_script(family.script), argparse.Namespace(clip_skip=skip, max_token_length=length)
    prompt = "a red circle" + ", a circle" * (20 if length > 75 else 0)
    pipeline = getattr(diffusers, family.pipeline).from_pretrained(family.base)
    pipeline.set_progress_bar_config(disable=True)

    def embeds(text):
        parts = {key: [getattr(pipeline, n) for n in names] for key, names in script.TEXT_ENCODERS.items()}
        with torch.no_grad():
            encoded = {k: script.encode_prompts(k, [text], *part, settings) for k, part in parts.items()}
        return script.join_embeds(encoded, settings, {})

    settings.clip_skip, used = None, settings.clip_skip  # as in the pipelines, the negative half skips none
    other = embeds(negative or "")
    settings.clip_skip = used
    if negative is None and pipeline.config.get("force_zeros_for_empty_prompt"):
        other = {key: torch.zeros_like(value) for key, value in other.items()}
    wanted = pipeline(
        **embeds(prompt),
        **{f"negative_{key}": value for key, value in other.items()},
        **{"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 3.0},
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    words = ["--prompt", prompt, "--num_inference_steps", "2", "--guidance_scale", "3", "--seed", "5"]
    words += ["--resolution.width", "64", "--resolution.height", "64", "--paths.base_model_path", family.base]
    (tmp_path / "c.yaml").write_text("paths: {}\n")
    words += ["--config", str(tmp_path / "c.yaml"), *(["--negative_prompt", negative] if negative else [])]
    infer, pictures = load_script("infer_lora.py"), {}
    for name, (layers, read) in {"same": (skip or 0, length), "usual": (0, 75)}.items():
        own = ["--clip_skip", str(layers), "--max_token_length", str(read)]
        assert infer.main([*words, *own, "--paths.infer_path", str(tmp_path / name / "out")]) == 0
        pictures[name] = drawn(tmp_path / name)["000_scale1_000.png"]
    assert np.abs(np.asarray(wanted).astype(int) - pictures["same"]).max() <= 1
    assert np.abs(pictures["usual"] - pictures["same"]).max() > 2


@pytest.mark.parametrize("name", KINDS)
def test_dora_of_both_files_draws_the_same(name, tmp_path, monkeypatch):
    """diffusers drops dora_scale of files with other tools' keys; the picture must not be the plain LoRA's."""
    infer, family = load_script("infer_lora.py"), FAMILIES[name]
    flags = ("-d", SAMPLE, "--use_dora", "--learning_rate", 2e-2, "--max_train_steps", 2)
    flags += ("--train_text_encoder", "--lora_layers", *family.lora_layers)
    assert run_here(family, tmp_path / "mine", *flags) == 0
    run = as_trained(family, tmp_path / "mine", tmp_path / "run" / "mine")
    pictures = {}
    for source in ("pytorch_lora_weights", "mine", "alone"):
        if source == "alone":  # a copied infer_lora.py takes the training's other file
            monkeypatch.setattr(infer, "ROOT", tmp_path)
        file = run / f"{source.replace('alone', 'mine')}.safetensors"
        words = [str(file), "--prompt", "a red circle", "--paths.infer_path", str(tmp_path / source / "out")]
        assert infer.main([*words, "--num_inference_steps", "4"]) == 0
        pictures[source] = drawn(tmp_path / source)["000_scale1_000.png"]
    for source in ("mine", "alone"):
        assert np.abs(pictures[source] - pictures["pytorch_lora_weights"]).max() <= 1


def test_help_lists_every_key_without_heavy_imports():
    command = [sys.executable, "-X", "importtime", str(ROOT / "infer_lora.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"})
    keys = load_script("infer_lora.py").FIELDS
    assert result.returncode == 0 and all(f"--{key} " in result.stdout for key in keys)
    assert "images drawn at a time: lower it if the memory does not suffice (4)" in " ".join(result.stdout.split())
    assert not any(name in result.stderr for name in ("torch", "pydantic", "numpy", "yaml", "diffusers"))
    documented = (ROOT / "config" / "lora_infer.yaml").read_text()
    assert all(f"{key.split('.')[-1]}:" in documented for key in keys)


# ---- nothing ends in a traceback, nothing wrong is drawn in silence ----


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def without(file: Path, part: str) -> None:
    save_file({k: v for k, v in load_file(file).items() if part not in k}, file, metadata={"format": "pt"})


UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda base: cut(base / UNET), "can't be loaded"),
        (lambda base: cut(base / TEXT), "can't be loaded"),
        (lambda base: without(base / UNET, "mid_block"), "some weights of unet are missing"),
        (lambda base: without(base / TEXT, "layers.0"), "some weights of CLIPTextModel are missing"),
        (lambda base: (base / "vae" / "config.json").write_text('{"a": '), "vae/config.json: missing or damaged"),
        (lambda base: (base / "model_index.json").write_text("[]"), "model_index.json: damaged"),
        (lambda base: (base / "model_index.json").unlink(), "model_index.json: missing"),
        (lambda base: shutil.rmtree(base / "tokenizer"), "its part tokenizer is missing"),
        (lambda base: shutil.rmtree(base / "scheduler"), "its part scheduler is missing"),
        (lambda base: (base / "tokenizer" / "tokenizer.json").unlink(), "tokenizer has no vocabulary"),
        (lambda base: (base / "tokenizer" / "tokenizer_config.json").unlink(), "tokenizer has no vocabulary"),
    ],
)
def test_damaged_bases_are_named(damage, words, tmp_path, capfd):
    base = tmp_path / "base"
    shutil.copytree(FAMILIES["sd15"].base, base)
    damage(base)
    (tmp_path / "c.yaml").write_text(f"paths: {{base_model_path: {base}, infer_path: {tmp_path / 'o'}}}\nprompt: a\n")
    assert load_script("infer_lora.py").main(["--config", str(tmp_path / "c.yaml")]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0] and str(base) in lines[0]


def down(rows: int, columns: int) -> dict:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora"
    return {f"{name}.down.weight": torch.zeros(rows, columns), f"{name}.up.weight": torch.zeros(48, rows)}


def pairs(count: int) -> dict:
    """A LoRA of several layers."""
    start = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    names = [f"{start}.attn1.to_q", f"{start}.attn1.to_k", f"{start}.attn1.to_v", f"{start}.attn1.to_out.0"][:count]
    return {f"{n}.lora_{x}.weight": torch.zeros(*s) for n in names for x, s in (("A", (4, 48)), ("B", (48, 4)))}


def lacking(tensors: dict, place: str) -> dict:
    """The tensors but one: of which layer, and which matrix."""
    number, matrix = place.split(".")
    layer = sorted({k.split(".lora_")[0] for k in tensors})[int(number)]
    return {k: v for k, v in tensors.items() if not k.startswith(f"{layer}.{matrix}")}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a safetensors file"),
        (b"<html>404</html>", "not a safetensors file"),
        (down(4, 48), "damaged"),  # and cut
        ({"a": torch.full((2, 2), torch.nan)}, "holds NaN"),
        ({"foo.weight": torch.zeros(2, 2)}, "does not fit"),
        (down(4, 51), "does not fit"),
        ({k: v for k, v in down(4, 48).items() if "up" not in k}, "does not fit"),
        ({"lora_unet_joint_blocks_0_x.lora_down.weight": torch.zeros(1, 1)}, "was trained for SD3"),
        (lacking(pairs(3), "1.lora_B"), "is missing in it"),
        (lacking(pairs(3), "2.lora_A"), "is missing in it"),
        (lacking(lacking(pairs(4), "0.lora_A"), "3.lora_B"), "is missing in it"),
    ],
)
def test_damaged_loras_are_named(content, words, tmp_path, capfd):
    file = tmp_path / "mine.safetensors"
    file.write_bytes(content) if isinstance(content, bytes) else save_file(content, file)
    if words == "damaged":
        file.write_bytes(file.read_bytes()[:-8])
    flags = [
        "--paths.base_model_path",
        FAMILIES["sd15"].base,
        "--prompt",
        "a",
        "--paths.infer_path",
        str(tmp_path / "o"),
    ]
    assert load_script("infer_lora.py").main([str(file), *flags]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0] and str(file) in lines[0]


@pytest.mark.parametrize(
    ("name", "table", "words"),
    [
        ("clip_l", torch.zeros(2, 99), "does not fit a text encoder"),
        ("clip_g", torch.zeros(2, 48), "does not fit a text encoder"),
        ("emb_params", torch.zeros(2, 48), "does not fit a text encoder"),
        ("clip_l", torch.full((2, 48), torch.inf), "holds NaN or infinity"),
        ("clip_l", torch.zeros(48), "expected tables"),
        ("clip_l", torch.zeros(0, 48), "expected tables"),
    ],
)
def test_damaged_embeddings_are_named(name, table, words, tmp_path, capfd):
    save_file({name: table}, tmp_path / "x_emb.safetensors")
    flags = [
        "--paths.base_model_path",
        FAMILIES["sd15"].base,
        "--prompt",
        "a",
        "--paths.infer_path",
        str(tmp_path / "o"),
    ]
    assert load_script("infer_lora.py").main([str(tmp_path), *flags]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0] and "x_emb.safetensors" in lines[0]


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("prompt: caf\xe9".encode("latin-1"), [], "not UTF-8"),
        (b"prompt: a\x00b", [], "not YAML"),
        (b"[" * 5000, [], "not YAML"),
        (b"seed: 2020-13-45", [], "not YAML"),
        (b"- a", [], "expected keys and values"),
        (b"paths: x", [], "paths: expected keys and values, found 'x'"),
        (b"1: 2", [], "unknown key 1"),
        (
            b"prompt: {a: 1}\npaths: {base_model_path: x}",
            [],
            "prompt: expected a text or a list of texts, found {'a': 1}",
        ),
        (b"num_inference_steps: [1]", [], "num_inference_steps"),
        (b"num_generations: true", [], "num_generations: value error, input should be a number, found True"),
        (b"seed: 1" + b"0" * 40, [], "seed"),
        (b"adapter_scale: .nan", [], "adapter_scale: expected a finite number"),
        (b"guidance_scale: -1", [], "guidance_scale: input should be greater than or equal to 0, found -1"),
        (b"resolution: {width: 0}", [], "resolution.width"),
        (b"{}", ["--seed", "{a"], "--seed: while parsing"),
        (b"{}", ["--resolution.width", "1000000"], "--resolution.width: input should be less than"),
        (b"{}", ["--checkpoints", "last"], "--checkpoints: expected all, or numbers"),
        (b"{}", ["--checkpoints", "all"], "need paths.lora_weights_path"),
        (b"{}", ["--device", "cuda"], "torch finds no such device"),
        (b"{}", ["--offload", "model"], "there is no GPU in use"),
        (b"{}", ["--quantize", "nf4"], "needs an NVIDIA GPU"),
        (b"{}", ["--scheduler", "FlowMatchEulerDiscreteScheduler"], "is for bases that predict the flow"),
        (b"{}", ["--scheduler", "VQDiffusionScheduler"], "VQDiffusionScheduler can't be used here"),
        (b"{}", ["--scheduler", "RePaintScheduler"], "RePaintScheduler can't draw this"),
        (b"{}", ["--clip_skip", "9"], "the text encoder has 2 layers"),
        (b"{}", ["--max_sequence_length", "77"], "max_sequence_length is for SD3 and FLUX.1"),
        (b"{}", ["--guidance_scale", "1e38"], "has NaN in it"),
        (b"{}", ["--num_inference_steps", "5000"], "can't draw this"),
        (b"{}", ["--paths.base_model_path", "/" + "x" * 5000], "no such file or folder"),
        (b"{}", ["--paths.infer_path", "/dev/null/x"], "paths.infer_path: /dev/null/x can't be written"),
    ],
)
def test_broken_settings_are_one_line(text, flags, words, tmp_path, capfd, monkeypatch):
    if words in ("torch finds no such device", "there is no GPU in use", "needs an NVIDIA GPU"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "c.yaml").write_bytes(text)
    common = [
        "--paths.base_model_path",
        FAMILIES["sd15"].base,
        "--prompt",
        "a",
        "--paths.infer_path",
        str(tmp_path / "o"),
    ]
    common += ["--num_inference_steps", "1"] if b"num_inference_steps" not in text else []
    common = [] if text.startswith((b"prompt", b"paths")) else common
    size = [] if b"resolution" in text else ["--resolution.width", "64", "--resolution.height", "64"]
    words_ = ["--config", str(tmp_path / "c.yaml"), *common, *size, *flags]
    assert load_script("infer_lora.py").main(words_) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0]


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer/tokenizer_config.json", "model_max_length", "many"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 0),
        ("unet/config.json", "norm_eps", "small"),
    ],
)
def test_a_base_that_shows_its_damage_while_it_draws_is_named(file, key, value, tmp_path, capfd):
    base = copy_of(ROOT / FAMILIES["sd15"].base, tmp_path / "base")
    settings = json.loads((base / file).read_text()) | {key: value}
    (base / file).unlink()
    (base / file).write_text(json.dumps(settings))
    words = plain_words(tmp_path, "--paths.base_model_path", str(base))
    assert load_script("infer_lora.py").main(words) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and str(base) in lines[0]


def plain_words(tmp_path, *more: str) -> list[str]:
    """A command line that draws with the toy base alone."""
    (tmp_path / "c.yaml").write_text("paths: {}\n")
    words = ["--config", str(tmp_path / "c.yaml"), "--paths.base_model_path", FAMILIES["sd15"].base, "--prompt", "a"]
    words += ["--paths.infer_path", str(tmp_path / "o"), "--resolution.width", "64", "--resolution.height", "64"]
    return [*words, "--num_inference_steps", "2", *more]


def test_a_full_disk_leaves_no_half_picture(tmp_path, monkeypatch, capsys):
    write_bytes = Path.write_bytes

    def full(file, content):
        if file.name.endswith(".png.part"):
            write_bytes(file, content[:50])
            raise OSError(28, "No space left on device")
        return write_bytes(file, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert load_script("infer_lora.py").main(plain_words(tmp_path)) == 2
    assert "can't be written: No space left on device" in capsys.readouterr().err
    assert [f.name for f in (tmp_path / "o").rglob("*.*")] == ["config.yaml"]


def test_a_fault_of_ours_leaves_a_log(tmp_path, monkeypatch, capsys):
    infer = load_script("infer_lora.py")

    def broken(*arguments):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(infer, "size_of", broken)
    assert infer.main(plain_words(tmp_path)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    (log,) = (tmp_path / "o").glob("crash-*.log")
    assert str(log) in line and "ZeroDivisionError: two lines" in line and "in broken" in log.read_text()
    monkeypatch.setattr(
        infer, "size_of", lambda *_: (_ for _ in ()).throw(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    )
    assert infer.main(plain_words(tmp_path)) == 2
    assert "the memory does not suffice; in this order, try a lower batch_size" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "moment"), [(signal.SIGINT, "loading"), (signal.SIGTERM, "seed 1 ")])
def test_signals_end_with_a_line(number, moment, tmp_path):
    """While libraries are imported, and between pictures."""
    command = [sys.executable, str(ROOT / "infer_lora.py"), *plain_words(tmp_path, "--seed", "0")]
    command += ["--num_generations", "10000", "--batch_size", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if moment in line:
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors == f"infer_lora.py: stopped by {number.name}; finished images are kept\n"
    for file in (tmp_path / "o").rglob("*.png"):
        Image.open(file).load()


def test_shipped_configuration_is_valid(monkeypatch, tmp_path):
    infer = load_script("infer_lora.py")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")  # only looked for, not yet read
    monkeypatch.chdir(ROOT)
    settings = infer.read_settings(["--paths.lora_weights_path", str(tmp_path / "lora")])
    assert settings.compare_base and len(settings.prompt) == 3


def test_family_is_found_out(family, tmp_path):
    from scripts.parts.base_family import detect

    assert detect(family.base) == family.name
    names = {
        "flux": "double_blocks.0.x",
        "sd3": "model.diffusion_model.joint_blocks.0.x",
        "sdxl": "conditioner.embedders.1.x",
        "sd15": "model.diffusion_model.input_blocks.0.x",
    }
    for name, key in names.items():
        save_file({key: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
        assert detect(str(tmp_path / f"{name}.safetensors")) == name
    torch.save({"state_dict": {names["sdxl"]: torch.zeros(1)}}, tmp_path / "x.ckpt")
    assert detect(str(tmp_path / "x.ckpt")) == "sdxl"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"_class_name": "Other"}))
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bases" / "detect_family.py"), str(tmp_path / "other")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "not a base of" in result.stderr


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "config").glob("toy_*.yaml")))
def test_toy_configurations_parse(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = load_script(FAMILIES[name.removeprefix("toy_").removesuffix(".yaml")].script)
    given = yaml.safe_load(Path("config", name).read_text())
    args = script.parse_args(["--config", f"config/{name}"])
    assert (args.max_train_steps, args.rank) == (given["max_train_steps"], given["rank"])


@pytest.mark.parametrize("prompt", ["a" * 30000, "a\x00b", "x/" * 3000, "."])
def test_odd_prompts_are_drawn(prompt, tmp_path):
    assert load_script("infer_lora.py").main([*plain_words(tmp_path), "--prompt", prompt]) == 0
    assert list((tmp_path / "o").rglob("*.png"))
