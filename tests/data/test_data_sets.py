"""Several sets of images in one run, from a file or from kohya's folders."""

from __future__ import annotations

import argparse

import datasets
import numpy as np
import pytest
import torch
from conftest import SDXL, run_here
from PIL import Image
from toy_parts import captioned_folder

from lora_training.base_model.vae import encode_pixels
from lora_training.cache import DiskCache
from lora_training.data.batches import BatchPlan, Slot
from lora_training.data.examples import load_examples, set_labels
from lora_training.data.image_store import prepare_examples
from lora_training.errors import UserError
from lora_training.training.machine import choose_seed

pytestmark = pytest.mark.unit

SETS = """
- {{train_data_dir: {dogs}, trigger_word: sks, repeats: 3, weight: 0.5, validation_split: 0.5}}
- instance_data_dir: {cats}
  instance_prompt: a photo of ukj cat
  resolutions: [64, [128, 64]]
  caption_dropout: 0.4
- {{train_data_dir: {others}, class_prompt: a photo of an animal}}
"""


def run_up_to_the_text(recipe, monkeypatch, output, *flags):
    """A run as it is when its data have been read: there it is ended."""
    runs = []

    def load_text(run):
        runs.append(run)
        raise UserError("the data have been read")

    monkeypatch.setattr(recipe, "load_text", load_text)
    assert run_here(SDXL, output, *flags) == 2
    return runs[0]


def test_a_file_of_several_sets(recipe, tmp_path, monkeypatch):
    folders = {
        "dogs": captioned_folder(tmp_path / "dogs", ["a dog", "a brown dog"]),
        "cats": captioned_folder(tmp_path / "cats", [None, None], (128, 64)),
        "others": captioned_folder(tmp_path / "others", ["an owl", None]),
    }
    (tmp_path / "sets.yaml").write_text(SETS.format(**folders))
    flags = ("--dataset_config", tmp_path / "sets.yaml")
    run, seen = run_up_to_the_text(recipe, monkeypatch, tmp_path / "out", *flags), {}
    for number in range(20):
        for slot in run.plan.share(number, 0):
            item = run.data[slot]
            name = run.data.stores[slot.is_class].examples[slot.index].name
            shape = tuple(item["posterior_noise"].shape[1:])
            seen.setdefault((name, shape, slot.is_class), []).append((item["caption"], item["weight"].item()))
    names = {name for name, _, is_class in seen if not is_class}
    assert {"cats/0.png", "cats/1.png"} < names
    small, wide = ({shape for name, shape, _ in seen if name == n} for n in ("dogs/0.png", "cats/0.png"))
    assert len(wide) == 2 and small <= wide | small
    dogs = [pair for (name, _, _), pairs in seen.items() if name.startswith("dogs") for pair in pairs]
    trained = [c for c, weight in dogs if weight == 0.5]
    assert trained and all(caption.startswith("sks, a ") for caption in trained)
    cats = [c for (name, _, _), pairs in seen.items() if name.startswith("cats") for c, _ in pairs]
    assert set(cats) == {"a photo of ukj cat", ""}
    classes = {c for (_, _, is_class), pairs in seen.items() if is_class for c, _ in pairs}
    assert classes == {"an owl", "a photo of an animal"}


def kohya_examples(recipe, folder, *flags):
    """(settings, examples) of a folder of kohya's folders."""
    argv = ["-m", "base", "-d", str(folder), "--kohya_folders", "--resolution", "64", *flags]
    args = recipe.parse_args(argv)
    pairs = zip(args.sets, set_labels(args.sets), strict=True)
    examples = [e for set_args, label in pairs for e in load_examples(set_args, [(64, 64)], label)]
    return args, examples


def test_kohyas_folders_say_repeats_and_caption(recipe, tmp_path):
    captioned_folder(tmp_path / "data" / "10_sks dog", [None, "sks dog in the sun"])
    captioned_folder(tmp_path / "data" / "2_ukj cat", [None])
    args, examples = kohya_examples(recipe, tmp_path / "data")
    assert {e.name: (e.set_args.repeats, e.captions) for e in examples} == {
        "10_sks dog/0.png": (10, ["sks dog"]),
        "10_sks dog/1.png": (10, ["sks dog in the sun"]),
        "2_ukj cat/0.png": (2, ["ukj cat"]),
    }
    store = prepare_examples(examples, [(64, 64)], args)
    plan = BatchPlan(store.examples, args, 1, 0)
    shown = [slot.index for number in range(plan.per_epoch) for slot in plan.share(number, 0)]
    assert sorted(shown.count(i) for i in range(3)) == [2, 10, 10]


def test_repeats_of_sets_are_planned_in_rounds(recipe, tmp_path, monkeypatch):
    """Rounds shuffle some repeats at a time; each image still comes as often as its set says."""
    monkeypatch.setattr(BatchPlan, "round_limit", 8)
    captioned_folder(tmp_path / "data" / "11_a", [None, None])
    captioned_folder(tmp_path / "data" / "3_b", [None])
    args, examples = kohya_examples(recipe, tmp_path / "data", "--train_batch_size", "2")
    store = prepare_examples(examples, [(64, 64)], args)
    plan = BatchPlan(store.examples, args, 1, 0)
    shown = [(s.index, s.repeat) for number in range(plan.per_epoch) for s in plan.share(number, 0)]
    assert len(shown) == len(set(shown)) and sorted(i for i, _ in shown) == [0] * 11 + [1] * 11 + [2] * 3


def test_what_is_wrong_with_sets_is_said(recipe, tmp_path, capsys):
    folder = captioned_folder(tmp_path / "a", ["a"])
    messages = {
        "- {train_data_dir: nowhere}": "set 1: --train_data_dir nowhere: no such folder",
        f"- {{train_data_dir: {folder}, repeat: 2}}": "set 1: unknown key 'repeat'",
        f"- {{train_data_dir: {folder}}}\n- {{repeats: 2}}": "set 2: no data",
        f"- {{train_data_dir: {folder}, weight: -1}}": "weight: -1",
        f"- {{train_data_dir: {folder}, masked_loss: alfa}}": "neither alpha",
        f"- {folder}": "unknown key",
        "train_data_dir: x": "expected a list",
    }
    argv = ["-m", SDXL.base, "--dataset_config", str(tmp_path / "sets.yaml")]
    for text, message in messages.items():
        (tmp_path / "sets.yaml").write_text(text)
        assert recipe.main(argv) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "sets.yaml").write_text(f"- {{train_data_dir: {folder}}}")
    assert recipe.main([*argv, "-d", str(folder)]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_sets_hold_out_by_the_runs_seed_and_class_sets_hold_out_none(recipe, tmp_path, monkeypatch):
    dogs = captioned_folder(tmp_path / "dogs", [f"dog {k}" for k in range(6)])
    others = captioned_folder(tmp_path / "others", ["an owl"])
    sets = f"- {{train_data_dir: {dogs}}}\n- {{train_data_dir: {others}, class_prompt: an animal}}\n"
    (tmp_path / "sets.yaml").write_text(sets)
    flags = ("--dataset_config", tmp_path / "sets.yaml", "--validation_split", 0.5, "--max_train_steps", 1)
    held_out = []
    for seed in (1, 2, 1):
        run = run_up_to_the_text(recipe, monkeypatch, tmp_path / f"{seed}", *flags, "--seed", seed)
        held_out.append([e.name for e in run.data.examples if e.held_out])
        assert len(held_out[-1]) == 3
        assert not any(e.held_out for e in run.data.class_examples)
    assert held_out[0] == held_out[2] != held_out[1]
    choose_seed(args := argparse.Namespace(seed=None), (tmp_path, {"seed": 7}))
    assert args.seed == 7


PEOPLE = {"alice": (250, 20, 10), "bob": (10, 20, 250)}


def sets_of_equal_names(tmp_path, kind: str) -> tuple[str, ...]:
    """Flags for a set of each of PEOPLE, whose images have the same names and a colour of their own.

    kind: "folders", "tables", or "class" for folders of class images beside one of others.
    """
    entries = []
    for person, color in PEOPLE.items():
        folder = tmp_path / person / "images"
        folder.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (64, 64), color).save(folder / f"{number}.png")
        if kind == "tables":
            images = [str(file) for file in sorted(folder.iterdir())]
            table = datasets.Dataset.from_dict({"image": images, "text": [person] * 3})
            table.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "tables" / person / "t")
            entries.append(f"- dataset_name: {tmp_path / 'tables' / person / 't'}")
        else:
            caption = "class_prompt" if kind == "class" else "default_caption"
            entries.append(f"- {{train_data_dir: {folder}, {caption}: {person}}}")
    if kind == "class":
        others = captioned_folder(tmp_path / "others", ["a dog", "a cat", "an owl"])
        entries.append(f"- train_data_dir: {others}")
    (tmp_path / "sets.yaml").write_text("\n".join(entries))
    return ("--dataset_config", tmp_path / "sets.yaml", "--caption_dropout", 0.5)


@pytest.mark.parametrize("kind", ["folders", "tables", "class"])
def test_sets_with_images_of_one_name_keep_their_pictures_and_draws(recipe, tmp_path, monkeypatch, kind):
    flags, is_class = sets_of_equal_names(tmp_path, kind), kind == "class"
    run = run_up_to_the_text(recipe, monkeypatch, tmp_path / "out", *flags)
    examples, noises, names = run.data.stores[is_class].examples, [], []
    assert len(examples) == 6
    for index, example in enumerate(examples):
        items = [run.data[Slot(index, 0, epoch, 0, 1.0, is_class)] for epoch in range(4)]
        assert {tuple(item["pixels"][:, 5, 9].tolist()) for item in items} == {PEOPLE[example.captions[0]]}
        noises += [tuple(item[k][0, 0].tolist()) for item in items for k in ("noise", "posterior_noise")]
        names.append(example.name)
    assert len(set(noises)) == 6 * 4 * 2 and len(set(names)) == 6


def test_a_set_given_at_two_sizes_has_draws_of_its_own_for_each(recipe, tmp_path, monkeypatch):
    folder = captioned_folder(tmp_path / "dogs", ["a dog", "a brown dog"])
    (tmp_path / "sets.yaml").write_text(f"- {{train_data_dir: {folder}, resolutions: [64, 64, 128]}}")
    flags = ("--dataset_config", tmp_path / "sets.yaml", "--validation_split", 0)
    run = run_up_to_the_text(recipe, monkeypatch, tmp_path / "out", *flags)
    slots = [Slot(index, example.bucket, 0, 0, 1.0) for index, example in enumerate(run.data.examples)]
    assert len({tuple(run.data[slot]["noise"][0, 0, :4].tolist()) for slot in slots}) == 6
    assert [example.name for example in run.data.examples] == ["dogs/0.png", "dogs/1.png"] * 3


def test_a_cache_filled_by_two_sets_of_equal_names_is_right_for_each(recipe, tmp_path, monkeypatch):
    flags = (*sets_of_equal_names(tmp_path, "folders"), "--cache_latents", "--cache_folder", tmp_path / "c")
    both = run_up_to_the_text(recipe, monkeypatch, tmp_path / "both", *flags)
    for entry, person in enumerate(PEOPLE):
        alone = ("-d", tmp_path / person / "images", "--default_caption", person, *flags[4:])
        run = run_up_to_the_text(recipe, monkeypatch, tmp_path / person, *alone)
        image = np.asarray(Image.open(tmp_path / person / "images" / "0.png"))
        expected = encode_pixels(torch.from_numpy(image.copy()).permute(2, 0, 1)[None], run.components.vae())
        for index in range(3):
            moments = run.data.moments[False, index, 0, False]
            assert torch.allclose(moments, expected[0].cpu(), atol=1e-4)
            assert torch.equal(moments, both.data.moments[False, 3 * entry + index, 0, False])


def test_latents_of_caches_in_which_names_were_mistaken_are_not_taken(recipe, tmp_path, monkeypatch):
    folder = captioned_folder(tmp_path / "dogs", ["a dog", "a brown dog"])
    flags = ("-d", folder, "--cache_latents", "--cache_folder", tmp_path / "cache")
    run = run_up_to_the_text(recipe, monkeypatch, tmp_path / "before", *flags[:2])
    vae, dtype = run.components.identity("vae"), run.components.dtype
    cache = DiskCache(str(tmp_path / "cache"), "latents")
    for example in run.data.examples:
        key = ("sdxl", vae, dtype, run.args.family.vae_float32, run.args.image_interpolation_mode)
        wrong = {"moments": torch.full((8, 8, 8), 7.0)}
        cache.store(wrong, *key, example.digest, (64, 64), 0, 0, False)
    after = run_up_to_the_text(recipe, monkeypatch, tmp_path / "after", *flags)
    assert len(after.data.moments) == 2
    assert not any((moments == 7).all() for moments in after.data.moments.values())
