"""Settings, components, data and examples of the toy bases, as tests of functions take them."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import ROOT, SAMPLE, training_data
from PIL import Image

from lora_training.base_model.components import Components
from lora_training.base_model.reading import import_class
from lora_training.data.folders import Example
from lora_training.data.image_store import prepare_examples


def arguments(recipe, *flags):
    """The settings of a run on the sample data; its base is a name alone."""
    return recipe.parse_args(["-m", "base", "-d", str(SAMPLE), "--seed", "5", *map(str, flags)])


def toy_base(recipe) -> Path:
    """The folder of the toy base of a recipe's family."""
    return ROOT / "assets" / f"toy_{recipe.FAMILY.name}"


def components_of(recipe, *flags, dtype=torch.float32) -> Components:
    """The parts of a family's toy base, on the CPU."""
    return Components(toy_base(recipe), arguments(recipe, *flags), dtype, torch.device("cpu"))


def empty_denoiser(config: dict) -> torch.nn.Module:
    """The denoiser of a configuration, without weights."""
    with torch.device("meta"):
        return import_class("diffusers", config["_class_name"]).from_config(config)


def data_of(recipe, folder, size, bucket, *flags, captions=("a",), of_class=False):
    """(training data, the base's parts) of one picture.

    The picture says in its colours where each pixel was: red its column, green its row. of_class: it is an
    image of the class, too.
    """
    image = Image.new("RGB", size)
    image.putdata([(x, y, 0) for y in range(size[1]) for x in range(size[0])])
    image.save(folder / "x.png")
    args, base = arguments(recipe, *flags), components_of(recipe, *flags)
    example = Example("x", list(captions), (folder / "x.png").read_bytes)
    store = prepare_examples([example], [bucket], args)
    class_store = store if of_class else None
    data = training_data(recipe, store, class_store, args, base.config("vae"), base.training_scheduler())
    return data, base


def examples_in(buckets: list[int]) -> list[Example]:
    """An example in each of these buckets, without an image."""
    return [Example(f"{i}", ["a b"], None, bucket=b, size=(64, 64)) for i, b in enumerate(buckets)]


def captioned_folder(folder: Path, captions: list[str | None], size: tuple[int, int] = (64, 64)) -> Path:
    """A folder of pictures of one colour, with a .txt beside each that has a caption."""
    folder.mkdir(parents=True)
    for number, caption in enumerate(captions):
        Image.new("RGB", size, (40 * number, 90, 200)).save(folder / f"{number}.png")
        if caption:
            (folder / f"{number}.txt").write_text(caption)
    return folder
