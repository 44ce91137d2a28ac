"""What a command line starts: family, recipe of settings, what .env names, launcher."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import FAMILIES, ROOT

from lora_training.errors import UserError
from lora_training.launch import environment
from lora_training.launch.decision import decide

pytestmark = pytest.mark.unit
TOY = {name: family.base for name, family in FAMILIES.items()}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(environment, "gpu_precision", lambda: None)


SETTINGS = {"MODEL_NAME": TOY["sdxl"], "VAE_NAME": "V", "TRAIN_DATA_DIR": "D", "OUTPUT_DIR": "O"}


@pytest.mark.parametrize(
    ("argv", "settings", "expected"),
    [
        ([], {}, ["-m", TOY["sdxl"], "-o", "O", "--pretrained_vae_model_name_or_path", "V", "-d", "D"]),
        (["-o", "P"], {"VAE_NAME": ""}, ["-m", TOY["sdxl"], "-d", "D", "-o", "P"]),
        (
            ["--dataset_name=x", "-o", "P"],
            {"VAE_NAME": ""},
            ["-m", TOY["sdxl"], "--dataset_name=x", "-o", "P"],
        ),
        (
            [],
            {"DATASET_NAME": "hub/x", "VAE_NAME": ""},
            ["-m", TOY["sdxl"], "-o", "O", "--dataset_name", "hub/x"],
        ),
        (
            [],
            {"DATASET_NAME": "a.py", "VAE_NAME": "", "VALIDATION_PROMPTS": ["p q", "r"]},
            [
                "-m",
                TOY["sdxl"],
                "-o",
                "O",
                "--dataset_name",
                "a.py",
                "-d",
                "D",
                "--validation_prompt",
                "p q",
                "r",
            ],
        ),
    ],
)
def test_what_the_env_file_names_is_trained(argv, settings, expected):
    start = decide(argv, SETTINGS | settings)
    assert start.family == "sdxl" and start.argv == [
        "--report",
        "--config",
        "config/recipe_sdxl.yaml",
        *expected,
    ]


@pytest.mark.parametrize("family", [None, *FAMILIES])
def test_without_a_model_the_toy_is_trained(family):
    start = decide([family, "--seed", "1"] if family else ["--seed", "1"], {})
    family = family or "sd15"
    assert start.family == family and start.argv == [
        "--report",
        "--config",
        f"config/toy_{family}.yaml",
        "--seed",
        "1",
    ]
    assert start.environment == {}
    assert start.command(ROOT) == [sys.executable, str(ROOT / FAMILIES[family].script), *start.argv]


@pytest.mark.parametrize("name", ["-m", "--model_name_or_path", "--pretrained_model_name_or_path"])
def test_a_model_on_the_command_line_tells_its_family(name):
    start = decide(["auto", name, TOY["sd3"], "-d", "D"], {"MODEL_NAME": "other", "OUTPUT_DIR": "never"})
    assert start.family == "sd3" and start.argv[:3] == ["--report", "--config", "config/recipe_sd3.yaml"]
    assert "never" not in start.argv and start.environment.get("WANDB_MODE", "offline") == "offline"


def test_a_config_of_ones_own_takes_the_recipes_place(tmp_path):
    (tmp_path / "own.yaml").write_text(f"model_name_or_path: {TOY['flux']}\n")
    start = decide(["--config", str(tmp_path / "own.yaml")], {"MODEL_NAME": "other"})
    assert start.family == "flux" and start.argv == ["--report", "--config", str(tmp_path / "own.yaml")]


def test_precision_of_the_gpu_is_the_default_of_a_real_training(monkeypatch):
    monkeypatch.setattr(environment, "gpu_precision", lambda: "fp16")
    argv = ["-m", TOY["sd15"], "-d", "D"]
    assert decide(argv, {}).environment["ACCELERATE_MIXED_PRECISION"] == "fp16"
    assert "ACCELERATE_MIXED_PRECISION" not in decide([*argv, "--config_file", "x.yaml"], {}).environment


@pytest.mark.parametrize(
    "argv", [["--config_file", "x.yaml", "sd15"], ["sd15", "--seed", "3", "--config_file=x.yaml"]]
)
def test_an_accelerate_configuration_before_or_among_the_flags(argv):
    if argv[0] == "--config_file":
        argv = ["sd15", *argv[:2]]
    command = decide(argv, {"ACCELERATE_CONFIG": "other.yaml"}).command(ROOT)
    assert command[1:4] == [str(ROOT / "scripts/start/launch.py"), "--config_file", "x.yaml"]
    assert "--config_file" not in command[4:]
    assert decide(["sd15"], {"ACCELERATE_CONFIG": "other.yaml"}).launch_config == "other.yaml"
    assert decide([*argv, "--num_processes", "3"], {}).command(ROOT)[4:6] == ["--num_processes", "3"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sdxll", "-m", "x"], "did you mean sdxl?"),
        (["my_pictures"], "is no family: sd15, sdxl, sd3, flux, auto (flags begin with --)"),
        (["--model_variant", "sana"], "--model_variant 'sana': one of auto, sd15, sdxl, sd3, flux"),
        (["sd15", "--model_variant", "sdxl"], "give one"),
        (["-m", "/nowhere/base", "-d", "D"], "/nowhere/base: neither a folder nor a file"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["--config", str(ROOT / "config" / "diffusion_trainer.yaml")], "name the family first"),
        (["--config", str(ROOT / "requirements.txt")], "expected names and values, found str"),
        (["--config", str(ROOT / "docs" / "report.png")], "not YAML or JSON"),
        (["--config_file"], "expected one argument"),
        (
            ["--num_processes", "2"],
            "--num_processes needs --config_file config/accelerate_config_multi_gpu.yaml",
        ),
    ],
)
def test_mistakes_at_the_start_are_one_line(argv, message):
    with pytest.raises(UserError) as error:
        decide(argv, {})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_decides_imports_neither_torch_nor_diffusers():
    modules = sorted(file.stem for file in (ROOT / "lora_training" / "launch").glob("[!_]*.py"))
    imports = "; ".join(f"import lora_training.launch.{name}" for name in modules)
    program = (
        f"import sys; {imports}; sys.exit(bool({{'torch', 'diffusers', 'accelerate'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
