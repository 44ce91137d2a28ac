"""The names of caption files, as people and other tools give them."""

from __future__ import annotations

import pytest
from PIL import Image
from toy_parts import arguments

from lora_training.data.examples import load_examples
from lora_training.data.folders import folder_examples
from lora_training.errors import UserError

pytestmark = pytest.mark.unit


def write(folder, pictures: list[str], texts: list[str]) -> None:
    """Pictures, and text files that say their own names."""
    for name in pictures:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(folder / name, "PNG")
    for name in texts:
        (folder / name).write_text(f"text of {name}")


NAMES = {  # a picture, the text files beside it, and the one that is taken
    ("z.png", ("z.TXT",)): "z.TXT",
    ("x.jpg", ("x.jpg.txt",)): "x.jpg.txt",
    ("Y.JPG", ("y.txt",)): "y.txt",
    ("a.b.png", ("a.b.txt", "a.txt")): "a.b.txt",
    ("w.png", ("w.png.txt", "w.txt")): "w.txt",
    ("v.png", ("v.caption", "v.TXT")): "v.TXT",
    ("u.png", ("u.PNG.Caption",)): "u.PNG.Caption",
    ("inner/t.png", ("inner/t.TXT", "t.txt")): "inner/t.TXT",
}


@pytest.mark.parametrize(("picture", "texts"), NAMES)
def test_a_caption_is_found_whatever_the_case_of_its_file(tmp_path, capsys, picture, texts):
    write(tmp_path, [picture], list(texts))
    (example,) = folder_examples(tmp_path, None)
    assert example.captions == [f"text of {NAMES[picture, texts]}"]
    assert "left alone" not in capsys.readouterr().out


def test_the_exact_name_comes_first(tmp_path):
    write(tmp_path, ["a.png", "B.png"], ["A.TXT", "a.txt", "b.txt", "B.txt"])
    if len(list(tmp_path.iterdir())) < 6:
        pytest.skip("this file system takes a.txt and A.TXT for the same")
    captions = {example.name: example.captions for example in folder_examples(tmp_path, None)}
    assert captions == {"a.png": ["text of a.txt"], "B.png": ["text of B.txt"]}


def test_an_ending_of_ones_own(recipe, tmp_path, capsys):
    write(tmp_path, ["a.png", "b.png"], ["a.txt", "a.tags", "b.png.TAGS"])
    args = arguments(recipe, "-d", tmp_path, "--caption_extension", ".tags")
    captions = [example.captions for example in load_examples(args)]
    assert captions == [["text of a.tags"], ["text of b.png.TAGS"]]
    assert "left alone" not in capsys.readouterr().out
    without_dot = arguments(recipe, "-d", tmp_path, "--caption_extension", "tags")
    assert [example.captions for example in load_examples(without_dot)] == captions
    with pytest.raises(UserError, match="no image has a caption"):
        load_examples(arguments(recipe, "-d", tmp_path, "--caption_extension", ".words"))
    argv = ["-m", "b", "--dataset_name", "a/b", "--caption_extension", ".tags"]
    with pytest.raises(UserError, match="--caption_extension has no effect with --dataset_name"):
        recipe.parse_args(argv)
