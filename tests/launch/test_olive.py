"""Olive's workflows and its one-line command as flags."""

from __future__ import annotations

import json

import pytest
from conftest import FAMILIES, SAMPLE
from parsed_starts import parse_start

from lora_training.errors import UserError
from lora_training.launch import environment
from lora_training.launch.decision import Start, decide
from lora_training.prepare.arguments import read_settings

pytestmark = pytest.mark.unit
TOY = {name: family.base for name, family in FAMILIES.items()}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(environment, "gpu_precision", lambda: None)


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


def started(content: dict, tmp_path, *argv: str) -> Start:
    (tmp_path / "olive.json").write_text(json.dumps(content))
    return decide(["--config", str(tmp_path / "olive.json"), *argv], {})


WHERE = {
    "systems": {"local_system": {"type": "LocalSystem", "accelerators": [{"device": "gpu"}]}},
    **{"host": "local_system", "target": "local_system", "output_dir": "my-lora-output"},
}


def test_olives_smallest_workflow_trains_with_olives_defaults(tmp_path):
    start = started(workflow(TOY["sd15"], rest=WHERE), tmp_path)
    args = parse_start(start)
    assert start.family == "sd15" and not start.preparation_argv
    assert (args.rank, args.lora_alpha, args.gradient_accumulation_steps) == (16, 16, 4)
    assert start.environment["ACCELERATE_MIXED_PRECISION"] == "bf16"  # a wish, unlike the flag
    assert (args.max_train_steps, args.train_batch_size, args.learning_rate) == (1000, 1, 1e-4)
    assert args.gradient_checkpointing and args.aspect_ratio_buckets == "auto" and args.resolution == [512]
    assert (args.train_data_dir, args.output_dir, args.logging_steps) == (str(SAMPLE), "my-lora-output", 10)
    assert "systems, host, target: left out" in start.notes[0] and "--rank 16" in start.notes[-1]
    assert (
        parse_start(started(workflow(TOY["sd15"]), tmp_path, "--rank", "8")).rank == 8
    )  # the command line wins


def test_olives_workflow_of_each_family_and_source(tmp_path):
    hub = {
        "data_name": "linoyts/Tuxemon",
        "split": "train",
        "image_column": "image",
        "caption_column": "prompt",
    }
    training = {
        "max_train_steps": 2000,
        "learning_rate": 2e-4,
        "mixed_precision": "bf16",
        "use_prodigy": True,
        "prodigy_beta3": 0.9,
    }
    content = workflow(
        *(TOY["flux"], {"type": "huggingface_dataset", "params": hub}, {"base_resolution": 1024}),
        **{
            "r": 32,
            "alpha": 16,
            "model_variant": "flux",
            "merge_lora": True,
            "target_modules": ["to_k", "to_q"],
        },
        training_args=training | {"guidance_scale": 4.5},
    )
    args = parse_start(started(content, tmp_path))
    assert (args.dataset_name, args.dataset_split, args.caption_column) == (
        "linoyts/Tuxemon",
        "train",
        "prompt",
    )
    assert (args.rank, args.lora_alpha, args.guidance_scale, args.resolution) == (32, 16, 4.5, [1024])
    assert args.merge_lora and args.lora_layers == ["to_k", "to_q"] and args.optimizer == "prodigy"
    assert (args.prodigy_beta3, args.learning_rate) == (0.9, 2e-4)
    content = workflow(TOY["sdxl"], training_args={"guidance_scale": 3.5, "snr_gamma": 5})
    start = started(content, tmp_path)
    assert (
        "note: guidance_scale is left out: it is for flux" in start.notes
        and parse_start(start).snr_gamma == 5
    )


def test_what_olive_writes_down_although_it_has_no_effect(tmp_path):
    """As `olive diffusion-lora --save_config_file` leaves it; and parameters beside a component's type."""
    idle = {
        "dreambooth": False,
        "num_class_images": 200,
        "prior_loss_weight": 0.5,
        "alpha": None,
        "lora_dropout": 0.0,
    }
    source = {"type": "image_folder_dataset", "data_dir": str(SAMPLE), "recursive": True}
    start = started(workflow(TOY["sd15"], source, **idle), tmp_path)
    args = parse_start(start)
    assert (
        args.train_data_dir == str(SAMPLE)
        and not args.with_prior_preservation
        and args.num_class_images == 100
    )
    assert any("recursive: left out" in note for note in start.notes)
    real = workflow(TOY["sd15"], dreambooth=True, class_prompt="a dog", prior_loss_weight=0.5)
    args = parse_start(started(real, tmp_path))
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
    steps = settings = read_settings(start.preparation_argv)
    assert (settings.data_dir, settings.output_dir) == (str(SAMPLE), "resized_images")
    assert steps.image_filtering.remove_duplicates and steps.auto_caption.model_type == "florence2"
    assert (steps.auto_tagging.captions, steps.auto_tagging.exclude_tags) == ("missing", ["solo", "1girl"])
    resizing = steps.image_resizing
    assert (resizing.mode, resizing.fill, resizing.interpolation) == ("contain", "#0080ff", "bicubic")
    assert steps.auto_caption.device == "auto"
    assert steps.aspect_ratio_bucketing.custom_buckets == [(1024, 768), (768, 1024)]
    assert steps.aspect_ratio_bucketing.resize_images and settings.trigger_word == "sks"
    assert start.argv[start.argv.index("--train_data_dir") + 1] == "resized_images"
    assert "--resolution" not in start.argv and "--aspect_ratio_buckets" not in start.argv


@pytest.mark.parametrize(
    ("change", "message"),
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
        (
            {"chain": {"steps": {"resize": {}}}},
            "steps: unknown name 'resize'; the nearest is 'image_resizing'",
        ),
        ({"chain": {"steps": {"image_filtering": {"min": 1}}}}, "image_filtering: unknown name 'min'"),
    ],
)
def test_mistakes_in_a_workflow_name_the_place(change, message, tmp_path):
    content = workflow(TOY["sd15"], **change)
    with pytest.raises(UserError) as error:
        started(content, tmp_path)
    assert message in str(error.value) and str(tmp_path / "olive.json") in str(error.value)


def test_olives_one_liner_has_olives_defaults():
    argv = [
        "-m",
        TOY["sdxl"],
        "--model_variant",
        "sdxl",
        "-d",
        str(SAMPLE),
        "-o",
        "x",
        "--learning_rate",
        "5e-5",
    ]
    start = decide(argv, {})
    args = parse_start(start)
    assert (args.rank, args.gradient_accumulation_steps, args.max_train_steps) == (16, 4, 1000)
    assert (args.learning_rate, args.aspect_ratio_buckets) == (5e-5, "auto")
    assert start.environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert parse_start(decide([*argv[:2], "--model_variant=auto", *argv[4:], "-r", "4"], {})).rank == 4
    assert decide(["--model_variant", "flux"], {}).argv[2] == "config/toy_flux.yaml"
