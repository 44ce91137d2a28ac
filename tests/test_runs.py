"""Short runs of each mode, and the files, keys and metadata that they leave."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    FAMILIES,
    KINDS,
    ROOT,
    SAMPLE,
    Studio,
    family_and,
    load_script,
    losses,
    metrics,
    run_here,
    weights,
)
from PIL import Image
from safetensors import safe_open

from lora_training.base_model.components import Components

pytestmark = pytest.mark.run

PROMPT = "a sks circle on a blue background"
SHOWN = ("--num_validation_images", 1, "--validation_inference_steps", 4, "--validation_prompt", PROMPT)
SHOWN += ("--validation_guidance_scale", 3)


def drawn_plainly(pipeline, family, kind: str):
    """The first picture of SHOWN by a plain pipeline: an image, or its latents."""
    seed = load_script(family.script).sample_seed(3, 0, 0)
    return pipeline(
        PROMPT, width=64, height=64, num_inference_steps=4, guidance_scale=3, output_type=kind,
        generator=torch.Generator().manual_seed(seed), **dict(family.extra),
    ).images[0]  # fmt: skip


def keys_and_metadata(file):
    with safe_open(file, "pt") as f:
        return list(f.keys()), f.metadata()


INVERSION = ("--train_text_encoder_ti", "--token_abstraction", "circle", "--train_transformer_frac", 0)
AUGMENTED = ("--color_jitter", "--random_rotation", "--random_flip", "--caption_dropout", 0.5)
MODES = {  # a text encoder alone, and tokens by prodigy: in test_known_faults.py
    "inversion": (*INVERSION, "--initializer_concept", "star"),
    "bf16, checkpointing, cached": (
        *("--mixed_precision", "bf16", "--gradient_checkpointing", "--train_text_encoder", "--cache_latents"),
        *("--train_batch_size", 2),
    ),
    "blocks": ("--lora_blocks", 1, "--center_crop"),
    "dora, rslora": ("--use_dora", "--use_rslora"),
    "huber, ema, offset": ("--loss_type", "huber", "--use_ema"),
    "adafactor": ("--optimizer", "adafactor", "--lr_scheduler", "cosine", "--lr_warmup_steps", 1),
    "workers, augmentations": ("--dataloader_num_workers", 2, *AUGMENTED),
    "tags, held out": (
        "--shuffle_tags",
        "--tag_separator",
        " ",
        "--validation_split",
        0.1,
        "--validation_steps",
        1,
    ),
    "epochs": ("--num_train_epochs", 1, "--train_batch_size", 5, "--scale_lr"),
}
OWN = ("inversion", "bf16, checkpointing, cached", "blocks")  # with code of a family's own
ALONE = ("adafactor", "workers, augmentations", "tags, held out", "epochs")


@family_and("mode", MODES, OWN, ALONE)
def test_mode_runs_and_moves_weights(family, tmp_path, mode):
    flags = MODES[mode]
    if mode == "epochs":
        from conftest import quick_flags  # without --max_train_steps, which would win

        words = quick_flags(family, tmp_path / "x", "-d", SAMPLE, *flags)
        at = words.index("--max_train_steps")
        assert load_script(family.script).main(words[:at] + words[at + 2 :]) == 0
        assert len(losses(tmp_path / "x")) == 3  # 12 pictures in batches of 5, 5 and 2
        return
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, *flags) == 0
    assert weights(tmp_path / "x") and all(0 < loss < 100 for loss in losses(tmp_path / "x"))
    if "held out" in mode:
        assert all(row["held_out_loss"] > 0 for row in metrics(tmp_path / "x") if "held_out_loss" in row)
        assert sum("held_out_loss" in row for row in metrics(tmp_path / "x")) == 3


BITS = {  # each way to hold a base in few bits, and each family with one
    "sd15-nf4": ("--quantize_base", "nf4"),
    "sdxl-int8, 8-bit": ("--quantize_base", "int8", "--optimizer", "AdamW8bit"),
    "sd3-fp8, swapped": ("--quantize_base", "fp8", "--mixed_precision", "bf16", "--blocks_to_swap", 2),
    "flux-nf4, swapped": ("--quantize_base", "nf4", "--mixed_precision", "bf16", "--blocks_to_swap", 2),
}


@pytest.mark.parametrize("case", BITS)
def test_a_base_in_few_bits_is_trained_on(case, tmp_path):
    assert run_here(FAMILIES[case.split("-")[0]], tmp_path / "x", "-d", SAMPLE, *BITS[case]) == 0
    assert weights(tmp_path / "x") and all(0 < loss < 100 for loss in losses(tmp_path / "x"))


def check_files(output, family) -> None:
    """The files that a run called "my lora" leaves, their keys and metadata."""
    assert (output / "comparison.png").is_file()
    keys, meta = keys_and_metadata(output / "pytorch_lora_weights.safetensors")
    saved, parts = json.loads(meta["lora_adapter_metadata"]), {key.split(".")[0] for key in keys}
    assert load_script(family.script).DENOISER in parts and "text_encoder" in parts
    assert all(saved[f"{part}.lora_alpha"] == 4 and saved[f"{part}.r"] == 8 for part in parts)
    keys, meta = keys_and_metadata(output / "my lora.safetensors")
    modules = {k.split(".")[0] for k in keys}
    assert all(
        f"{m}.{end}" in keys for m in modules for end in ("alpha", "lora_down.weight", "lora_up.weight")
    )
    with safe_open(output / "my lora.safetensors", "pt") as f:
        pairs = [
            (f.get_tensor(f"{m}.alpha").item(), len(f.get_tensor(f"{m}.lora_down.weight"))) for m in modules
        ]
    assert all(alpha / rank == 0.5 for alpha, rank in pairs)
    assert meta["modelspec.title"] == "my lora" and meta["modelspec.trigger_phrase"] == "sks"
    card = (output / "README.md").read_text()
    assert "load_lora_weights" in card and "`sks`" in card and "comparison.png" in card
    assert len(losses(output)) == 5


def test_files_of_a_run_and_its_image_is_the_plain_pipelines(family, studio, tmp_path, monkeypatch):
    """What the training run shows is what people get: the same image from the plain pipeline and the saved files; the last
    latents, in float32, to 1e-4.
    """
    module, seen, output = load_script(family.script), [], tmp_path / "my lora"
    original = module.unpack_output

    def recorded(latents, size):
        seen.append(original(latents, size))
        return seen[-1]

    monkeypatch.setattr(module, "unpack_output", recorded)
    trained = ("--train_text_encoder", "--text_encoder_lr", 1e-2, "--learning_rate", 1e-2, "--rank", 8)
    flags = (
        "-d",
        SAMPLE,
        *trained,
        "--lora_alpha",
        4,
        "--lora_layers",
        *family.lora_layers,
        "--trigger_word",
        "sks",
    )
    shown = (*SHOWN, "--validation_prompt", PROMPT, "a blue star")
    assert run_here(family, f"{output}/", *flags, *shown, "--max_train_steps", 5) == 0
    check_files(output, family)
    assert len(seen) == 12  # four control pictures come first and last
    for trained, step, latents in ((None, 0, seen[4]), (output, 5, seen[6])):
        pipeline = studio.pipeline(trained)
        image = drawn_plainly(pipeline, family, "pil")
        (file,) = (output / "samples" / f"step-{step:06d}").glob("00_00_*.png")
        assert np.abs(np.asarray(image).astype(int) - np.asarray(Image.open(file)).astype(int)).max() <= 1
        plain = drawn_plainly(pipeline, family, "latent")
        assert (original(plain[None], (64, 64)) - latents).abs().max() < 1e-4
    assert (seen[4] - seen[6]).abs().max() > 0.05


@pytest.mark.parametrize(("name", "start"), [("flux", "pissa"), ("sdxl", "olora")])
def test_starts_that_change_the_base_save_a_lora_for_the_unchanged_one(name, start, tmp_path):
    family = FAMILIES[name]
    flags = ("-d", SAMPLE, "--init_lora_weights", start, "--learning_rate", 1e-3, *SHOWN)
    assert run_here(family, tmp_path / "x", *flags) == 0
    image = drawn_plainly(Studio(family).pipeline(tmp_path / "x"), family, "pil")
    (file,) = (tmp_path / "x" / "samples" / "step-000003").glob("00_00_*.png")
    assert np.abs(np.asarray(image).astype(int) - np.asarray(Image.open(file)).astype(int)).max() <= 3


@pytest.mark.families(*KINDS)
def test_merged_base_draws_what_base_and_lora_draw(family, studio, tmp_path):
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, "--merge_lora", "--learning_rate", 1e-2) == 0
    images = []
    for pipeline in (studio.pipeline(tmp_path / "x"), studio.kind.from_pretrained(tmp_path / "x" / "merged")):
        pipeline.set_progress_bar_config(disable=True)
        images.append(drawn_plainly(pipeline, family, "np"))
    assert np.abs(images[0] - images[1]).max() < 1e-3


@pytest.mark.families(*KINDS)
def test_prior_preservation_makes_keeps_and_counts_class_images(family, tmp_path, capsys):
    flags = (
        "--instance_data_dir",
        SAMPLE,
        "--instance_prompt",
        "a sks circle",
        "--with_prior_preservation",
        "--class_prompt",
        "a circle",
    )
    flags += (
        "--class_data_dir",
        tmp_path / "class",
        "--validation_inference_steps",
        2,
        "--train_batch_size",
        2,
    )
    assert run_here(family, tmp_path / "x", *flags, "--num_class_images", 3) == 0
    first = {f.name: f.read_bytes() for f in (tmp_path / "class").iterdir()}
    assert len(first) == 3
    capsys.readouterr()
    assert (
        run_here(
            family, tmp_path / "y", *flags, "--num_class_images", 5, "--cache_latents", "--train_text_encoder"
        )
        == 0
    )
    assert "3 of 5 class images" in capsys.readouterr().out
    second = {f.name: f.read_bytes() for f in (tmp_path / "class").iterdir()}
    assert len(second) == 5 and first.items() <= second.items()


@pytest.mark.families(*KINDS)
def test_caches_change_nothing_and_a_second_run_loads_no_encoder(
    family, pictures, tmp_path, script, monkeypatch
):
    flags = ("-d", pictures, "--center_crop", "--random_flip", "--train_batch_size", 2)
    cached = (*flags, "--cache_latents", "--cache_folder", tmp_path / "cache")
    assert run_here(family, tmp_path / "plain", *flags) == 0
    assert run_here(family, tmp_path / "x", *cached) == 0
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "x"), abs=1e-4)
    loaded = []
    original = Components.get

    def recording(self, name, *rest, **options):
        loaded.append(name)
        return original(self, name, *rest, **options)

    monkeypatch.setattr(Components, "get", recording)
    assert run_here(family, tmp_path / "y", *cached) == 0
    assert losses(tmp_path / "x") == losses(tmp_path / "y")
    assert "vae" not in loaded and not any(n.startswith("text_encoder") for n in loaded)


@pytest.mark.families(*KINDS)
def test_dry_run_keeps_nothing(family, pictures, tmp_path, capsys):
    assert (
        run_here(
            family,
            tmp_path / "x",
            "-d",
            pictures,
            "--dry_run",
            "--max_train_steps",
            100,
            "--aspect_ratio_buckets",
            "auto",
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "100 steps would take about" in said and "peak memory" in said
    assert not (tmp_path / "x").exists()


@pytest.mark.families("sdxl")
def test_seed_is_drawn_and_said(family, pictures, tmp_path, capsys):
    from conftest import quick_flags

    words = quick_flags(family, tmp_path / "x", "-d", pictures, "--checkpointing_steps", 3)
    at = words.index("--seed")
    assert load_script(family.script).main(words[:at] + words[at + 2 :]) == 0
    drawn = int(capsys.readouterr().out.split("seed ")[1].split()[0])
    assert json.loads((tmp_path / "x" / "checkpoint-3" / "manifest.json").read_text())["seed"] == drawn


@pytest.mark.families("flux")
def test_datasets_from_disk_and_from_a_builder_file(family, pictures, tmp_path):
    import datasets

    rows = {"image": [str(f) for f in sorted(pictures.glob("*.png"))]}
    rows["text"] = [f"a thing {i}" for i in range(len(rows["image"]))]
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "table")
    assert run_here(family, tmp_path / "x", "--dataset_name", tmp_path / "table") == 0
    (tmp_path / "mine.py").write_text(
        "import csv, os, datasets\n"
        "class Mine(datasets.GeneratorBasedBuilder):\n"
        "    def _info(self):\n"
        "        return datasets.DatasetInfo(features=datasets.Features({'image': datasets.Image(), 'prompt': datasets.Value('string')}))\n"
        "    def _split_generators(self, manager):\n"
        "        return [datasets.SplitGenerator('train', {'folder': self.config.data_dir})]\n"
        "    def _generate_examples(self, folder):\n"
        "        for n in sorted(os.listdir(folder)):\n"
        "            if n.endswith('.png'):\n"
        "                yield n, {'image': os.path.join(folder, n), 'prompt': open(os.path.join(folder, n[:-4] + '.txt')).read()}\n"
    )
    assert (
        run_here(family, tmp_path / "y", "--dataset_name", tmp_path / "mine.py", "--train_data_dir", pictures)
        == 0
    )
    assert len(losses(tmp_path / "x")) == len(losses(tmp_path / "y")) == 3


@pytest.mark.xdist_group("processes")
def test_script_runs_alone_in_another_folder(family, pictures, tmp_path):
    """Copied anywhere: it needs no file of the project. One is started by accelerate with a configuration, as people do."""
    from ready_process import start

    copy = tmp_path / "alone" / family.script
    copy.parent.mkdir()
    copy.write_bytes((ROOT / family.script).read_bytes())
    flags = ["-m", family.base, "-d", str(pictures), "--resolution", "64", "--max_train_steps", "2"]
    flags += ["--report_to", "none", "--num_validation_images", "0"]
    if family.name == "sd15":
        launcher = [sys.executable, "-m", "accelerate.commands.launch"]
        launcher += ["--config_file", ROOT / "config" / "accelerate_config_cpu.yaml"]
        result = subprocess.run(
            [*launcher, copy, *flags],
            cwd=copy.parent,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": ""},
        )
        assert result.returncode == 0, result.stderr
    else:
        process = start(copy, flags, {}, tmp_path / "log", folder=copy.parent)
        process.join()
        assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert list((copy.parent / "output").rglob("pytorch_lora_weights.safetensors"))
