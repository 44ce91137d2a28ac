"""Short runs of each mode, and the files, keys and metadata that they leave."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SAMPLE, family_and, load_script, losses, metrics, run_here, weights
from safetensors import safe_open

pytestmark = pytest.mark.run

PICTURES = ("--num_validation_images", 1, "--validation_inference_steps", 2)


def keys_and_metadata(file):
    with safe_open(file, "pt") as f:
        return list(f.keys()), f.metadata()


def test_files_of_a_lora_run(family, tmp_path):
    output = tmp_path / "my lora"
    prompts = ("--validation_prompt", "a red circle", "a blue star")
    assert (
        run_here(
            family,
            f"{output}/",
            "-d",
            SAMPLE,
            *PICTURES,
            *prompts,
            "--rank",
            8,
            "--lora_alpha",
            4,
            "--trigger_word",
            "sks",
        )
        == 0
    )
    names = {p.name for p in output.iterdir()}
    assert {
        "pytorch_lora_weights.safetensors",
        "my lora.safetensors",
        "comparison.png",
        "README.md",
        "samples",
        "metrics.jsonl",
    } <= names
    keys, meta = keys_and_metadata(output / "pytorch_lora_weights.safetensors")
    saved = json.loads(meta["lora_adapter_metadata"])
    denoiser = keys[0].split(".")[0]
    assert saved[f"{denoiser}.lora_alpha"] == 4 and saved[f"{denoiser}.r"] == 8
    keys, meta = keys_and_metadata(output / "my lora.safetensors")
    modules = {k.split(".")[0] for k in keys}
    assert all(f"{m}.{end}" in keys for m in modules for end in ("alpha", "lora_down.weight", "lora_up.weight"))
    with safe_open(output / "my lora.safetensors", "pt") as f:
        pairs = [(f.get_tensor(f"{m}.alpha").item(), len(f.get_tensor(f"{m}.lora_down.weight"))) for m in modules]
    assert all(alpha / rank == 0.5 for alpha, rank in pairs)
    assert meta["modelspec.title"] == "my lora" and meta["modelspec.trigger_phrase"] == "sks"
    card = (output / "README.md").read_text()
    assert "load_lora_weights" in card and "`sks`" in card and "comparison.png" in card
    assert len(list((output / "samples").rglob("*.png"))) >= 4
    assert len(losses(output)) == 3


MODES = {
    "text encoder": ("--train_text_encoder", "--text_encoder_lr", 1e-3),
    "pivotal": (
        "--train_text_encoder_ti",
        "--token_abstraction",
        "circle",
        "--optimizer",
        "prodigy",
        "--learning_rate",
        1,
        "--text_encoder_lr",
        0.5,
    ),
    "inversion": (
        "--train_text_encoder_ti",
        "--token_abstraction",
        "circle",
        "--train_transformer_frac",
        0,
        "--initializer_concept",
        "star",
    ),
    "dora, rslora": ("--use_dora", "--use_rslora"),
    "huber, ema, offset": ("--loss_type", "huber", "--use_ema"),
    "bf16, checkpointing": ("--mixed_precision", "bf16", "--gradient_checkpointing", "--train_text_encoder"),
    "nf4": ("--quantize_base", "nf4"),
    "int8, 8-bit": ("--quantize_base", "int8", "--optimizer", "AdamW8bit"),
    "fp8, swapped": ("--quantize_base", "fp8", "--mixed_precision", "bf16", "--blocks_to_swap", 2),
    "adafactor": ("--optimizer", "adafactor", "--lr_scheduler", "cosine", "--lr_warmup_steps", 1),
    "workers, augmentations": (
        "--dataloader_num_workers",
        2,
        "--color_jitter",
        "--random_rotation",
        "--random_flip",
        "--caption_dropout",
        0.5,
    ),
    "tags, held out": ("--shuffle_tags", "--tag_separator", " ", "--validation_split", 0.2, "--validation_steps", 1),
    "blocks": ("--lora_blocks", 1, "--center_crop"),
    "epochs": ("--num_train_epochs", 1, "--train_batch_size", 5, "--scale_lr"),
}


SHARED = ("adafactor", "workers, augmentations", "epochs")  # no code of a family's own


@family_and("mode", MODES, [mode for mode in MODES if mode not in SHARED])
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
    assert weights(tmp_path / "x")
    if "held out" in mode:
        assert all(row["held_out_loss"] > 0 for row in metrics(tmp_path / "x") if "held_out_loss" in row)
        assert sum("held_out_loss" in row for row in metrics(tmp_path / "x")) == 3


def test_trained_image_is_the_plain_pipelines_image(family, studio, tmp_path):
    """What the training run shows is what people get: the same image from the plain pipeline and the saved files."""
    import numpy as np
    from PIL import Image

    module = load_script(family.script)
    flags = (
        "--train_text_encoder",
        "--text_encoder_lr",
        1e-2,
        "--learning_rate",
        1e-2,
        "--lora_layers",
        *family.lora_layers,
        "--lora_alpha",
        2,
    )
    prompt = "a sks circle on a blue background"
    shown = (
        "--num_validation_images",
        1,
        "--validation_inference_steps",
        4,
        "--validation_prompt",
        prompt,
        "--validation_guidance_scale",
        3,
    )
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, *flags, *shown, "--max_train_steps", 5) == 0
    generator = torch.Generator().manual_seed(module.sample_seed(3, 0, 0))
    for output, step in ((None, 0), (tmp_path / "x", 5)):
        image = studio.pipeline(output)(
            prompt,
            width=64,
            height=64,
            num_inference_steps=4,
            guidance_scale=3,
            **dict(family.extra),
            generator=generator.manual_seed(module.sample_seed(3, 0, 0)),
        ).images[0]
        (file,) = (tmp_path / "x" / "samples" / f"step-{step:06d}").glob("00_00_*.png")
        own = Image.open(file)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(own).astype(int)).max() <= 1


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_save_a_lora_for_the_unchanged_one(family, studio, tmp_path, start):
    import numpy as np
    from PIL import Image

    prompt = "a sks circle on a blue background"
    shown = (
        "--num_validation_images",
        1,
        "--validation_inference_steps",
        4,
        "--validation_prompt",
        prompt,
        "--validation_guidance_scale",
        3,
    )
    assert (
        run_here(family, tmp_path / "x", "-d", SAMPLE, "--init_lora_weights", start, "--learning_rate", 1e-3, *shown)
        == 0
    )
    module = load_script(family.script)
    generator = torch.Generator().manual_seed(module.sample_seed(3, 0, 0))
    image = studio.pipeline(tmp_path / "x")(
        prompt, width=64, height=64, num_inference_steps=4, guidance_scale=3, **dict(family.extra), generator=generator
    ).images[0]
    (file,) = (tmp_path / "x" / "samples" / "step-000003").glob("00_00_*.png")
    own = Image.open(file)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(own).astype(int)).max() <= 3


def test_merged_base_draws_what_base_and_lora_draw(family, studio, tmp_path):
    import numpy as np

    assert run_here(family, tmp_path / "x", "-d", SAMPLE, "--merge_lora", "--learning_rate", 1e-2) == 0
    prompt, images = "a sks circle on a blue background", []
    for pipeline in (studio.pipeline(tmp_path / "x"), studio.kind.from_pretrained(tmp_path / "x" / "merged")):
        pipeline.set_progress_bar_config(disable=True)
        images.append(
            pipeline(
                prompt,
                width=64,
                height=64,
                num_inference_steps=3,
                **dict(family.extra),
                output_type="np",
                generator=torch.Generator().manual_seed(0),
            ).images
        )
    assert np.abs(images[0] - images[1]).max() < 1e-3


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
    flags += ("--class_data_dir", tmp_path / "class", "--validation_inference_steps", 2, "--train_batch_size", 2)
    assert run_here(family, tmp_path / "x", *flags, "--num_class_images", 3) == 0
    first = {f.name: f.read_bytes() for f in (tmp_path / "class").iterdir()}
    assert len(first) == 3
    capsys.readouterr()
    assert (
        run_here(family, tmp_path / "y", *flags, "--num_class_images", 5, "--cache_latents", "--train_text_encoder")
        == 0
    )
    assert "3 of 5 class images" in capsys.readouterr().out
    second = {f.name: f.read_bytes() for f in (tmp_path / "class").iterdir()}
    assert len(second) == 5 and first.items() <= second.items()


def test_second_run_with_a_cache_folder_loads_no_encoder(family, pictures, tmp_path, script, monkeypatch):
    flags = ("-d", pictures, "--cache_latents", "--cache_folder", tmp_path / "cache", "--random_flip")
    assert run_here(family, tmp_path / "x", *flags) == 0
    loaded = []
    original = script.Components.get

    def recording(self, name, *rest, **options):
        loaded.append(name)
        return original(self, name, *rest, **options)

    monkeypatch.setattr(script.Components, "get", recording)
    assert run_here(family, tmp_path / "y", *flags) == 0
    assert losses(tmp_path / "x") == losses(tmp_path / "y")
    assert "vae" not in loaded and not any(n.startswith("text_encoder") for n in loaded)


def test_cached_and_uncached_latents_train_alike(family, pictures, tmp_path):
    flags = ("-d", pictures, "--center_crop", "--train_batch_size", 2)
    assert run_here(family, tmp_path / "x", *flags) == 0
    assert run_here(family, tmp_path / "y", *flags, "--cache_latents") == 0
    assert losses(tmp_path / "x") == pytest.approx(losses(tmp_path / "y"), abs=1e-4)


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


def test_seed_is_drawn_and_said(family, pictures, tmp_path, capsys):
    from conftest import quick_flags

    words = quick_flags(family, tmp_path / "x", "-d", pictures, "--checkpointing_steps", 3)
    at = words.index("--seed")
    assert load_script(family.script).main(words[:at] + words[at + 2 :]) == 0
    drawn = int(capsys.readouterr().out.split("seed ")[1].split()[0])
    assert json.loads((tmp_path / "x" / "checkpoint-3" / "manifest.json").read_text())["seed"] == drawn


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
    assert run_here(family, tmp_path / "y", "--dataset_name", tmp_path / "mine.py", "--train_data_dir", pictures) == 0
    assert run_here(family, tmp_path / "z", "-d", pictures) == 0
    assert len(losses(tmp_path / "y")) == 3


@pytest.mark.xdist_group("processes")
def test_script_runs_alone_in_another_folder(family, pictures, tmp_path):
    """Copied anywhere: it needs no file of the project. One is started by accelerate, as people do; one spawns a worker."""
    from ready_process import start

    copy = tmp_path / "alone" / family.script
    copy.parent.mkdir()
    copy.write_bytes((ROOT / family.script).read_bytes())
    flags = ["-m", family.base, "-d", str(pictures), "--resolution", "64", "--max_train_steps", "2"]
    flags += ["--report_to", "none", "--num_validation_images", "0"]
    if family.name == "sd15":
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        result = subprocess.run(
            [*launcher, copy, *flags],
            cwd=copy.parent,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": ""},
        )
        assert result.returncode == 0, result.stderr
    else:
        spawned = family.name == "sd3"  # data workers as on Windows and macOS
        flags += ["--dataloader_num_workers", "1"] if spawned else []
        environment = {"START_METHOD": "spawn"} if spawned else {}
        process = start(copy, flags, environment, tmp_path / "log", folder=copy.parent)
        process.join()
        assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert list((copy.parent / "output").rglob("pytorch_lora_weights.safetensors"))
