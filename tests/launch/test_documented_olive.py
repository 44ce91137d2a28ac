"""Olive's documents of its SDLoRA pass and of `olive diffusion-lora`: each command and workflow as it stands.

Bases and pictures are toys; `olive run --config` and `olive diffusion-lora` are `run_lora_train`.
"""

from __future__ import annotations

import shlex

import pytest
from conftest import FAMILIES, SAMPLE, run_here
from parsed_starts import parse_start

from lora_training.launch import environment
from lora_training.launch.class_prompt import add_class_prompt
from lora_training.launch.decision import Start, decide
from lora_training.prepare.arguments import read_settings

pytestmark = pytest.mark.unit
HUB_BASES = {
    "runwayml/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "black-forest-labs/FLUX.1-dev": "flux",
}
FOLDERS = (
    "./train_images",
    "train_images",
    "training-images",
    "/path/to/your/images",
    "/path/to/subject/images",
)
FOLDERS += ("./my-dog-photos", "/path/to/images")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(environment, "gpu_precision", lambda: None)


def with_own_paths(text: str) -> str:
    """A document's text with a toy's folder and the sample pictures."""
    for base, family in HUB_BASES.items():
        text = text.replace(base, FAMILIES[family].base)
    for folder in sorted(FOLDERS, key=len, reverse=True):
        text = text.replace(f'"{folder}"', f'"{SAMPLE}"').replace(f" {folder}", f" {SAMPLE}")
    return text


def started(command: str) -> Start:
    """What a command line of `olive diffusion-lora` starts."""
    program, subcommand, *argv = shlex.split(with_own_paths(command))
    assert (program, subcommand) == ("olive", "diffusion-lora")
    return decide(argv, {})


TUXEMON = (
    "olive diffusion-lora -m runwayml/stable-diffusion-v1-5 --data_name linoyts/Tuxemon"
    " --caption_column prompt"
)
COMMANDS = {  # the family, and what the command says
    "olive diffusion-lora -m runwayml/stable-diffusion-v1-5 -d ./train_images": ("sd15", {}),
    TUXEMON: ("sd15", {"dataset_name": "linoyts/Tuxemon", "caption_column": "prompt"}),
    "olive diffusion-lora -m stabilityai/stable-diffusion-xl-base-1.0 -d ./train_images": ("sdxl", {}),
    "olive diffusion-lora -m black-forest-labs/FLUX.1-dev -d ./train_images -r 32": ("flux", {"rank": 32}),
    "olive diffusion-lora -m runwayml/stable-diffusion-v1-5 -d ./train_images -r 4 --max_train_steps 500"
    " --learning_rate 5e-5 -o my-lora": (
        "sd15",
        {"rank": 4, "max_train_steps": 500, "learning_rate": 5e-5, "output_dir": "my-lora"},
    ),
    "olive diffusion-lora -m stabilityai/stable-diffusion-xl-base-1.0 --data_name linoyts/Tuxemon"
    " --caption_column prompt -r 16 --max_train_steps 2000": ("sdxl", {"rank": 16, "max_train_steps": 2000}),
    "olive diffusion-lora -m black-forest-labs/FLUX.1-dev -d ./train_images -r 32 --mixed_precision bf16"
    " --guidance_scale 3.5": ("flux", {"rank": 32, "mixed_precision": "bf16", "guidance_scale": 3.5}),
    "olive diffusion-lora -m runwayml/stable-diffusion-v1-5 -d ./train_images --dreambooth"
    " --prior_loss_weight 1.0": ("sd15", {"with_prior_preservation": True, "prior_loss_weight": 1.0}),
    "olive diffusion-lora -m runwayml/stable-diffusion-v1-5 -d ./train_images --merge_lora": (
        "sd15",
        {"merge_lora": True},
    ),
    "olive diffusion-lora -m runwayml/stable-diffusion-v1-5 -d /path/to/your/images -o my-style-lora": (
        "sd15",
        {"output_dir": "my-style-lora"},
    ),
    f"{TUXEMON} -o tuxemon-lora": ("sd15", {"output_dir": "tuxemon-lora"}),
    "olive diffusion-lora -m stabilityai/stable-diffusion-xl-base-1.0 --model_variant sdxl"
    " -d /path/to/subject/images --dreambooth --instance_prompt 'a photo of sks dog'"
    " --with_prior_preservation --class_prompt 'a photo of a dog' -o my-dog-lora": (
        "sdxl",
        {
            "class_prompt": "a photo of a dog",
            "instance_prompt": "a photo of sks dog",
            "num_class_images": 200,
        },
    ),
    "olive diffusion-lora -m stabilityai/stable-diffusion-xl-base-1.0 --model_variant sdxl -r 16 --alpha 16"
    " --lora_dropout 0.0 -d ./my-dog-photos --dreambooth --instance_prompt 'a photo of sks dog'"
    " --with_prior_preservation --class_prompt 'a photo of a dog' --num_class_images 200"
    " --max_train_steps 1000 --learning_rate 1e-4 --train_batch_size 1 --gradient_accumulation_steps 4"
    " --mixed_precision bf16 --lr_scheduler constant --lr_warmup_steps 0 -o ./olive-output": (
        "sdxl",
        {"lora_alpha": 16, "gradient_accumulation_steps": 4, "output_dir": "olive-output"},
    ),
    "olive diffusion-lora --model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --model_variant sdxl"
    " --data_dir training-images --max_train_steps 1000 --output_path models/sdxl-adapter": (
        "sdxl",
        {"max_train_steps": 1000, "output_dir": "models/sdxl-adapter"},
    ),
}


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_each_documented_command_trains_what_it_says(command):
    family, expected = COMMANDS[command]
    start = started(command)
    start.argv = add_class_prompt(start.argv)
    args = parse_start(start)
    assert start.family == family and vars(args).items() >= expected.items()
    assert args.class_prompt or not args.with_prior_preservation
    whose = "Olive's settings" if "--model_variant" in command else f"settings: config/recipe_{family}.yaml"
    assert sum(whose in note for note in start.notes) == 1


# the table of options: with --model_variant, these defaults hold
OPTIONS = {
    **{"rank": 16, "lora_alpha": 16, "lora_dropout": 0.0, "lora_layers": None, "merge_lora": False},
    **{"dataset_split": "train", "image_column": "image", "caption_column": None, "max_train_steps": 1000},
    **{"learning_rate": 1e-4, "train_batch_size": 1, "gradient_accumulation_steps": 4, "seed": None},
    **{"lr_scheduler": "constant", "lr_warmup_steps": 0, "with_prior_preservation": False},
    **{"prior_loss_weight": 1.0, "output_dir": "diffusion-lora-adapter"},
}


@pytest.mark.parametrize(("base", "family"), HUB_BASES.items())
def test_each_documented_option_has_its_default(base, family):
    start = started(f"olive diffusion-lora -m {base} --model_variant {family} -d ./train_images")
    args = parse_start(start)
    assert vars(args).items() >= OPTIONS.items()
    assert args.resolution == [512 if family == "sd15" else 1024]
    assert start.environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert family != "flux" or args.guidance_scale == 3.5
    listed = started(f"olive diffusion-lora -m {base} -d ./train_images --target_modules to_k,to_q --alpha 8")
    assert (parse_start(listed).lora_layers, parse_start(listed).lora_alpha) == (["to_k,to_q"], 8)


def test_whose_settings_count_is_said_with_the_way_to_the_others():
    command = "olive diffusion-lora -m stabilityai/stable-diffusion-xl-base-1.0 -d ./train_images"
    ours, olives = started(command), started(f"{command} --model_variant auto")
    assert ours.notes == [
        "settings: config/recipe_sdxl.yaml, under your flags"
        " (--model_variant auto takes the defaults of Olive's diffusion-lora)"
    ]
    assert "without --model_variant, the settings would be those of config/recipe_sdxl.yaml" in olives.notes
    assert not decide(["sd15"], {}).notes  # the toy has no other


LOCAL = """
    "systems": {"local_system": {"type": "LocalSystem", "accelerators": [{"device": "gpu"}]}},
    "host": "local_system",
    "target": "local_system",
"""


def workflow(base: str, data: str, lora: str = "", preprocessing: str = "", rest: str = "") -> str:
    """The parts of a documented workflow, put together as the document does."""
    chain = f', "pre_process_data_config": {{"type": "image_lora_preprocess", "params": {preprocessing}}}'
    return f"""{{
    "input_model": {{"type": "DiffusersModel", "model_path": "{base}"}}, {rest}
    "data_configs": [{{
        "name": "train_data", "type": "ImageDataContainer",
        "load_dataset_config": {data}{chain if preprocessing else ""}
    }}],
    "passes": {{"sd_lora": {{"type": "SDLoRA", "train_data_config": "train_data"{lora}}}}}
}}"""


SD15, SDXL, FLUX = HUB_BASES
IMAGES = '{"type": "image_folder_dataset", "params": {"data_dir": "train_images"}}'
HUB = """{"type": "huggingface_dataset", "params": {"data_name": "linoyts/Tuxemon", "split": "train",
    "image_column": "image", "caption_column": "prompt"}}"""
CAPTIONED = """{"base_resolution": 1024, "output_dir": "resized_images", "steps": {
    "auto_caption": {"model_type": "florence2", "trigger_word": "sks"}, "aspect_ratio_bucketing": {}}}"""
TRAINING_ARGS = """, "training_args": {"learning_rate": 1e-4, "max_train_steps": 1000, "train_batch_size": 1,
    "gradient_accumulation_steps": 4, "gradient_checkpointing": true, "mixed_precision": "bf16",
    "lr_scheduler": "constant", "lr_warmup_steps": 0, "checkpointing_steps": 500, "logging_steps": 10}"""
BLOG = """, "r": 16, "alpha": 16, "training_args": {"max_train_steps": 2000, "learning_rate": 1e-4,
    "train_batch_size": 1, "gradient_accumulation_steps": 4, "mixed_precision": "bf16"}"""
BLOG_STEPS = """{"base_resolution": 1024,
    "steps": {"auto_caption": {"model_type": "florence2"}, "aspect_ratio_bucketing": {}}}"""
SMALLEST = workflow(SD15, IMAGES, rest=f'{LOCAL} "output_dir": "output",')
WORKFLOWS = {  # family, settings of the training, arguments of the preparation
    "smallest": (SMALLEST, "sd15", {"output_dir": "output", "rank": 16, "resolution": [512]}, None),
    "hub data set": (
        workflow(SD15, HUB, ', "r": 4, "training_args": {"max_train_steps": 1000, "train_batch_size": 4}'),
        *("sd15", {"dataset_name": "linoyts/Tuxemon", "rank": 4, "train_batch_size": 4}, None),
    ),
    "training arguments": (
        workflow(SD15, IMAGES, TRAINING_ARGS),
        *("sd15", {"gradient_checkpointing": True, "checkpointing_steps": 500, "logging_steps": 10}, None),
    ),
    "captions": (
        workflow(SDXL, IMAGES, preprocessing=CAPTIONED),
        *("sdxl", {"train_data_dir": "resized_images"}, {"model_type": "florence2", "trigger_word": "sks"}),
    ),
    "SD 1.5": (workflow(SD15, IMAGES, ', "r": 4'), "sd15", {"rank": 4, "resolution": [512]}, None),
    "SDXL": (
        workflow(SDXL, IMAGES, ', "r": 16', '{"base_resolution": 1024}'),
        *("sdxl", {"rank": 16, "resolution": [1024], "aspect_ratio_buckets": "auto"}, None),
    ),
    "Flux": (
        workflow(
            *(FLUX, IMAGES, ', "r": 32, "training_args": {"mixed_precision": "bf16", "guidance_scale": 3.5}'),
            '{"base_resolution": 1024}',
        ),
        *("flux", {"rank": 32, "guidance_scale": 3.5, "resolution": [1024]}, None),
    ),
    "the blog's": (
        workflow(SDXL, HUB, BLOG, BLOG_STEPS, f'{LOCAL} "output_dir": "my-lora-output",'),
        *("sdxl", {"max_train_steps": 2000, "lora_alpha": 16, "output_dir": "my-lora-output"}),
        {"model_type": "florence2"},
    ),
}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_each_documented_workflow_trains_what_it_says(name, tmp_path, monkeypatch):
    text, family, expected, captions = WORKFLOWS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(with_own_paths(text))
    start = decide(["--config", "config.json"], {})
    if start.preparation_argv:  # which leaves the folder that is trained on
        settings = read_settings(start.preparation_argv)
        assert vars(settings.auto_caption).items() >= captions.items() - {("trigger_word", "sks")}
        assert settings.aspect_ratio_bucketing is not None
        assert settings.trigger_word == captions.get("trigger_word")
        (tmp_path / settings.output_dir).mkdir()
    assert bool(start.preparation_argv) == bool(captions)
    args = parse_start(start)
    assert start.family == family and vars(args).items() >= expected.items()
    assert args.copy_to_adapter


PREPARATION = {  # a step: its documented parameters with their defaults, under our names
    "image_filtering": {
        **{"min_size": 256, "min_aspect_ratio": 0.5, "max_aspect_ratio": 2.0},
        **{"remove_duplicates": False, "blur_threshold": None},
    },
    "auto_caption": {
        **{"model_type": "blip2", "model_name": "Salesforce/blip2-opt-2.7b", "trigger_word": None},
        **{"overwrite": False, "trust_remote_code": False},
    },
    "auto_tagging": {
        "model_name": "SmilingWolf/wd-swinv2-tagger-v3",
        "threshold": 0.35,
        "captions": "missing",
    },
    "image_resizing": {
        **{"target_resolution": (512, 512), "mode": "cover", "interpolation": "lanczos"},
        **{"fill": "white", "crop_position": "center"},
    },
    "aspect_ratio_bucketing": {
        **{"base_resolution": 512, "custom_buckets": None, "resize_images": True},
        **{"interpolation": "lanczos", "crop_position": "center"},
    },
}


@pytest.mark.parametrize("step", PREPARATION)
def test_each_documented_step_of_the_preparation_has_its_defaults(step, tmp_path):
    chain = f'{{"steps": {{"{step}": {{}}}}}}'
    (tmp_path / "config.json").write_text(with_own_paths(workflow(SD15, IMAGES, preprocessing=chain)))
    settings = read_settings(decide(["--config", str(tmp_path / "config.json")], {}).preparation_argv)
    assert {name for name in PREPARATION if getattr(settings, name)} == {step}
    assert vars(getattr(settings, step)).items() >= PREPARATION[step].items()


def test_the_lora_is_where_olives_snippet_loads_it(tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(with_own_paths(SMALLEST))
    start = decide(["--config", "config.json", "--resolution", "64", "--max_train_steps", "2"], {})
    argv = [word for word in start.argv if word not in ("--report", "--gradient_checkpointing")]
    quick = ("--num_validation_images", 0, "--report_to", "none", "--mixed_precision", "no")
    assert run_here(FAMILIES["sd15"], tmp_path / "output", *argv, *quick) == 0
    pipe = DiffusionPipeline.from_pretrained(FAMILIES["sd15"].base)
    pipe.load_lora_weights("output/adapter")
    pipe.fuse_lora(lora_scale=1.0)
    copied, weights = (
        load_file(f"{folder}/pytorch_lora_weights.safetensors") for folder in ("output/adapter", "output")
    )
    assert copied.keys() == weights.keys() and all((copied[key] == weights[key]).all() for key in weights)
