"""infer_lora.py as people use it: a training's folder, a YAML file, scales, checkpoints, and how it ends."""

import argparse
import importlib
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
from conftest import FAMILIES, KINDS, ROOT, SAMPLE, run_here
from drawing import as_trained, drawn, plain_arguments
from PIL import Image
from safetensors.torch import load_file, save_file

import infer_lora
from lora_training import inference
from lora_training.settings import list_fields

pytestmark = pytest.mark.run


@pytest.fixture
def trained(family, shelf) -> Path:
    """A run with LoRA and embeddings, made once for each family."""
    output = shelf / f"infer-{family.name}"
    if not (output / "README.md").exists():
        flags = ("--train_text_encoder_ti", "--token_abstraction", "circle")
        flags += ("--text_encoder_lr", 0.1, "--learning_rate", 2e-2)
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


@pytest.mark.families(*KINDS)
def test_prompts_scales_and_base_make_a_grid(write, tmp_path):
    config = write(
        prompt=["a <s0><s1>", "a red star"],
        adapter_scale=[0.5, 1.0],
        compare_base=True,
        num_images_per_prompt=2,
    )
    assert infer_lora.main(["--config", config]) == 0
    pictures = drawn(tmp_path)
    assert len(pictures) == 2 * 3 * 2 + 1 and "grid.png" in pictures
    base, half, full = (pictures[f"000_scale{s}_000.png"] for s in ("0", "0.5", "1"))
    assert np.abs(base - half).max() > 2 and np.abs(half - full).max() > 2
    folder = next((tmp_path / "out").iterdir())
    text = Image.open(folder / "001_scale1_001.png").text
    assert text["prompt"] == "a red star" and text["seed"] == "6" and text["adapter_scale"] == "1.0"
    assert yaml.safe_load((folder / "config.yaml").read_text())["adapter_scale"] == [0.5, 1.0]


def test_images_equal_the_plain_pipelines(family, write, tmp_path, studio, trained):
    assert infer_lora.main(["--config", write(guidance_scale=3.0)]) == 0
    picture = next(v for k, v in drawn(tmp_path).items() if k.startswith("000"))
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
    assert np.abs(np.asarray(image).astype(int) - picture).max() <= 1


@pytest.mark.families(*KINDS)
def test_several_loras_fusing_and_command_line(family, write, tmp_path, trained, capsys):
    first = str(trained / "pytorch_lora_weights.safetensors")
    second = str(trained / f"{trained.name}.safetensors")  # the same LoRA with the other tools' keys
    both = [{"path": first, "weight": 0.5}, {"path": second, "weight": 0.5}]
    prompt = "a red circle"
    assert infer_lora.main(["--config", write(paths={"lora_weights_path": both}, prompt=prompt)]) == 0
    halves = next(v for k, v in drawn(tmp_path).items() if k.startswith("000"))
    for flags in (
        [],
        ["--fuse", "true"],
    ):  # two halves of the same LoRA are the whole, and so is the fused one
        out = tmp_path / "out" / "x" / str(len(flags))
        config = write(paths={"infer_path": str(out)})
        assert infer_lora.main(["--config", config, "--prompt", prompt, *flags]) == 0
        folder = next(out.iterdir())
        whole = np.asarray(Image.open(next(folder.glob("000*.png")))).astype(int)
        assert np.abs(whole - halves).max() <= 2
    assert "knows <s0><s1>" in capsys.readouterr().out


@pytest.mark.families("sd15")
@pytest.mark.parametrize(
    ("changes", "flags", "message"),
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
def test_mistakes_are_one_line(write, capsys, changes, flags, message):
    assert infer_lora.main(["--config", write(**changes), *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]


def test_negative_prompts_of_flux(write, family, capsys, tmp_path):
    """With true_cfg_scale they change the picture; without it they'd be ignored, so they are refused."""
    if family.name != "flux":
        file = write(true_cfg_scale=2.0)
        assert infer_lora.main(["--config", file]) == 2
        assert "FLUX.1 alone" in capsys.readouterr().err
        return
    assert infer_lora.main(["--config", write(negative_prompt="a red star")]) == 2
    assert "without true_cfg_scale" in capsys.readouterr().err
    images = []
    for k, negative in enumerate((None, "a red star")):
        file = write(
            negative_prompt=negative, true_cfg_scale=3.0, paths={"infer_path": str(tmp_path / str(k))}
        )
        assert infer_lora.main(["--config", file]) == 0
        images.append(np.asarray(Image.open(next((tmp_path / str(k)).rglob("*scale*.png")))).astype(int))
    assert np.abs(images[0] - images[1]).max() > 5


@pytest.mark.families(*KINDS)
def test_a_folder_says_all_that_a_configuration_would(family, trained, write, tmp_path, capsys):
    """Base, size, steps, guidance, seed are the training's; TOK its tokens; a flag takes several prompts."""
    prompts = ["a <s0><s1> on a blue background", "red semicircles"]
    assert infer_lora.main(["--infer_config", write(guidance_scale=3.0, prompt=prompts)]) == 0
    explicit = drawn(tmp_path)
    run, out = as_trained(family, trained, tmp_path / "run"), str(tmp_path / "mine" / "out")
    argv = ["--prompt", "a circle on a blue background", "red semicircles", "--paths.infer_path", out]
    capsys.readouterr()
    assert infer_lora.main([str(run), *argv]) == 0
    output = capsys.readouterr().out
    note = f"note: no circle in 'red semicircles': nothing calls {run}"
    assert output.count("note:") == 1 and note in output
    pictures = drawn(tmp_path / "mine")
    assert pictures.keys() == explicit.keys() and len(pictures) == 3
    assert all(np.abs(pictures[name] - explicit[name]).max() <= 1 for name in pictures)
    kohya_file = run / f"{trained.name}.safetensors"  # the other tools' file of the same run
    assert infer_lora.main([str(kohya_file), *argv]) == 0
    other = drawn(tmp_path / "mine")
    assert all(np.abs(pictures[name] - other[name]).max() <= 2 for name in pictures if name != "grid.png")


@pytest.mark.parametrize(
    ("abouts", "prompts", "expected", "note"),
    [
        (
            [{"trigger_word": "zorg"}],
            ["a [trigger] hat", "masks"],
            ["a zorg hat", "masks"],
            "no zorg in 'masks'",
        ),
        ([{"modelspec.trigger_phrase": "s_k_s."}], ["([trigger])", "s_k_s."], ["(s_k_s.)", "s_k_s."], None),
        ([{}, {"trigger_word": "sks"}], "[trigger], masks", "sks, masks", None),
        ([{}], "[trigger], masks", "[trigger], masks", None),
    ],
)
def test_a_trigger_words_mark_in_prompts_is_taken_for_it(abouts, prompts, expected, note, capsys):
    settings = argparse.Namespace(prompt=prompts, negative_prompt=None, checkpoints=None)
    trainings = [inference.Training("x", 1.0, None, None, about, None) for about in abouts]
    infer_lora.insert_tokens(settings, trainings)
    printed = capsys.readouterr().out
    assert settings.prompt == expected and (f"note: {note}: nothing calls x" in printed) == bool(note)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_another_familys_folder_is_told_in_one_line(name, tmp_path, shelf, capsys):
    family = FAMILIES[name]
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, "--max_train_steps", 1) == 0
    argv = ["--paths.base_model_path", FAMILIES["flux"].base, "--prompt", "a"]
    argv += ["--paths.infer_path", str(tmp_path / "o")]
    capsys.readouterr()
    assert infer_lora.main([str(tmp_path / "x"), *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "was trained for S" in lines[0] and lines[0].endswith("is FLUX.1")


def labels(run, *checkpoints: str) -> list[str]:
    """The rows of a drawing of checkpoints."""
    settings = infer_lora.read_settings([str(run), "--checkpoints", *checkpoints])
    return [row.label for row in infer_lora.list_rows(settings, inference.read_trainings(settings))]


@pytest.mark.families(*KINDS)
def test_checkpoints_make_a_grid(family, trained, tmp_path, capsys):
    """A row for each checkpoint in the order of steps, drawn as its folder alone is, tokens included."""
    run = as_trained(family, trained, tmp_path / "run", max_train_steps=10)
    names = ("pytorch_lora_weights.safetensors", f"{trained.name}_emb.safetensors")
    for step, factor in ((10, 1.0), (2, -1.0)):
        (run / f"checkpoint-{step}").mkdir()
        for name in names:
            with torch.no_grad():
                tensors = {
                    k: v * factor if "emb" in name else v * abs(factor)
                    for k, v in load_file(run / name).items()
                }
            save_file(tensors, run / f"checkpoint-{step}" / name)
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-backup-3")
    common = ["--prompt", "a circle", "--num_generations", "2", "--paths.infer_path"]
    argv = [str(run), *common, str(tmp_path / "a" / "out"), "--checkpoints", "all", "--compare_base"]
    assert infer_lora.main(argv) == 0
    shown = capsys.readouterr().out
    assert (
        shown.index("step 2") < shown.index("step 10") and "step 3" not in shown and "the result" not in shown
    )
    pictures = drawn(tmp_path / "a")
    steps = [
        f"000_{row}_{k:03d}.png" for row in ("scale0", "step_2_scale1", "step_10_scale1") for k in (0, 1)
    ]
    assert set(pictures) == {*steps, "grid.png"}
    assert np.abs(pictures[steps[2]] - pictures[steps[4]]).max() > 2
    for step in (2, 10):
        out = tmp_path / str(step) / "out"
        assert infer_lora.main([str(run / f"checkpoint-{step}"), *common, str(out)]) == 0
        alone = drawn(tmp_path / str(step))
        for k in (0, 1):
            in_grid = pictures[f"000_step_{step}_scale1_{k:03d}.png"]
            assert np.abs(alone[f"000_scale1_{k:03d}.png"] - in_grid).max() <= 1
    assert labels(run, "10", "2") == ["step 10", "step 2"]
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("max_train_steps: 10", "rank: 4")
    )
    assert labels(run, "all") == ["step 2", "step 10", "the result"]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("negative", [None, "a [red] (star:1.8)"])
@pytest.mark.parametrize(
    ("skip", "length", "weighted"), [(1, 75, False), (None, 150, False), (None, 75, True)]
)
def test_both_halves_are_encoded_as_training_does(name, negative, skip, length, weighted, tmp_path):
    import diffusers

    family, settings = FAMILIES[name], argparse.Namespace(clip_skip=skip, max_token_length=length)
    settings.prompt_weighting = weighted
    recipe = importlib.import_module(Path(family.script).stem)
    prompt = "a (red:1.9) circle" + ", a circle" * (20 if length > 75 else 0)
    pipeline = getattr(diffusers, family.pipeline).from_pretrained(family.base)
    pipeline.set_progress_bar_config(disable=True)

    def embeds(text):
        text_encoders = recipe.FAMILY.text_encoders
        parts = {key: [getattr(pipeline, n) for n in names] for key, names in text_encoders.items()}
        with torch.no_grad():
            encoded = {k: recipe.encode_prompts(k, [text], *part, settings) for k, part in parts.items()}
        return recipe.join_embeds(encoded, settings, {})

    settings.clip_skip, used = None, settings.clip_skip  # as in the pipelines, the negative half skips none
    other = embeds(negative or "")
    settings.clip_skip = used
    if negative is None and pipeline.config.get("force_zeros_for_empty_prompt"):
        other = {key: torch.zeros_like(value) for key, value in other.items()}
    expected = pipeline(
        **embeds(prompt),
        **{f"negative_{key}": value for key, value in other.items()},
        **{"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 3.0},
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    argv = ["--prompt", prompt, "--num_inference_steps", "2", "--guidance_scale", "3", "--seed", "5"]
    argv += ["--resolution.width", "64", "--resolution.height", "64", "--paths.base_model_path", family.base]
    (tmp_path / "c.yaml").write_text("paths: {}\n")
    argv += ["--config", str(tmp_path / "c.yaml"), *(["--negative_prompt", negative] if negative else [])]
    pictures = {}
    cases = {"same": (skip or 0, length, weighted), "usual": (0, 75, False)}
    for name, (layers, read, weighs) in cases.items():
        flags = [
            "--clip_skip",
            str(layers),
            "--max_token_length",
            str(read),
            "--prompt_weighting",
            str(weighs),
        ]
        assert infer_lora.main([*argv, *flags, "--paths.infer_path", str(tmp_path / name / "out")]) == 0
        pictures[name] = drawn(tmp_path / name)["000_scale1_000.png"]
    assert np.abs(np.asarray(expected).astype(int) - pictures["same"]).max() <= 1
    assert np.abs(pictures["usual"] - pictures["same"]).max() > 2


@pytest.mark.parametrize("name", KINDS)
def test_dora_of_both_files_draws_the_same(name, tmp_path):
    """diffusers drops dora_scale of kohya files; the picture must not be the plain LoRA's."""
    family = FAMILIES[name]
    flags = ("-d", SAMPLE, "--use_dora", "--learning_rate", 2e-2, "--max_train_steps", 2)
    flags += ("--train_text_encoder", "--lora_layers", *family.lora_layers)
    assert run_here(family, tmp_path / "mine", *flags) == 0
    run = as_trained(family, tmp_path / "mine", tmp_path / "run" / "mine")
    pictures = {}
    for source in ("pytorch_lora_weights", "mine"):
        file, out = run / f"{source}.safetensors", tmp_path / source / "out"
        argv = [str(file), "--prompt", "a red circle", "--paths.infer_path", str(out)]
        assert infer_lora.main([*argv, "--num_inference_steps", "4"]) == 0
        pictures[source] = drawn(tmp_path / source)["000_scale1_000.png"]
    assert np.abs(pictures["mine"] - pictures["pytorch_lora_weights"]).max() <= 1


def test_help_lists_every_key_without_heavy_imports():
    command = [sys.executable, "-X", "importtime", str(ROOT / "infer_lora.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"})
    keys = list_fields(inference.Settings)
    assert result.returncode == 0 and all(f"--{key} " in result.stdout for key in keys)
    help_text = " ".join(result.stdout.split())
    assert "images drawn at a time: lower it if the memory does not suffice (4)" in help_text
    assert not any(name in result.stderr for name in ("torch", "numpy", "yaml", "diffusers"))
    documented = (ROOT / "config" / "lora_infer.yaml").read_text()
    assert all(f"{key.split('.')[-1]}:" in documented for key in keys)


@pytest.mark.parametrize("prompt", ["a" * 30000, "a\x00b", "x/" * 3000, "."])
def test_odd_prompts_are_drawn(prompt, tmp_path):
    assert infer_lora.main([*plain_arguments(tmp_path), "--prompt", prompt]) == 0
    assert list((tmp_path / "o").rglob("*.png"))


def test_a_full_disk_leaves_no_half_picture(tmp_path, monkeypatch, capsys):
    write_bytes = Path.write_bytes

    def full(file, content):
        if file.suffix == ".png":
            write_bytes(file, content[:50])
            raise OSError(28, "No space left on device")
        return write_bytes(file, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert infer_lora.main(plain_arguments(tmp_path)) == 2
    assert "can't be written: No space left on device" in capsys.readouterr().err
    assert [f.name for f in (tmp_path / "o").rglob("*.*")] == ["config.yaml"]


def test_a_fault_of_ours_leaves_a_log(tmp_path, monkeypatch, capsys):
    def broken(*arguments):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(infer_lora, "size_of", broken)
    assert infer_lora.main(plain_arguments(tmp_path)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    (log,) = (tmp_path / "o").glob("crash-*.log")
    assert str(log) in line and "ZeroDivisionError: two lines" in line and "in broken" in log.read_text()


def test_out_of_memory_ends_with_advice(tmp_path, monkeypatch, capsys):
    def without_memory(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(infer_lora, "size_of", without_memory)
    assert infer_lora.main(plain_arguments(tmp_path)) == 2
    assert "the memory does not suffice; in this order, try a lower batch_size" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "moment"), [(signal.SIGINT, "loading"), (signal.SIGTERM, "seed 1 ")])
def test_signals_end_with_a_line(number, moment, tmp_path):
    """While libraries are imported, and between pictures."""
    command = [sys.executable, str(ROOT / "infer_lora.py"), *plain_arguments(tmp_path, "--seed", "0")]
    command += ["--num_generations", "10000", "--batch_size", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if moment in line:
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors == f"infer_lora.py: stopped by {number.name}; finished images are kept\n"
    for file in (tmp_path / "o").rglob("[!.]*.png"):  # one that was being written is hidden
        Image.open(file).load()


@pytest.mark.parametrize("library", ["none", "of another interface"])
def test_a_copy_without_its_library_says_so_in_a_line(library, tmp_path):
    shutil.copy(ROOT / "infer_lora.py", tmp_path)
    message = "No module named 'lora_training'"
    if library != "none":
        (tmp_path / "lora_training").mkdir()
        text = (ROOT / "lora_training" / "__init__.py").read_text().replace("INTERFACE = 1", "INTERFACE = 0")
        (tmp_path / "lora_training" / "__init__.py").write_text(text)
        message = "the library lora_training has interface 0"
    command = [sys.executable, str(tmp_path / "infer_lora.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"infer_lora.py: error: {message}") and "`pip install`" in line
