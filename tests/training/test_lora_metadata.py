"""What the metadata, the model card and the rights of a LoRA's files say to other programs and people."""

from __future__ import annotations

import ast
import json
import os
import shutil

import pytest
from conftest import FAMILIES, SAMPLE, run_here
from safetensors import safe_open

pytestmark = pytest.mark.run


def metadata_of(output) -> dict[str, str]:
    with safe_open(output / f"{output.name}.safetensors", "pt") as file:
        return file.metadata()


def copy_pictures(folder, *numbers: int):
    folder.mkdir(parents=True)
    for number in numbers:
        shutil.copy(SAMPLE / f"smiley_{number:02d}.png", folder)
        (folder / f"smiley_{number:02d}.txt").write_text("a face, yellow")
    return folder


@pytest.mark.parametrize(("skipped", "written"), [(0, None), (1, "2")])
def test_clip_skip_counts_as_kohyas_files_do(tmp_path, skipped, written):
    """There 1 is the last layer, which is none skipped."""
    flags = ("-d", SAMPLE, "--clip_skip", skipped, "--max_train_steps", 1)
    assert run_here(FAMILIES["sd15"], tmp_path / "x", *flags) == 0
    assert metadata_of(tmp_path / "x").get("ss_clip_skip") == written


def test_each_of_kohyas_folders_has_its_repeats_and_tags(tmp_path):
    copy_pictures(tmp_path / "train" / "3_sks face", 0, 1)
    copy_pictures(tmp_path / "train" / "5_other", 2)
    flags = ("-d", tmp_path / "train", "--kohya_folders", "--max_train_steps", 1)
    assert run_here(FAMILIES["sd15"], tmp_path / "x", *flags) == 0
    said = metadata_of(tmp_path / "x")
    sets = {"3_sks face": {"n_repeats": 3, "img_count": 2}, "5_other": {"n_repeats": 5, "img_count": 1}}
    assert json.loads(said["ss_dataset_dirs"]) == sets and said["ss_num_train_images"] == "3"
    assert json.loads(said["ss_tag_frequency"])["3_sks face"] == {"a face": 2, "yellow": 2}


def test_sets_of_one_name_and_class_images_are_told_apart(tmp_path):
    sets = [
        {"train_data_dir": str(copy_pictures(tmp_path / who / "images", n))} for n, who in enumerate("ab")
    ]
    sets.append({"train_data_dir": str(copy_pictures(tmp_path / "class", 2, 3)), "class_prompt": "a face"})
    (tmp_path / "sets.json").write_text(json.dumps(sets))
    flags = ("--dataset_config", tmp_path / "sets.json", "--max_train_steps", 1)
    assert run_here(FAMILIES["flux"], tmp_path / "x", *flags) == 0
    said = metadata_of(tmp_path / "x")
    assert set(json.loads(said["ss_dataset_dirs"])) == {"a/images", "b/images"}
    assert json.loads(said["ss_reg_dataset_dirs"]) == {"class": {"n_repeats": 1, "img_count": 2}}
    assert said["ss_num_reg_images"] == "2"


def test_sets_whose_outer_folders_have_one_name_are_told_apart_and_two_sizes_are_one_set(tmp_path):
    """Of two sets of one name the metadata had one."""
    folders = [copy_pictures(tmp_path / who / "set" / "images", n) for n, who in enumerate("ab")]
    sets = [{"train_data_dir": str(folder), "resolutions": [32, 64]} for folder in folders]
    (tmp_path / "sets.json").write_text(json.dumps(sets))
    flags = ("--dataset_config", tmp_path / "sets.json", "--max_train_steps", 1)
    assert run_here(FAMILIES["flux"], tmp_path / "x", *flags) == 0
    said = json.loads(metadata_of(tmp_path / "x")["ss_dataset_dirs"])
    assert said == {f"{who}/set/images": {"n_repeats": 1, "img_count": 2} for who in "ab"}


@pytest.mark.parametrize(
    ("name", "flags", "line"),
    [
        ("sd3", ("--max_sequence_length", 96), "max_sequence_length=96"),
        ("flux", ("--instance_prompt", "a 'sks' face"), "pipeline(\"a 'sks' face\", "),
        ("sdxl", ("--max_token_length", 150), "# trained with max_token_length 150, which no pipeline reads"),
        ("sd15", ("--clip_skip", 1), "# trained with clip_skip 1, which no pipeline reads"),
    ],
)
def test_the_model_card_draws_as_was_trained(tmp_path, name, flags, line):
    """SD3's lines drew with T5 at 256 tokens although others were trained."""
    assert run_here(FAMILIES[name], tmp_path / "x", "-d", SAMPLE, "--max_train_steps", 1, *flags) == 0
    code = (tmp_path / "x" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert line in code
    ast.parse(code)


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_have_the_rights_of_any_file(tmp_path, monkeypatch, mask):
    """safetensors makes files that their owner alone can read: no other user of a server could."""
    from lora_training import files

    monkeypatch.setattr(files, "umask", lambda: mask)
    flags = ("-d", SAMPLE, "--max_train_steps", 1, "--checkpointing_steps", 1, "--cache_latents")
    flags += ("--cache_folder", tmp_path / "cache")
    assert run_here(FAMILIES["flux"], tmp_path / "x", *flags) == 0
    written = [file for folder in ("x", "cache") for file in (tmp_path / folder).rglob("*.safetensors")]
    assert len(written) > 4
    assert {os.stat(file).st_mode & 0o777 for file in written} == {0o666 & ~mask}
