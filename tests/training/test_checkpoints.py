"""Going on from a checkpoint: damaged ones are passed over, and settings that have changed are named."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil

import pytest
import torch
from conftest import QUICKEST, SAMPLE, copy_of, metrics, run_here
from safetensors.torch import load_file, save_file
from toy_parts import arguments

from lora_training.errors import UserError
from lora_training.training.checkpoints import find_checkpoint

pytestmark = pytest.mark.faults

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with a run of four steps that was killed after two (x), and its pictures (data)."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(SAMPLE, folder / "data")
    flags = ("-d", folder / "data", "--use_ema", "--ema_decay", 0.5)
    flags += ("--max_train_steps", 2, "--checkpointing_steps", 2)
    assert run_here(QUICKEST, folder / "x", *flags) == 0
    for file in (folder / "x").glob("*.safetensors"):
        file.unlink()
    return folder


# ---- settings that have changed ----------------------------------------------------------------------------

LATEST = ("--use_ema", "--ema_decay", 0.5, "--resume_from_checkpoint", "latest", "--max_train_steps", 4)
CHANGED = {  # what the settings are called; flags that change them
    "guidance_scale": ("--guidance_scale", 2),
    "adam_beta2": ("--adam_beta2", 0.99),
    "use_ema": (),
    "train_batch_size": ("--train_batch_size", 2),
    "data": (),
    "last_steps": ("--lr_scheduler", "cosine"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_settings_that_have_changed_are_named_and_refused(begun, tmp_path, capsys, name):
    output = copy_of(begun / "x", tmp_path / "x")
    data = copy_of(begun / "data", tmp_path / "data")
    if name == "data":
        next(data.glob("*.png")).with_suffix(".txt").write_text("another caption")
    flags = LATEST if name != "use_ema" else LATEST[3:]
    flags = ("-d", data, *flags, *CHANGED[name])
    assert run_here(QUICKEST, output, *flags) == 2
    error = capsys.readouterr().err
    change = "global_batch_size 1, now 2" if name == "train_batch_size" else f"{name} "
    assert change in error and "--resume_anyway" in error
    if name not in ("use_ema", "data"):  # one that needs another state, one that needs none
        return
    assert run_here(QUICKEST, output, *flags, "--resume_anyway") == 0
    assert "note: changed since checkpoint-2: " in capsys.readouterr().out
    assert [row["step"] for row in metrics(output)] == [1, 2, 3, 4]


def test_what_changes_nothing_that_is_trained_needs_no_word(begun, tmp_path, capsys):
    output = copy_of(begun / "x", tmp_path / "x")
    free = ("--checkpointing_steps", 1, "--gradient_checkpointing", "--logging_steps", 2)
    free += ("--run_name", "other")
    assert run_here(QUICKEST, output, "-d", begun / "data", *LATEST, *free) == 0
    assert "changed" not in capsys.readouterr().out


def test_a_learning_rate_that_has_changed_takes_effect(begun, tmp_path):
    output = copy_of(begun / "x", tmp_path / "x")
    flags = ("-d", begun / "data", *LATEST, "--resume_anyway", "--learning_rate", 3e-3)
    assert run_here(QUICKEST, output, *flags) == 0
    assert [row["lr_denoiser"] for row in metrics(output)] == pytest.approx([1e-4, 1e-4, 3e-3, 3e-3])


# ---- damaged checkpoints -----------------------------------------------------------------------------------


def changed(**values):
    """A manifest's text with some values changed; None takes one out."""

    def change(text: str) -> str:
        manifest = json.loads(text) | values
        return json.dumps({key: value for key, value in manifest.items() if value is not None})

    return change


DAMAGED_MANIFESTS = {
    "cut": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[1, 2]",
    "null": lambda text: "null",
    "deep": lambda text: "[" * 100_000,
    "no settings": changed(settings=None),
    "no seed": changed(seed=None),
    "step is no number": changed(step="two"),
    "files is a list": changed(files=["a"]),
    "a state that isn't listed": changed(files={}),
    "not UTF-8": None,
}


@pytest.mark.parametrize("case", DAMAGED_MANIFESTS)
def test_a_damaged_manifest_is_passed_over(recipe, begun, tmp_path, case):
    output = copy_of(begun / "x", tmp_path / "x")
    file = output / "checkpoint-2" / "manifest.json"
    damage = DAMAGED_MANIFESTS[case]
    file.write_bytes(b"\xff\xfe\xfa{" if damage is None else damage(file.read_text()).encode())
    args = arguments(recipe, "-o", output, *LATEST)
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        find_checkpoint(args)


class RunsCode:
    """What runs a command as soon as it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return (os.system, (self.command,))


def test_a_state_that_would_run_code_is_not_read(begun, tmp_path, capsys):
    """Pickled code, tensors of other shapes, and a list: with a manifest that says that all is well."""
    state = torch.load(begun / "x" / "checkpoint-2" / "training_state.pt", weights_only=True)
    without_parts = {"step": 2, "guard": {}, "parts": {}}
    state["parts"]["denoiser"]["weights"] = torch.zeros(3)
    code = pickle.dumps(RunsCode(f"touch {tmp_path}/ran"))
    for number, content in enumerate((code, state, without_parts, [1])):
        output = copy_of(begun / "x", tmp_path / str(number))
        file = output / "checkpoint-2" / "training_state.pt"
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        manifest = json.loads((output / "checkpoint-2" / "manifest.json").read_text())
        manifest["files"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
        (output / "checkpoint-2" / "manifest.json").write_text(json.dumps(manifest))
        assert run_here(QUICKEST, output, "-d", begun / "data", *LATEST) == 2
        assert "training_state.pt can't be read" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["null", "{", "[1]", '"a"', "[" * 5000])
def test_damaged_metadata_of_a_lora_to_start_from_is_named(begun, tmp_path, capsys, text):
    file = tmp_path / "a.safetensors"
    save_file(load_file(begun / "x" / "checkpoint-2" / LORA), file, metadata={"lora_adapter_metadata": text})
    assert run_here(QUICKEST, tmp_path / "x", "-d", SAMPLE, "--init_lora", file) == 2
    assert f"--init_lora {file}: its metadata is damaged" in capsys.readouterr().err
