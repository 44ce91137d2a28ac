"""--dataset_split, --dataset_config_name and --image_column of local data: used, or refused."""

from __future__ import annotations

import shutil

import pytest
from toy_parts import captioned_folder

from lora_training.data.examples import load_examples
from lora_training.errors import UserError

pytestmark = pytest.mark.unit


def read(recipe, folder, *flags) -> dict:
    """{name: captions} of what --dataset_name reads."""
    argv = ["-m", "base", "--dataset_name", str(folder), *map(str, flags)]
    return {example.name: example.captions for example in load_examples(recipe.parse_args(argv))}


UNUSED = [
    (("--dataset_split", "nonsense"), "--dataset_split nonsense: .* leave it out"),
    (("--dataset_split", "train[:1]"), r"--dataset_split train\[:1\]: .* leave it out"),
    (("--image_column", "picture"), "--image_column picture: .* leave it out"),
    (("--dataset_config_name", "default"), "--dataset_config_name default: .* leave it out"),
]


@pytest.mark.parametrize(("flags", "message"), UNUSED)
@pytest.mark.parametrize("inner", [".", "cats"])
def test_what_a_folder_of_pictures_has_not_is_an_error(recipe, tmp_path, inner, flags, message):
    captioned_folder(tmp_path / "data" / inner, ["a", "b"])
    assert len(read(recipe, tmp_path / "data", "--dataset_split", "train", "--image_column", "image")) == 2
    with pytest.raises(UserError, match=message):
        read(recipe, tmp_path / "data", *flags)


@pytest.fixture
def split_folder(tmp_path):
    """A folder with the splits train and test, with captions in text files and in a table at its root."""
    captioned_folder(tmp_path / "data" / "train", ["a cat", "a dog", None])
    captioned_folder(tmp_path / "data" / "test" / "inner", ["an owl"])
    row = '{"file_name": "train/2.png", "text": "a fox"}\n'
    (tmp_path / "data" / "metadata.jsonl").write_text(row)
    return tmp_path / "data"


def test_a_folder_with_splits_is_read_split_by_split(recipe, split_folder, capsys):
    train = {"train/0.png": ["a cat"], "train/1.png": ["a dog"], "train/2.png": ["a fox"]}
    assert read(recipe, split_folder) == train
    assert "has the splits train, test: train is read" in capsys.readouterr().out
    assert read(recipe, split_folder, "--dataset_split", "test") == {"test/inner/0.png": ["an owl"]}
    for split in ("nonsense", "validation"):
        with pytest.raises(
            UserError, match=f"--dataset_split {split}: .* has the splits train, test; --train_"
        ):
            read(recipe, split_folder, "--dataset_split", split)
    with pytest.raises(UserError, match="--image_column picture"):
        read(recipe, split_folder, "--image_column", "picture")
    (split_folder / "metadata.jsonl").unlink()
    (split_folder / "train").rename(split_folder / "dogs")
    with pytest.raises(UserError, match="--dataset_split train: .* has the splits test"):
        read(recipe, split_folder)


def test_pictures_beside_a_folder_called_test_have_no_splits(recipe, tmp_path):
    captioned_folder(tmp_path / "data", ["a"])
    captioned_folder(tmp_path / "data" / "test", ["b"])
    assert read(recipe, tmp_path / "data") == {"0.png": ["a"], "test/0.png": ["b"]}
    whole = recipe.parse_args(["-m", "base", "-d", str(tmp_path / "data")])
    assert len(load_examples(whole)) == 2


def test_all_of_a_folder_with_splits_is_read_as_training_folder(recipe, split_folder):
    whole = recipe.parse_args(["-m", "base", "-d", str(split_folder)])
    assert len(load_examples(whole)) == 4


@pytest.fixture
def table(tmp_path):
    """A `datasets` table of two pictures."""
    import datasets

    folder = captioned_folder(tmp_path / "pictures", [None, None])
    rows = {"image": [str(file) for file in sorted(folder.glob("*.png"))], "text": ["a", "b"]}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def test_splits_of_data_sets_on_the_disk(recipe, tmp_path, table):
    import datasets

    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "two")
    assert len(read(recipe, tmp_path / "one")) == len(read(recipe, tmp_path / "two")) == 2
    assert list(read(recipe, tmp_path / "two", "--dataset_split", "test").values()) == [["b"]]
    for name, split in (("one", "nonsense"), ("one", "test"), ("two", "validation")):
        with pytest.raises(UserError, match=f"--dataset_split {split}: .*/{name} has train"):
            read(recipe, tmp_path / name, "--dataset_split", split)
    with pytest.raises(UserError, match="--dataset_config_name x: .* has none"):
        read(recipe, tmp_path / "two", "--dataset_config_name", "x")


def test_splits_and_configurations_of_parquet_files(recipe, tmp_path, table, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "train-0.parquet")
    flags = ("--cache_dir", tmp_path / "cache")
    assert len(read(recipe, tmp_path / "data", *flags)) == 2
    assert len(read(recipe, tmp_path / "data", *flags, "--dataset_split", "train[:1]")) == 1
    with pytest.raises(UserError, match="--dataset_split nonsense: Unknown split"):
        read(recipe, tmp_path / "data", *flags, "--dataset_split", "nonsense")
    with pytest.raises(UserError, match="--dataset_config_name nonsense: BuilderConfig"):
        read(recipe, tmp_path / "data", *flags, "--dataset_config_name", "nonsense")
    with pytest.raises(UserError, match="--image_column picture: the data set has the columns image, text"):
        read(recipe, tmp_path / "data", *flags, "--image_column", "picture")


def test_a_described_folders_configuration_is_read(recipe, tmp_path):
    captioned_folder(tmp_path / "data" / "red", ["a"])
    captioned_folder(tmp_path / "data" / "blue", ["b"])
    for name in ("red", "blue"):
        (tmp_path / "data" / name / "0.txt").unlink()
        row = f'{{"file_name": "0.png", "text": "{name}"}}\n'
        (tmp_path / "data" / name / "metadata.jsonl").write_text(row)
    configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("red", "blue"))
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    flags = ("--cache_dir", tmp_path / "cache", "--dataset_config_name")
    assert list(read(recipe, tmp_path / "data", *flags, "blue").values()) == [["blue"]]
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match="--dataset_config_name green: BuilderConfig"):
        read(recipe, tmp_path / "data", *flags, "green")
