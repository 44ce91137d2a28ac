"""scripts/start/: what the wrappers decide, set up and translate (.env, families, launchers, Olive's workflows)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import FAMILIES, ROOT, SAMPLE, load_script

from scripts.dataset.parts.settings import read_settings
from scripts.start import launch, set_up, train
from scripts.start.parts import process
from scripts.start.parts.dreambooth import class_prompt
from scripts.start.parts.env_file import read_env_file, settings_of
from scripts.start.parts.words import StartError

pytestmark = pytest.mark.unit
TOY = {name: family.base for name, family in FAMILIES.items()}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(train, "gpu_precision", lambda: None)


def parsed(start: train.Start):
    """The training script's own view of what the wrapper starts."""
    return load_script(FAMILIES[start.family].script).parse_args(start.words)


# ---- .env ------------------------------------------------------------------------------------------------------------


def test_env_files_are_read_as_bash_read_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    (tmp_path / ".env").write_text(
        "# a comment\nexport MODEL_NAME=base # why\nVAE_NAME='a b'\nOUTPUT_DIR=~/out\nHF_HOME=$HOME/hub\nEMPTY=\n"
        'VALIDATION_PROMPTS=("sks, a (small) cat" \'two\'  # first\n  "drei ü"\n)\nLAST="${MODEL_NAME}/x"\n',
        encoding="utf-8",
    )
    assert read_env_file(tmp_path / ".env") == {
        **{"MODEL_NAME": "base", "VAE_NAME": "a b", "OUTPUT_DIR": "/home/me/out", "HF_HOME": "/home/me/hub"},
        **{"EMPTY": "", "LAST": "base/x", "VALIDATION_PROMPTS": ["sks, a (small) cat", "two", "drei ü"]},
    }
    assert settings_of(tmp_path / ".env", {"MODEL_NAME": "other"})["MODEL_NAME"] == "other"
    assert read_env_file(tmp_path / "none") == {}


def test_the_example_of_an_env_file_works_with_every_line_switched_on(tmp_path):
    lines = (ROOT / ".env.example").read_text().splitlines()
    (tmp_path / ".env").write_text("\n".join(line.removeprefix("# ") for line in lines if "=" in line[:24]))
    values = read_env_file(tmp_path / ".env")
    assert values["VALIDATION_PROMPTS"] == ["sks, a portrait in a garden", "sks, a drawing in ink"]
    assert (
        values["MODEL_NAME"] == "stabilityai/stable-diffusion-xl-base-1.0" and values["OUTPUT_DIR"] == "output/my_lora"
    )


SETTINGS = {"MODEL_NAME": TOY["sdxl"], "VAE_NAME": "V", "TRAIN_DATA_DIR": "D", "OUTPUT_DIR": "O"}


@pytest.mark.parametrize(
    ("words", "settings", "wanted"),
    [
        ([], {}, ["-m", TOY["sdxl"], "-o", "O", "--pretrained_vae_model_name_or_path", "V", "-d", "D"]),
        (["-o", "P"], {"VAE_NAME": ""}, ["-m", TOY["sdxl"], "-d", "D", "-o", "P"]),
        (["--dataset_name=x", "-o", "P"], {"VAE_NAME": ""}, ["-m", TOY["sdxl"], "--dataset_name=x", "-o", "P"]),
        ([], {"DATASET_NAME": "hub/x", "VAE_NAME": ""}, ["-m", TOY["sdxl"], "-o", "O", "--dataset_name", "hub/x"]),
        (
            [],
            {"DATASET_NAME": "a.py", "VAE_NAME": "", "VALIDATION_PROMPTS": ["p q", "r"]},
            ["-m", TOY["sdxl"], "-o", "O", "--dataset_name", "a.py", "-d", "D", "--validation_prompt", "p q", "r"],
        ),
    ],
)
def test_what_the_env_file_names_is_trained(words, settings, wanted):
    start = train.decide(words, SETTINGS | settings)
    assert start.family == "sdxl" and start.words == ["--report", "--config", "config/recipe_sdxl.yaml", *wanted]


# ---- family, recipe, launcher ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [None, *FAMILIES])
def test_without_a_model_the_toy_is_trained(family):
    start = train.decide([family, "--seed", "1"] if family else ["--seed", "1"], {})
    family = family or "sd15"
    assert start.family == family and start.words == [
        "--report",
        "--config",
        f"config/toy_{family}.yaml",
        "--seed",
        "1",
    ]
    assert start.environment == {}
    assert start.command() == [sys.executable, str(ROOT / FAMILIES[family].script), *start.words]


@pytest.mark.parametrize("name", ["-m", "--model_name_or_path", "--pretrained_model_name_or_path"])
def test_a_model_on_the_command_line_tells_its_family(name):
    start = train.decide(["auto", name, TOY["sd3"], "-d", "D"], {"MODEL_NAME": "other", "OUTPUT_DIR": "never"})
    assert start.family == "sd3" and start.words[:3] == ["--report", "--config", "config/recipe_sd3.yaml"]
    assert "never" not in start.words and start.environment.get("WANDB_MODE", "offline") == "offline"


def test_a_config_of_ones_own_takes_the_recipes_place(tmp_path):
    (tmp_path / "own.yaml").write_text(f"model_name_or_path: {TOY['flux']}\n")
    start = train.decide(["--config", str(tmp_path / "own.yaml")], {"MODEL_NAME": "other"})
    assert start.family == "flux" and start.words == ["--report", "--config", str(tmp_path / "own.yaml")]


def test_precision_of_the_gpu_is_the_default_of_a_real_training(monkeypatch):
    monkeypatch.setattr(train, "gpu_precision", lambda: "fp16")
    words = ["-m", TOY["sd15"], "-d", "D"]
    assert train.decide(words, {}).environment["ACCELERATE_MIXED_PRECISION"] == "fp16"
    assert "ACCELERATE_MIXED_PRECISION" not in train.decide([*words, "--config_file", "x.yaml"], {}).environment


@pytest.mark.parametrize(
    "words", [["--config_file", "x.yaml", "sd15"], ["sd15", "--seed", "3", "--config_file=x.yaml"]]
)
def test_an_accelerate_configuration_before_or_among_the_flags(words):
    if words[0] == "--config_file":
        words = ["sd15", *words[:2]]
    command = train.decide(words, {"ACCELERATE_CONFIG": "other.yaml"}).command()
    assert command[1:4] == [str(ROOT / "scripts/start/launch.py"), "--config_file", "x.yaml"]
    assert "--config_file" not in command[4:]
    assert train.decide(["sd15"], {"ACCELERATE_CONFIG": "other.yaml"}).launch_config == "other.yaml"
    assert train.decide([*words, "--num_processes", "3"], {}).command()[4:6] == ["--num_processes", "3"]


@pytest.mark.parametrize(
    ("words", "complaint"),
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
        (["--num_processes", "2"], "--num_processes needs --config_file config/accelerate_config_multi_gpu.yaml"),
    ],
)
def test_mistakes_at_the_start_are_one_line(words, complaint):
    with pytest.raises(StartError) as error:
        train.decide(words, {})
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_help_explains_families_and_twenty_flags(capsys):
    assert len(train.USUAL_FLAGS) == 20
    assert train.main(["sdxl", "--help"]) == 0
    said = capsys.readouterr().out
    for word in (*FAMILIES, "--train_data_dir", "--rank", "--dry_run", "--help_all", "--config_file"):
        assert word in said
    assert "--adam_beta1" not in said and "(1024)" in said


# ---- set-up ----------------------------------------------------------------------------------------------------------


def test_interpreters_of_environments_on_each_system(tmp_path):
    for variables, windows, wanted in (
        ({}, False, None),
        ({"VIRTUAL_ENV": "v"}, False, "v/bin/python"),
        ({"VIRTUAL_ENV": "v"}, True, "v/Scripts/python.exe"),
        ({"CONDA_PREFIX": "c"}, False, "c/bin/python"),
        ({"CONDA_PREFIX": "c"}, True, "c/python.exe"),
    ):
        found = set_up.active_python(variables, windows)
        assert (found and found.as_posix()) == wanted


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("uv", [None, "/bin/uv"])
def test_commands_of_the_set_up(tmp_path, monkeypatch, uv, windows):
    monkeypatch.setattr(set_up, "needs_other_torch", lambda windows: windows)
    python = str(tmp_path / ("Scripts/python.exe" if windows else "bin/python"))
    make, install = set_up.install_commands(tmp_path, "requirements.txt", uv, windows)
    assert make == (["/bin/uv", "venv", "--python", sys.executable] if uv else [sys.executable, "-m", "venv"]) + [
        str(tmp_path)
    ]
    assert install[-2:] == ["-r", str(ROOT / "requirements.txt")] and python in install and "--quiet" not in install
    assert ("--torch-backend" in install) == bool(uv and windows)


def test_an_active_environment_without_the_packages_is_not_used(tmp_path, monkeypatch, capsys):
    (tmp_path / "requirements.txt").write_text("# pins\npytest==1\nno-such-package==2  # why\n")
    monkeypatch.setattr(set_up, "ROOT", tmp_path)
    (tmp_path / ".venv").mkdir()
    made = []
    monkeypatch.setattr(set_up.subprocess, "call", lambda command: made.append(command) or 0)
    monkeypatch.setattr(set_up.shutil, "which", lambda name: None)
    python = set_up.find_python(("requirements.txt",), {"VIRTUAL_ENV": sys.prefix})
    assert python == set_up.python_in(tmp_path / ".venv") and [c[1:3] for c in made] == [["-m", "venv"], ["-m", "pip"]]
    assert "the active environment lacks no-such-package: using .venv instead" in capsys.readouterr().out


def test_what_an_environment_lacks_by_name_and_by_version(tmp_path, monkeypatch):
    found = ".".join(str(pytest.__version__).split(".")[:3])
    (tmp_path / "r.txt").write_text(
        f"# pins\npytest=={found}  # here\nruff==0.0.1\nnone-such; python_version > '3'\n\n"
    )
    monkeypatch.setattr(set_up, "ROOT", tmp_path)
    assert set_up.packages(["r.txt"]) == ["pytest", "ruff", "none-such"]
    python = set_up.python_in(Path(sys.prefix))
    assert set_up.missing_in(python, set_up.packages(["r.txt"])) == ["none-such"]
    assert set_up.missing_in(python, set_up.packages(["r.txt"], pins=True)) == ["ruff", "none-such"]
    assert set_up.missing_in(tmp_path / "no python", ["a", "b"]) == ["a", "b"]


def test_the_set_up_uses_nothing_but_the_standard_library():
    """Isolated from packages, and from this project's environment, it still shows its help."""
    command = [sys.executable, "-I", "-S", str(ROOT / "scripts/start/set_up.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "run_lora_train" in result.stdout, result.stderr


def test_a_job_is_waited_for_where_a_process_cannot_become_another(monkeypatch):
    monkeypatch.setattr(process, "WINDOWS", True)
    code = "import os, sys; sys.exit(7 if os.environ['PYTHONUTF8'] == '1' and os.environ['MORE'] == 'x' else 1)"
    assert process.become([sys.executable, "-c", code], {"MORE": "x"}) == 7


def test_an_old_python_takes_a_newer_one_or_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(set_up, "OLDEST_PYTHON", (99, 0))
    monkeypatch.setattr(set_up, "needs_other_torch", lambda windows: False)
    monkeypatch.setattr(set_up.shutil, "which", {"python3.12": "/bin/python3.12"}.get)
    assert set_up.install_commands(tmp_path, "requirements.txt", None)[0][0] == "/bin/python3.12"
    assert "99.0" in set_up.install_commands(tmp_path, "requirements.txt", "uv")[0]
    monkeypatch.setattr(set_up.shutil, "which", lambda name: None)
    with pytest.raises(set_up.SetUpError, match="Python 99.0 or later is needed; found 3"):
        set_up.install_commands(tmp_path, "requirements.txt", None)


@pytest.mark.parametrize("name", ["run_lora_train", "run_lora_infer", "run_prepare_dataset", "run_tests"])
def test_wrappers_for_bash_and_windows_start_the_same_job(name):
    bash, batch = (ROOT / f"{name}.sh").read_text(), (ROOT / f"{name}.bat").read_bytes()
    assert f'scripts/start/set_up.py {name} "$@"' in bash and len(bash.splitlines()) < 9
    lines = batch.decode("ascii").split("\r\n")
    assert b"\n" not in batch.replace(b"\r\n", b"") and lines[0] == "@echo off" and lines[-2] == "exit /b %errorlevel%"
    assert f"%python% scripts\\start\\set_up.py {name} %*" in lines and 'cd /d "%~dp0"' in lines
    assert name in set_up.JOBS and (ROOT / set_up.JOBS[name][0]).is_file()


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "gpus", "complaint"),
    [
        ({"multi_gpu": True}, 0, "is for GPUs, and there is none here"),
        ({"gpu_ids": "0", "num_processes": 1}, 0, "is for GPUs"),
        ({"multi_gpu": True}, 2, "starts 8 processes here, and there are 2 GPUs: --num_processes 2"),
        ({"use_deepspeed": True}, 8, "DeepSpeed, which isn't installed"),
        ({"multi_gpu": True}, 8, None),
        ({"multi_gpu": True, "num_machines": 4}, 2, None),
        ({"num_processes": 1}, 0, None),
        ({"multi_gpu": True, "cpu": True}, 0, None),
    ],
)
def test_what_a_configuration_wants_and_the_machine_lacks(given, gpus, complaint, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    plain = {"cpu": False, "use_cpu": False, "multi_gpu": False, "use_fsdp": False, "use_deepspeed": False}
    plain |= {
        "use_megatron_lm": False,
        "num_processes": 8,
        "num_machines": 1,
        "gpu_ids": "all",
        "config_file": "c.yaml",
    }
    args = SimpleNamespace(**plain | given)
    if complaint is None:
        launch.check_machine(args, gpus)
    else:
        with pytest.raises(StartError, match=complaint):
            launch.check_machine(args, gpus)


def test_a_machine_alone_ends_in_a_line_within_seconds():
    args = SimpleNamespace(num_machines=2, machine_rank=0, main_process_ip="127.0.0.1", main_process_port=1)
    with pytest.raises(StartError, match="127.0.0.1 is out of the other machines' reach"):
        launch.check_peers(args)
    args.machine_rank = 1
    with pytest.raises(StartError, match="the first machine, 127.0.0.1:1, doesn't answer"):
        launch.check_peers(args, patience=0)


TWO = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 2\nmachine_rank: 0\n"


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_under_the_launcher_is_one_line_and_exit_code_2(processes, tmp_path):
    config = tmp_path / "two.yaml"
    config.write_text(TWO)
    if processes == 1:
        config = ROOT / "config" / "accelerate_config_cpu.yaml"
    command = [sys.executable, str(ROOT / "scripts/start/launch.py"), "--config_file", str(config)]
    command += ["--main_process_port", "0", str(ROOT / "train_lora_sd15.py"), "-m", TOY["sd15"], "--typo"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "train_lora_sd15.py: error: unknown flag --typo; did you mean --loss_type?\n"


def environment(monkeypatch, **told):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)


def test_what_launchers_say_in_the_environment(monkeypatch):
    script, args = load_script("train_lora_sd15.py"), SimpleNamespace(compile=False)
    monkeypatch.setattr(script.torch.accelerator, "is_available", lambda: False)
    environment(monkeypatch, ACCELERATE_DYNAMO_BACKEND="INDUCTOR")
    assert script.heed_launcher(args) == 1 and args.compile
    args.compile = False
    environment(monkeypatch, ACCELERATE_DYNAMO_BACKEND="NO", WORLD_SIZE="2")  # as torchrun does
    assert script.heed_launcher(args) == 2 and not args.compile and os.environ["ACCELERATE_USE_CPU"] == "true"
    environment(monkeypatch, WORLD_SIZE="2", ACCELERATE_MIXED_PRECISION="no")  # as accelerate's launcher does
    with pytest.raises(script.UserError, match="for GPUs, and there is none here"):
        script.heed_launcher(args)


# ---- Olive -----------------------------------------------------------------------------------------------------------


def workflow(
    model: str, source: dict | None = None, chain: dict | None = None, rest: dict | None = None, **lora
) -> dict:
    """A workflow as Olive documents it."""
    folder = {"type": "image_folder_dataset", "params": {"data_dir": str(SAMPLE)}}
    data = {"name": "train_data", "type": "ImageDataContainer", "load_dataset_config": source or folder}
    if chain is not None:
        data["pre_process_data_config"] = {"type": "image_lora_preprocess", "params": chain}
    return {
        "input_model": {"type": "DiffusersModel", "model_path": model},
        "data_configs": [data],
        "passes": {"sd_lora": {"type": "SDLoRA", "train_data_config": "train_data", **lora}},
        **(rest or {}),
    }


def started(content: dict, tmp_path, *words: str) -> train.Start:
    (tmp_path / "olive.json").write_text(json.dumps(content))
    return train.decide(["--config", str(tmp_path / "olive.json"), *words], {})


WHERE = {
    "systems": {"local_system": {"type": "LocalSystem", "accelerators": [{"device": "gpu"}]}},
    **{"host": "local_system", "target": "local_system", "output_dir": "my-lora-output"},
}


def test_olives_smallest_workflow_trains_with_olives_defaults(tmp_path):
    start = started(workflow(TOY["sd15"], rest=WHERE), tmp_path)
    args = parsed(start)
    assert start.family == "sd15" and not start.prepare
    assert (args.rank, args.lora_alpha, args.gradient_accumulation_steps) == (16, 16, 4)
    assert start.environment["ACCELERATE_MIXED_PRECISION"] == "bf16"  # a wish, unlike the flag
    assert (args.max_train_steps, args.train_batch_size, args.learning_rate) == (1000, 1, 1e-4)
    assert args.gradient_checkpointing and args.aspect_ratio_buckets == "auto" and args.resolution == [512]
    assert (args.train_data_dir, args.output_dir, args.logging_steps) == (str(SAMPLE), "my-lora-output", 10)
    assert "systems, host, target: left out" in start.notes[0] and "--rank 16" in start.notes[-1]
    assert parsed(started(workflow(TOY["sd15"]), tmp_path, "--rank", "8")).rank == 8  # the command line wins


def test_olives_workflow_of_each_family_and_source(tmp_path):
    hub = {"data_name": "linoyts/Tuxemon", "split": "train", "image_column": "image", "caption_column": "prompt"}
    training = {
        "max_train_steps": 2000,
        "learning_rate": 2e-4,
        "mixed_precision": "bf16",
        "use_prodigy": True,
        "prodigy_beta3": 0.9,
    }
    content = workflow(
        *(TOY["flux"], {"type": "huggingface_dataset", "params": hub}, {"base_resolution": 1024}),
        **{"r": 32, "alpha": 16, "model_variant": "flux", "merge_lora": True, "target_modules": ["to_k", "to_q"]},
        training_args=training | {"guidance_scale": 4.5},
    )
    args = parsed(started(content, tmp_path))
    assert (args.dataset_name, args.dataset_split, args.caption_column) == ("linoyts/Tuxemon", "train", "prompt")
    assert (args.rank, args.lora_alpha, args.guidance_scale, args.resolution) == (32, 16, 4.5, [1024])
    assert args.merge_lora and args.lora_layers == ["to_k", "to_q"] and args.optimizer == "prodigy"
    assert (args.prodigy_beta3, args.learning_rate) == (0.9, 2e-4)
    content = workflow(TOY["sdxl"], training_args={"guidance_scale": 3.5, "snr_gamma": 5})
    start = started(content, tmp_path)
    assert "note: guidance_scale is left out: it is for flux" in start.notes and parsed(start).snr_gamma == 5


def test_what_olive_writes_down_although_it_has_no_effect(tmp_path):
    """As `olive diffusion-lora --save_config_file` leaves it; and parameters beside a component's type."""
    idle = {"dreambooth": False, "num_class_images": 200, "prior_loss_weight": 0.5, "alpha": None, "lora_dropout": 0.0}
    source = {"type": "image_folder_dataset", "data_dir": str(SAMPLE), "recursive": True}
    start = started(workflow(TOY["sd15"], source, **idle), tmp_path)
    args = parsed(start)
    assert args.train_data_dir == str(SAMPLE) and not args.with_prior_preservation and args.num_class_images == 100
    assert any("recursive: left out" in note for note in start.notes)
    real = workflow(TOY["sd15"], dreambooth=True, class_prompt="a dog", prior_loss_weight=0.5)
    args = parsed(started(real, tmp_path))
    assert (args.with_prior_preservation, args.num_class_images, args.prior_loss_weight) == (True, 200, 0.5)


CHAIN = {
    **{"base_resolution": 1024, "output_dir": "resized_images", "device": "cuda"},
    "steps": {
        "image_filtering": {"min_size": 256, "remove_duplicates": True},
        "auto_caption": {"model_type": "florence2", "trigger_word": "sks"},
        "auto_tagging": {"threshold": 0.4, "exclude_tags": ["solo", "1girl"]},
        "image_resizing": {"resize_mode": "contain", "fill_color": [0, 128, 255], "resample_mode": "bicubic"},
        "aspect_ratio_bucketing": {"custom_buckets": [[1024, 768], [768, 1024]]},
    },
}


def test_olives_preprocessing_is_done_by_prepare_dataset_first(tmp_path):
    start = started(workflow(TOY["sdxl"], chain=CHAIN), tmp_path)
    settings, _ = read_settings(start.prepare, load_script("train_lora_sdxl.py"))
    steps = settings.steps
    assert (settings.data_dir, settings.output_dir) == (str(SAMPLE), "resized_images")
    assert steps.image_filtering.remove_duplicates and steps.auto_caption.model_type == "florence2"
    assert (steps.auto_tagging.captions, steps.auto_tagging.exclude_tags) == ("missing", ["solo", "1girl"])
    resizing = steps.image_resizing
    assert (resizing.mode, resizing.fill, resizing.interpolation) == ("contain", "#0080ff", "bicubic")
    assert steps.auto_caption.device == "auto"
    assert steps.aspect_ratio_bucketing.custom_buckets == [(1024, 768), (768, 1024)]
    assert steps.aspect_ratio_bucketing.resize_images and settings.trigger_word == "sks"
    assert start.words[start.words.index("--train_data_dir") + 1] == "resized_images"
    assert "--resolution" not in start.words and "--aspect_ratio_buckets" not in start.words


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rank": 4}, "SDLoRA: unknown name 'rank'"),
        (
            {"training_args": {"max_train_step": 4}},
            "training_args: unknown name 'max_train_step'; the nearest is 'max_train_steps'",
        ),
        ({"train_data_config": "other"}, "train_data_config 'other' is none of data_configs (train_data)"),
        ({"model_variant": "sana"}, "model_variant 'sana'"),
        ({"rest": {"pases": {}}}, "unknown name 'pases'; the nearest is 'passes'"),
        ({"rest": {"passes": {"a": {"type": "OnnxConversion"}}}}, "expected one of type SDLoRA, found 0"),
        ({"rest": {"input_model": {"type": "HfModel"}}}, "expected type DiffusersModel and a model_path"),
        ({"source": {"type": "csv"}}, "type 'csv' is none of image_folder_dataset, huggingface_dataset"),
        ({"chain": {"steps": {"resize": {}}}}, "steps: unknown name 'resize'; the nearest is 'image_resizing'"),
        ({"chain": {"steps": {"image_filtering": {"min": 1}}}}, "image_filtering: unknown name 'min'"),
    ],
)
def test_mistakes_in_a_workflow_name_the_place(change, complaint, tmp_path):
    content = workflow(TOY["sd15"], **change)
    with pytest.raises(StartError) as error:
        started(content, tmp_path)
    assert complaint in str(error.value) and str(tmp_path / "olive.json") in str(error.value)


def test_olives_one_liner_has_olives_defaults():
    words = ["-m", TOY["sdxl"], "--model_variant", "sdxl", "-d", str(SAMPLE), "-o", "x", "--learning_rate", "5e-5"]
    start = train.decide(words, {})
    args = parsed(start)
    assert (args.rank, args.gradient_accumulation_steps, args.max_train_steps) == (16, 4, 1000)
    assert (args.learning_rate, args.aspect_ratio_buckets) == (5e-5, "auto")
    assert start.environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert parsed(train.decide([*words[:2], "--model_variant=auto", *words[4:], "-r", "4"], {})).rank == 4
    assert train.decide(["--model_variant", "flux"], {}).words[2] == "config/toy_flux.yaml"


@pytest.mark.parametrize(
    ("instance", "captions", "trigger", "wanted"),
    [
        ("a photo of sks dog", ["never"], None, "a photo of dog"),
        (None, ["a photo of sks dog", "sks dog playing in the park", "a photo of sks dog"], None, "a photo of dog"),
        (None, ["sks, a cat", "sks, a cat on a sofa"], None, "a cat"),
        (None, ["my zorg cat"], "zorg", "my cat"),
        ("a photo of my dog", [], None, None),
        (None, ["a dog"], None, None),
        (None, ["a dog"], "sks", "a dog"),
        ("sks", [], None, None),
    ],
)
def test_class_prompt_of_dreambooth_alone(instance, captions, trigger, wanted):
    assert class_prompt(instance, captions, trigger) == wanted


def test_dreambooth_alone_is_prior_preservation_with_a_class_prompt(capsys):
    words = ["sd15", "-m", TOY["sd15"], "-d", str(SAMPLE), "--dreambooth"]
    start = train.decide(words, {})
    train.add_class_prompt(start)
    args = parsed(start)
    assert args.with_prior_preservation and args.class_prompt.startswith("a circle on a")
    assert "--dreambooth: the class prompt is 'a circle on a" in capsys.readouterr().out
    given = train.decide([*words, "--class_prompt", "a dog"], {})
    train.add_class_prompt(given)
    assert parsed(given).class_prompt == "a dog"
    with pytest.raises(StartError, match="--dreambooth: .* --class_prompt"):
        train.add_class_prompt(train.decide([*words, "--instance_prompt", "a photo of my dog"], {}))


def test_transformer_labs_trainer_is_a_config_for_every_family(family):
    script, file = load_script(family.script), str(ROOT / "config" / "diffusion_trainer.yaml")
    words = ["--config", file, "-m", family.base, "-d", str(SAMPLE)]
    args = parsed(train.decide(words, {}))
    assert (args.num_train_epochs, args.resolution, args.rank, args.lora_alpha) == (100, [512], 8, 16)
    assert (args.lr_warmup_steps, args.lr_scheduler, args.report_to) == (50, "constant_with_warmup", "wandb")
    shown = args.validation_epochs, args.validation_inference_steps, args.validation_guidance_scale
    assert shown == (1, 50, 7.5) and args.validation_prompt is None
    script.parse_args([*words, "--noise_offset", "0", "--snr_gamma", "0", "--prediction_type", "epsilon"])
    if family.name in ("sd3", "flux"):
        with pytest.raises(script.UserError, match="--snr_gamma: rectified flow has none"):
            script.parse_args([*words, "--snr_gamma", "5"])
