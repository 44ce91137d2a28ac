"""kohya's dataset.toml as --dataset_config."""

from __future__ import annotations

import json

import pytest
from conftest import QUICKEST, losses, run_here
from toy_parts import captioned_folder

from lora_training.data.examples import load_examples
from lora_training.errors import UserError

pytestmark = pytest.mark.unit

TOML = """
[general]
shuffle_caption = true
caption_extension = '.caption'
keep_tokens = 1
flip_aug = false

[[datasets]]
resolution = 64
batch_size = 4
enable_bucket = true
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'DIR/dogs'
  class_tokens = 'sks dog'
  num_repeats = 3

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'DIR/others'
  class_tokens = 'dog'
  keep_tokens = 0
  caption_extension = 'txt'

[[datasets]]
resolution = [64, 128]
color_aug = true

  [[datasets.subsets]]
  image_dir = 'DIR/cats'
  shuffle_caption = false
  caption_dropout_rate = 0.25
"""


@pytest.fixture
def folder(tmp_path):
    """Folders of dogs, cats and others, with captions of both endings."""
    for name in ("dogs", "others", "cats"):
        captioned_folder(tmp_path / name, [f"{name} in a txt", None])
        (tmp_path / name / "0.caption").write_text(f"{name}, in a caption")
    return tmp_path


def read_sets(recipe, folder, text: str, *flags, name: str = "dataset.toml"):
    """The settings of a run with this file."""
    (folder / name).write_text(text.replace("DIR", str(folder)))
    argv = ["-m", "base", "--dataset_config", str(folder / name), "--seed", "1", *map(str, flags)]
    return recipe.parse_args(argv)


def test_sets_and_subsets_have_what_they_and_those_above_them_say(recipe, folder, capsys):
    args = read_sets(recipe, folder, TOML)
    dogs, others, cats = args.sets
    assert (dogs.repeats, dogs.keep_tokens, dogs.default_caption, dogs.is_class) == (3, 2, "sks dog", False)
    assert (dogs.resolution, dogs.aspect_ratio_buckets, dogs.shuffle_tags) == ([64], "auto", True)
    assert (others.is_class, others.default_caption, others.keep_tokens) == (True, "dog", 0)
    assert (cats.resolution, cats.aspect_ratio_buckets, cats.shuffle_tags) == ([64, 128], None, False)
    assert (cats.caption_dropout, cats.keep_tokens, args.captions_vary) == (0.25, 0, True)
    captions = [[e.captions for e in load_examples(own)] for own in args.sets]
    assert captions[0] == [["dogs, in a caption"], ["sks dog"]]
    assert captions[1] == [["others in a txt"], ["dog"]]
    assert captions[2] == [["cats, in a caption"], [""]]
    note = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(note) == 1 and "batch_size (--train_batch_size), color_aug (--color_jitter)" in note[0]
    assert "flip_aug" not in note[0]


def test_the_same_as_json(recipe, folder):
    subset = {"image_dir": "DIR/dogs", "num_repeats": 2, "is_reg": False}
    content = {"datasets": [{"subsets": [subset], "resolution": "64,96"}]}
    args = read_sets(recipe, folder, json.dumps(content), name="sets.json")
    assert [(own.repeats, own.resolution) for own in args.sets] == [(2, [64, 96])]


def test_keep_tokens_counts_where_the_command_line_shuffles(recipe, folder):
    text = "[[datasets]]\nkeep_tokens = 3\n[[datasets.subsets]]\nimage_dir = 'DIR/dogs'\n"
    assert read_sets(recipe, folder, text).sets[0].keep_tokens == 0
    assert read_sets(recipe, folder, text, "--shuffle_tags").sets[0].keep_tokens == 3


SUBSET = "[[datasets]]\n[[datasets.subsets]]\n"
WRONG = {
    "[[datasets]]\nresolution = 64\n": "dataset 1, subsets: expected a list, found None",
    "[general]\nkeep_tokens = 1\n": "expected a list of sets, or kohya's datasets, found dict",
    SUBSET: "dataset 1, subset 1: has no image_dir",
    f"{SUBSET}image_dir = 'DIR/dogs'\nmetadata_file = 'a.json'\n": "1: metadata_file is not understood",
    f"{SUBSET}image_dir = 'DIR/dogs'\ncaption_prefix = 'a'\n": "subset 1: caption_prefix is not understood",
    f"{SUBSET}image_dir = 'DIR/none'\n": "subset 1: --train_data_dir .*/none: no such folder",
    f"general = 3\n{SUBSET}": "general: expected names and values, found 3",
    "datasets = []": "datasets: expected a list",
    "datasets = [3]": "datasets: expected names and values, found 3",
    "[[datasets": "not TOML",
    "": "is empty",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_said_in_a_line_that_names_the_place(recipe, folder, text):
    with pytest.raises(UserError, match=f"--dataset_config .*{WRONG[text]}"):
        read_sets(recipe, folder, text)


def test_a_run_with_sets_whose_tags_are_shuffled(folder):
    """The run itself shuffles none: its text embeddings are still not cached."""
    (folder / "dataset.toml").write_text(TOML.replace("DIR", str(folder)).replace("64", "32"))
    flags = ("--dataset_config", folder / "dataset.toml", "--resolution", 32)
    assert run_here(QUICKEST, folder / "out", *flags) == 0
    assert len(losses(folder / "out")) == 3
