"""Going on from a checkpoint: damaged ones are passed over, and settings that have changed are named."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import QUICKEST, SAMPLE, copy_of, metrics, run_here
from safetensors.torch import load_file, save_file
from toy_parts import arguments

from lora_training.errors import UserError
from lora_training.training.checkpoints import find_checkpoint, moved_ends

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
    "lr_scheduler": ("--lr_scheduler", "cosine"),
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


# ---- another length ----------------------------------------------------------------------------------------

PIVOTAL = ("-d", SAMPLE, "--train_text_encoder_ti", "--token_abstraction", "circle")
LONGER = (*PIVOTAL, "--resume_from_checkpoint", "latest", "--max_train_steps", 4)


@pytest.fixture(scope="module")
def pivotal(tmp_path_factory):
    """The folder of a pivotal run of two steps that was killed before its results; the pivot is at step 1."""
    output = tmp_path_factory.mktemp("pivotal") / "x"
    assert run_here(QUICKEST, output, *PIVOTAL, "--max_train_steps", 2, "--checkpointing_steps", 2) == 0
    for file in output.glob("*.safetensors"):
        file.unlink()
    return output


@pytest.mark.parametrize("is_older", [False, True])
def test_a_length_that_moves_the_pivot_is_said_in_flags(pivotal, tmp_path, capsys, is_older):
    """It was told as "last_steps [1], now [2]". Checkpoints of before have that list in their manifest."""
    output = copy_of(pivotal, tmp_path / "x")
    file = output / "checkpoint-2" / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest["settings"]["last_steps"] == {"embeddings": 1}
    if is_older:
        manifest["settings"] |= {"last_steps": [1], "train_text_encoder_ti_frac": 0.5}
        file.write_text(json.dumps(manifest))
    assert run_here(QUICKEST, output, *LONGER) == 2
    assert (
        "(--max_train_steps 4 with --train_text_encoder_ti_frac 0.5 moves the pivot, the new tokens' last"
        " step, from step 1 to step 2; --train_text_encoder_ti_frac 0.25 keeps it): "
    ) in capsys.readouterr().err
    assert run_here(QUICKEST, output, *LONGER, "--train_text_encoder_ti_frac", 0.25) == 0
    assert "changed since" not in capsys.readouterr().out
    assert [row["step"] for row in metrics(output) if "lr_embeddings" in row] == [1]


def test_a_pivot_that_is_moved_on_purpose_is_noted(pivotal, tmp_path, capsys):
    output = copy_of(pivotal, tmp_path / "x")
    assert run_here(QUICKEST, output, *LONGER, "--train_text_encoder_ti_frac", 1, "--resume_anyway") == 0
    line = "--max_train_steps 4 moves the pivot, the new tokens' last step, from step 1 to the end"
    assert f"note: changed since checkpoint-2: {line}" in capsys.readouterr().out
    assert [row["step"] for row in metrics(output) if "lr_embeddings" in row] == [1, 3, 4]


@pytest.mark.parametrize(
    ("flags", "saved", "lines"),
    [
        (
            {"lr_scheduler": "cosine", "max_train_steps": None, "num_train_epochs": 3},
            {"text_encoder": 20, "denoiser": 40},
            [
                "--num_train_epochs 3 with --train_text_encoder_frac 0.5 moves the text encoder's last step"
                " from step 20 to step 30; --train_text_encoder_frac 0.333333 keeps it",
                "--num_train_epochs 3 moves the end of --lr_scheduler cosine from step 40 to step 60",
            ],
        ),
        (
            {"lr_scheduler": "constant"},
            {"text_encoder": 40, "denoiser": 50},
            [
                "--max_train_steps 60 with --train_text_encoder_frac 0.5 moves the text encoder's last step"
                " from step 40 to step 30; --train_text_encoder_frac 0.666667 keeps it",
                "--max_train_steps 60 moves the LoRA's last step from step 50 to the end",
            ],
        ),
        ({"lr_scheduler": "constant"}, {"text_encoder": 30}, []),
    ],
)
def test_ends_of_the_text_encoder_and_of_schedules_that_move(flags, saved, lines):
    values = {"max_train_steps": 60, "train_text_encoder_frac": 0.5, "train_transformer_frac": 1.0} | flags
    parts = [
        SimpleNamespace(name="text_encoder", last_step=30),
        SimpleNamespace(name="denoiser", last_step=60),
    ]
    run = SimpleNamespace(args=SimpleNamespace(**values), parts=parts, max_steps=60)
    settings = {"lr_scheduler": flags["lr_scheduler"]}
    assert list(moved_ends(settings | {"last_steps": saved}, run).values()) == lines


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
