"""infer_lora.py as people use it: the YAML, its mistakes, scales, embeddings, grids; and the wrappers' family detection."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import FAMILIES, ROOT, SAMPLE, load_script, run_here
from PIL import Image

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
    import torch

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


def test_shipped_configuration_is_valid(monkeypatch, tmp_path):
    infer = load_script("infer_lora.py")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    monkeypatch.chdir(ROOT)
    settings = infer.read_settings(["--paths.lora_weights_path", str(tmp_path / "lora")])
    assert settings.compare_base and len(settings.prompt) == 3


def test_family_is_found_out(family, tmp_path):
    from safetensors.torch import save_file

    detect = load_script("scripts/bases/detect_family.py").detect
    assert detect(family.base) == family.name
    import torch

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
    assert script.parse_args(["--config", f"config/{name}"]).max_train_steps == 350
