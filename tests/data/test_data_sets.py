"""Several sets of images in one run, from a file or from kohya's folders."""

from __future__ import annotations

import argparse

import pytest
from conftest import SDXL, run_here
from toy_parts import captioned_folder

from lora_training.data.batches import BatchPlan
from lora_training.data.examples import load_examples
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
    examples = [e for set_args in args.sets for e in load_examples(set_args, [(64, 64)], several=True)]
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
