"""Nothing is lost, and nothing is wrong in silence: by class of fault, with examples of each.

What is tested here all four scripts share, line for line, so one of them stands for all.
"""

import contextlib
import errno
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import FAMILIES, SAMPLE, load_script, metrics, prompts_of, quick_flags, run_here
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_training.base_model.components import Components
from lora_training.base_model.sources import prediction_settings
from lora_training.cache import DiskCache
from lora_training.data.batches import BatchPlan
from lora_training.data.buckets import cover_size
from lora_training.data.crops import crop_and_augment, draw_crop
from lora_training.data.examples import load_examples
from lora_training.data.folders import Example, folder_examples
from lora_training.data.image_store import ImageStore, prepare_examples
from lora_training.data.metadata_files import read_metadata
from lora_training.errors import UserError
from lora_training.files import atomic_write
from lora_training.optim.optimizers import prepare_parts
from lora_training.optim.parts import TrainedPart, averaged_weights
from lora_training.report.results import push_to_hub
from lora_training.training.checkpoints import find_checkpoint
from lora_training.training.output_folder import (
    FINISHED,
    clear_output_folder,
    is_finished,
    locked_output,
    recorded_settings,
)
from lora_training.validation.class_images import load_class_examples
from lora_training.validation.probes import Probe
from lora_training.validation.sample_images import draw_samples

pytestmark = pytest.mark.faults

SD15 = FAMILIES["sd15"]


@pytest.fixture(scope="module")
def script():
    return load_script(SD15.script)


@pytest.fixture
def refused(script, tmp_path, capsys):
    """Gives a function that parses flags and returns the one line with which they are refused."""

    def line(*flags, output=tmp_path / "x"):
        try:
            script.parse_args(quick_flags(SD15, output, "-d", SAMPLE, *flags))
        except UserError as error:
            return str(error)
        except SystemExit:
            return capsys.readouterr().err
        pytest.fail(f"{flags} were taken")

    return line


# ---- the output folder -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def holder(folder: Path):
    """A process that holds the lock of a folder, as a run does."""
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX)\n"
        "f.write('process 7 on host since noon'); f.flush(); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder / ".lock")], stdout=subprocess.PIPE)
    assert process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_a_lock_holds_while_its_process_lives(recipe, tmp_path):
    args = recipe.parse_args(quick_flags(SD15, tmp_path, "-d", SAMPLE))
    with holder(tmp_path) as process:
        with pytest.raises(UserError, match="another run writes there .process 7 on host since noon"):
            locked_output(args).__enter__()
        process.kill()
        process.wait()
        with locked_output(args):  # a dead process is taken over from
            assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()
    (tmp_path / ".lock").write_text("process 3 on another machine")  # left by a crash of the machine
    with locked_output(args):
        pass
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_a_lock_is_let_go_of_however_a_run_ends(recipe, tmp_path, error):
    args = recipe.parse_args(quick_flags(SD15, tmp_path, "-d", SAMPLE))
    with pytest.raises(error), locked_output(args):
        raise error
    with locked_output(args):
        pass


LORA, FOUR = "pytorch_lora_weights.safetensors", ("--max_train_steps", 4)
USED = {  # what a folder has, by an earlier run with its flags; the new flags; what comes of it
    "nothing": ((), (), (), False),
    "pictures alone": (("samples/step-000000/00_00_a.png", "metrics.jsonl"), (), (), False),
    "the same run, finished": ((LORA, "finished"), FOUR, FOUR, True),
    "the same run, finished, to be gone on with": (
        (LORA, "finished"),
        FOUR,
        (*FOUR, "--resume_from_checkpoint", "latest"),
        True,
    ),
    "another way to save": ((LORA, "finished"), FOUR, (*FOUR, "--rank", 8), "rank 4, now 8"),
    "a flag that is left out": (
        (LORA, "finished"),
        (*FOUR, "--trigger_word", "a"),
        FOUR,
        "trigger_word a, now None",
    ),
    "a flag that is new": ((LORA, "finished"), FOUR, (*FOUR, "--use_dora"), "use_dora False, now True"),
    "overwritten": ((LORA, "finished"), FOUR, (*FOUR, "--rank", 8, "--overwrite"), False),
    "a file of a stranger": ((LORA,), (), (), "holds another run's results"),
    "embeddings alone": (("x_emb.safetensors", "finished"), FOUR, ("--seed", 9), "seed 3, now 9"),
    "killed": (("checkpoint-2/manifest.json",), FOUR, FOUR, "of a run that has not finished"),
    "killed, to be gone on with": (
        ("checkpoint-2/manifest.json",),
        FOUR,
        (*FOUR, "--resume_from_checkpoint", "latest"),
        False,
    ),
    "made longer": (
        (LORA, "checkpoint-4/manifest.json", "finished"),
        FOUR,
        ("--max_train_steps", 9, "--resume_from_checkpoint", "latest"),
        False,
    ),
    "a stale checkpoint": (
        (LORA, "checkpoint-2/manifest.json", "finished"),
        FOUR,
        ("--rank", 8, "--resume_from_checkpoint", "checkpoint-2"),
        "results of step 4, and checkpoint-2 begins before",
    ),
    "begun anew from one's own": (
        (LORA, "checkpoint-2/manifest.json", "finished"),
        FOUR,
        (*FOUR, "--resume_from_checkpoint", "checkpoint-2"),
        False,
    ),
}


@pytest.mark.parametrize("case", USED)
def test_a_used_folder_is_not_written_over(recipe, tmp_path, case):
    files, earlier, flags, expected = USED[case]
    output = tmp_path / "x"
    for name in files:
        if name != "finished":
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_bytes(b"")
    if earlier:
        before = recorded_settings(recipe.parse_args(quick_flags(SD15, output, "-d", SAMPLE, *earlier)))
        end = FINISHED + "4\n" if "finished" in files else ""
        (output / "config.yaml").write_text("# command: x\n" + yaml.safe_dump(before) + end)
    args = recipe.parse_args(quick_flags(SD15, output, "-d", SAMPLE, *flags))
    if isinstance(expected, bool):
        assert is_finished(args) == expected
    else:
        with pytest.raises(UserError, match=expected):
            is_finished(args)


def test_what_is_a_persons_own_stays_when_a_run_writes_over_another(tmp_path):
    own = (
        "notes.txt",
        "samples/mine.png",
        "checkpoint-best/a",
        "checkpoint-backup-900/a",
        "other.safetensors",
    )
    ours = (
        LORA,
        f"{tmp_path.name}.safetensors",
        "samples/step-000004/a.png",
        "checkpoint-4/a",
        "metrics.jsonl",
    )
    for name in (*own, *ours):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    clear_output_folder(tmp_path)
    assert all((tmp_path / name).exists() for name in own)
    assert not any((tmp_path / name).exists() for name in ours)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("PyTorch_LoRA_weights", "the name of diffusers' file"),
        ("x/y/pytorch_lora_weights/", "the name of diffusers' file"),
        ("n" * 250, "too long"),
        ("é" * 125, "too long"),
        ("字" * 80, "too long"),
    ],
)
def test_names_that_would_end_in_a_fault_are_refused(refused, tmp_path, name, words):
    assert words in refused(output=f"{tmp_path}/{name}")


def test_an_output_folder_among_the_data_is_refused(recipe, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(SAMPLE, data)
    (tmp_path / "link").symlink_to(data)
    inside = [
        (data, ()),
        (data / "runs" / "a", ()),
        (tmp_path / "link" / "b", ()),
        (data / ".." / "data" / "c", ()),
    ]
    prior = ("--with_prior_preservation", "--class_prompt", "a", "--class_data_dir", data / "class")
    for output, more in (*inside, (tmp_path / "x", prior)):
        with pytest.raises(UserError, match="lies in the data folder"):
            recipe.parse_args(quick_flags(SD15, output, "-d", data, *more))
    recipe.parse_args(quick_flags(SD15, tmp_path / "data_x", "-d", data))  # beside it


@pytest.mark.parametrize("flag", ["--output_dir", "--cache_folder", "--class_data_dir", "--logging_dir"])
def test_folders_that_cannot_be_used_are_named(recipe, tmp_path, flag):
    (tmp_path / "file").write_text("")
    prior = ("--with_prior_preservation", "--class_prompt", "a") if "class" in flag else ()
    flags = (*prior, "--report_to", "tensorboard", flag, tmp_path / "file")
    args = recipe.parse_args(quick_flags(SD15, tmp_path / "x", "-d", SAMPLE, *flags))
    with pytest.raises(UserError, match=f"{flag} .*file can't be written to: File exists"):
        locked_output(args).__enter__()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied", "/somewhere/picture.png"),
        OSError(errno.EIO, "Input/output error", "/somewhere/cache"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
)
def test_what_a_disk_refuses_is_one_line(script, tmp_path, monkeypatch, capsys, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(script, "execute", fails)
    assert run_here(SD15, tmp_path / "x", "-d", SAMPLE) == 1
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and f"{error.filename or tmp_path / 'x'}: {error.strerror}" in line
    assert not (tmp_path / "x" / "crash.log").exists()


# ---- going on from a checkpoint --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of four steps that was killed after two, with pictures of its data."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(SAMPLE, folder / "data")
    flags = (
        "-d",
        folder / "data",
        "--use_ema",
        "--ema_decay",
        0.5,
        "--max_train_steps",
        2,
        "--checkpointing_steps",
        2,
    )
    assert run_here(SD15, folder / "x", *flags) == 0
    for file in (folder / "x").glob("*.safetensors"):
        file.unlink()
    return folder


LATEST = ("--use_ema", "--ema_decay", 0.5, "--resume_from_checkpoint", "latest", "--max_train_steps", 4)
CHANGED = {
    "noise_offset": ("--noise_offset", 0.1),
    "adam_beta2": ("--adam_beta2", 0.99),
    "use_ema": (),
    "train_batch_size": ("--train_batch_size", 2),
    "data": (),
    "last_steps": ("--lr_scheduler", "cosine"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_settings_that_have_changed_are_named_and_refused(begun, tmp_path, capsys, name):
    shutil.copytree(begun / "x", tmp_path / "x")
    shutil.copytree(begun / "data", tmp_path / "data")
    if name == "data":
        next((tmp_path / "data").glob("*.png")).with_suffix(".txt").write_text("another caption")
    flags = LATEST if name != "use_ema" else LATEST[3:]
    flags = ("-d", tmp_path / "data", *flags, *CHANGED[name])
    assert run_here(SD15, tmp_path / "x", *flags) == 2
    said = capsys.readouterr().err
    named = "global_batch_size 1, now 2" if name == "train_batch_size" else f"{name} "
    assert named in said and "--resume_anyway" in said
    if name not in ("use_ema", "data"):  # one that needs another state, one that needs none
        return
    assert run_here(SD15, tmp_path / "x", *flags, "--resume_anyway") == 0
    assert "note: changed since checkpoint-2: " in capsys.readouterr().out
    assert [row["step"] for row in metrics(tmp_path / "x")] == [1, 2, 3, 4]


def test_what_changes_nothing_that_is_trained_needs_no_word(begun, tmp_path, capsys):
    for file in ("data", "x"):
        shutil.copytree(begun / file, tmp_path / file)
    free = (
        "--checkpointing_steps",
        1,
        "--gradient_checkpointing",
        "--logging_steps",
        2,
        "--run_name",
        "other",
    )
    assert run_here(SD15, tmp_path / "x", "-d", tmp_path / "data", *LATEST, *free) == 0
    assert "changed" not in capsys.readouterr().out


def test_a_learning_rate_that_has_changed_takes_effect(begun, tmp_path):
    for file in ("data", "x"):
        shutil.copytree(begun / file, tmp_path / file)
    flags = ("-d", tmp_path / "data", *LATEST, "--resume_anyway", "--learning_rate", 3e-3)
    assert run_here(SD15, tmp_path / "x", *flags) == 0
    assert [row["lr_denoiser"] for row in metrics(tmp_path / "x")] == pytest.approx([1e-4, 1e-4, 3e-3, 3e-3])


def cut(text: str) -> str:
    return text[: len(text) // 2]


DAMAGED_MANIFESTS = {
    "cut": cut,
    "a list": lambda text: "[1, 2]",
    "null": lambda text: "null",
    "deep": lambda text: "[" * 100_000,
    "no settings": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "settings"}),
    "no seed": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "seed"}),
    "step is no number": lambda text: json.dumps(json.loads(text) | {"step": "two"}),
    "files is a list": lambda text: json.dumps(json.loads(text) | {"files": ["a"]}),
    "a state that isn't listed": lambda text: json.dumps(json.loads(text) | {"files": {}}),
    "not UTF-8": None,
}


@pytest.mark.parametrize("case", DAMAGED_MANIFESTS)
def test_a_damaged_manifest_is_passed_over(recipe, begun, tmp_path, case):
    shutil.copytree(begun / "x", tmp_path / "x")
    file = tmp_path / "x" / "checkpoint-2" / "manifest.json"
    damage = DAMAGED_MANIFESTS[case]
    file.write_bytes(b"\xff\xfe\xfa{" if damage is None else damage(file.read_text()).encode())
    args = recipe.parse_args(quick_flags(SD15, tmp_path / "x", "-d", SAMPLE, *LATEST))
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        find_checkpoint(args)


def test_a_state_that_would_run_code_is_not_read(begun, tmp_path, capsys):
    """Pickled code, tensors of other shapes, and a list: with a manifest that says that all is well."""
    import hashlib
    import pickle

    class Code:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    state = torch.load(begun / "x" / "checkpoint-2" / "training_state.pt", weights_only=True)
    other = json.loads(json.dumps({"step": 2, "guard": {}, "parts": {}}))
    state["parts"]["denoiser"]["weights"] = torch.zeros(3)
    for number, content in enumerate((pickle.dumps(Code()), state, other, [1])):
        output = tmp_path / str(number)
        shutil.copytree(begun / "x", output)
        file = output / "checkpoint-2" / "training_state.pt"
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        manifest = json.loads((output / "checkpoint-2" / "manifest.json").read_text())
        manifest["files"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
        (output / "checkpoint-2" / "manifest.json").write_text(json.dumps(manifest))
        assert run_here(SD15, output, "-d", begun / "data", *LATEST) == 2
        assert "training_state.pt can't be read" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


# ---- weights before pictures, each in one step -----------------------------------------------------------------------

DRAWN = (
    "-d",
    SAMPLE,
    "--num_validation_images",
    1,
    "--validation_inference_steps",
    1,
    "--max_train_steps",
    2,
)
DRAWN += ("--validation_steps", 2)
ODD_PROMPTS = (
    "a\ncircle",
    "two\r\n\tcircles",
    "a\u2028b",
    "🎉 {name} %s",
    "../../etc/passwd",
    "word " * 3000,
)


def test_odd_prompts_cost_no_lora(tmp_path):
    assert run_here(SD15, tmp_path / "x", *DRAWN, "--validation_prompt", *ODD_PROMPTS) == 0
    assert (tmp_path / "x" / LORA).exists() and (tmp_path / "x" / "comparison.png").exists()
    assert len(list((tmp_path / "x" / "samples" / "step-000002").glob("0*.png"))) == len(ODD_PROMPTS)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), ValueError("a picture"), MemoryError()]
)
def test_the_lora_is_there_whatever_befalls_the_last_pictures(script, tmp_path, monkeypatch, error):
    original = draw_samples

    def fails(run, step):
        if step == run.max_steps:
            raise error
        return original(run, step)

    monkeypatch.setattr(script, "draw_samples", fails)
    assert run_here(SD15, tmp_path / "x", *DRAWN) == 1
    assert load_file(tmp_path / "x" / LORA) and not (tmp_path / "x" / "comparison.png").exists()
    if not isinstance(error, ValueError):
        return
    monkeypatch.setattr(script, "draw_samples", original)
    assert run_here(SD15, tmp_path / "x", *DRAWN, "--resume_from_checkpoint", "latest") == 0  # draws them
    assert (tmp_path / "x" / "comparison.png").exists()
    assert [row["step"] for row in metrics(tmp_path / "x") if "learned" in row] == [2]


@pytest.mark.parametrize("killed", ["before its pictures", "after one picture", "before its row"])
def test_a_run_killed_in_a_validation_gets_its_pictures_and_its_row(recipe, tmp_path, monkeypatch, killed):
    class Killed(BaseException):
        pass

    def dies(*_):
        raise Killed

    flags = (*DRAWN, "--validation_prompt", "a circle", "a square", "--max_train_steps", 3)
    place = {"before its row": (Probe, "measure"), "before its pictures": (recipe, "draw_samples")}
    owner, name = place.get(killed, (recipe, "save_sample"))
    original, calls = getattr(owner, name), []

    def work(*arguments):
        step = arguments[1] if name != "measure" else 2
        calls.append(step)
        return (
            dies()
            if step == 2 and calls.count(2) > (name != "draw_samples") - (name == "measure")
            else original(*arguments)
        )

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, work)
        run_here(SD15, tmp_path / "x", *flags)
    assert run_here(SD15, tmp_path / "x", *flags, "--resume_from_checkpoint", "checkpoint-2") == 0
    assert [row["step"] for row in metrics(tmp_path / "x") if "learned" in row] == [2, 3]
    assert len(list((tmp_path / "x" / "samples" / "step-000002").glob("0*.png"))) == 2


def test_a_file_appears_when_it_is_whole(tmp_path):
    for number, error in enumerate((KeyboardInterrupt, ValueError, OSError)):
        file = tmp_path / f"{number}.png"
        file.write_bytes(b"before")
        with pytest.raises(error), atomic_write(file) as part:
            part.write_bytes(b"half")
            raise error
        assert file.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == number + 1
        with atomic_write(file) as part:
            part.write_bytes(b"after")
        assert file.read_bytes() == b"after"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_never_saved(tmp_path, monkeypatch, capsys, value):
    original, calls = TrainedPart.step, []

    def poisoned(self):
        original(self)
        calls.append(1)
        if len(calls) == 3:
            self.weights.data[7] = value
            self.update_shadow()

    monkeypatch.setattr(TrainedPart, "step", poisoned)
    flags = ("-d", SAMPLE, "--checkpointing_steps", 1 if value > 0 else 2, "--max_train_steps", 3)
    assert run_here(SD15, tmp_path / "x", *flags) == 2
    said = capsys.readouterr().err
    assert "weights are no longer finite" in said and "the last good checkpoint is checkpoint-2" in said
    assert not list((tmp_path / "x").glob("*.safetensors"))
    assert sorted(p.name for p in (tmp_path / "x").glob("*checkpoint*"))[-1] == "checkpoint-2"


# ---- caches and class images -----------------------------------------------------------------------------------------


def flip_a_bit(file: Path, other: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 4
    file.write_bytes(raw)


def with_tensors(change):
    """Writes changed tensors with the metadata that the file had."""
    from safetensors import safe_open

    def damage(file: Path, other: Path) -> None:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata()
        save_file(change(load_file(file)), file, metadata=metadata)

    return damage


DAMAGED_ENTRIES = {
    "another entry's": lambda file, other: shutil.copy(other, file),
    "a flipped bit": flip_a_bit,
    "cut": lambda file, other: file.write_bytes(file.read_bytes()[:-4]),
    "empty": lambda file, other: file.write_bytes(b""),
    "NaN": with_tensors(lambda t: {k: torch.full_like(v, math.nan) for k, v in t.items()}),
    "another shape": with_tensors(lambda t: {k: v.reshape(-1) for k, v in t.items()}),
    "another type": with_tensors(lambda t: {k: v.view(torch.int32) for k, v in t.items()}),
    "another name": with_tensors(lambda t: {f"{k}x": v for k, v in t.items()}),
    "without hash": lambda file, other: save_file(load_file(file), file),
}


@pytest.mark.parametrize("case", DAMAGED_ENTRIES)
def test_a_damaged_cache_entry_counts_as_missing(tmp_path, capsys, case):
    cache = DiskCache(str(tmp_path), "latents")
    tensors = {"moments": torch.arange(12.0).reshape(3, 4), "half": torch.ones(2, dtype=torch.bfloat16)}
    for place in (("a", 1), ("b", 2)):
        cache.store(
            {k: v * place[1] for k, v in tensors.items()} if case == "another entry's" else tensors, *place
        )
    if case == "another type":
        cache.store({"moments": tensors["moments"]}, "a", 1)
    assert torch.equal(cache.load("a", 1)["moments"], tensors["moments"])
    DAMAGED_ENTRIES[case](cache.file(("a", 1)), cache.file(("b", 2)))
    assert cache.load("a", 1) is None and "is damaged and made anew" in capsys.readouterr().out
    assert cache.load("b", 2) is not None
    cache.store(tensors, "a", 1)
    assert cache.load("a", 1) is not None


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    cache = DiskCache(str(tmp_path / "file"), "latents")
    for _ in range(3):
        cache.store({"a": torch.ones(1)}, "a")
        assert cache.load("a") is None
    assert capsys.readouterr().out.count("can't be written to") == 1


def test_class_images_that_are_not_whole_do_not_count(recipe, tmp_path):
    good = next(SAMPLE.glob("*.png")).read_bytes()
    for name, raw in {
        **{"class_00000.png": good, "class_00004.png": good, "mine.png": good, "mine.txt": b"a green circle"},
        **{".class_00001.png": good, "class_00002.png": good[: len(good) // 2], "class_00003.png": b""},
        **{"text.png": b"this is no picture", "class_00005.png": bytes(1000), "notes.md": b"mine"},
    }.items():
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "folder.png").mkdir()
    prior = ("--with_prior_preservation", "--class_prompt", "a  circle", "--class_data_dir", tmp_path)
    args = recipe.parse_args(quick_flags(SD15, "x", "-d", SAMPLE, *prior, "--num_class_images", 9))
    found = {e.name: e.captions for e in load_class_examples(args)}
    one = ["a circle"]
    assert found == {"class_00000.png": one, "class_00004.png": one, "mine.png": ["a green circle"]}


def test_captions_of_class_images_are_trained_on(script, tmp_path, monkeypatch):
    seen, original = [], script.compute_loss
    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), color).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"a {color} square")
    monkeypatch.setattr(script, "compute_loss", lambda b, *a: seen.extend(b["captions"]) or original(b, *a))
    prior = ("--with_prior_preservation", "--class_prompt", "a thing", "--class_data_dir", tmp_path)
    assert run_here(SD15, tmp_path / "x", "-d", SAMPLE, *prior, "--num_class_images", 3) == 0
    assert {c for c in seen if "square" in c} == {"a red square", "a green square", "a blue square"}


# ---- data ------------------------------------------------------------------------------------------------------------

METADATA = {  # content; captions by file, or the words of the error
    "a line separator in a caption": (
        '{"file_name": "0.png", "text": "a\u2028b"}\n'.encode(),
        {"0.png": ["a b"]},
    ),
    "other separators": ('{"file_name": "0.png", "text": "a\x85b\u2029c"}'.encode(), {"0.png": ["a b c"]}),
    "Windows' lines": (
        b'{"file_name": "0.png", "text": "a"}\r\n\r\n{"file_name": "1.png"}',
        {"0.png": ["a"], "1.png": []},
    ),
    "cut UTF-16": ('{"file_name": "0.png", "text": "a"}\n'.encode("utf-16")[:-1], {"0.png": ["a"]}),
    "half a character": (b'{"file_name": "0.png", "text": "\\ud83d"}', {"0.png": ["\\ud83d"]}),
    "a number": (b'{"file_name": 7, "text": "a"}', "line 1: no file_name can be 7"),
    "a list": (b'{"file_name": "0.png"}\n\n{"file_name": ["0.png"]}', "line 3: no file_name can be"),
    "NUL": (b'{"file_name": "a\\u0000b.png"}', "line 1: no file_name can be"),
    "a surrogate": (b'{"file_name": "\\udcff.png"}', "line 1: no file_name can be"),
    "no object": (b'{"file_name": "0.png"}\n"a"\n', "line 2: no file_name"),
    "deep JSON": (b"\n" + b"[" * 100_000, "line 2: not JSON"),
    "a dictionary as caption": (b'{"file_name": "0.png", "text": {"en": "a"}}', "line 1: a caption is text"),
    "a folder": (b'{"file_name": "."}', "there is no such file"),
    "an absolute path": (b'{"file_name": "/etc/passwd"}', "line 1: file_name '/etc/passwd' leads out"),
    "out and in again": (b'{"file_name": "../../x/0.png"}', "leads out"),
}


@pytest.mark.parametrize("case", METADATA)
def test_odd_metadata(pictures, case):
    content, expected = METADATA[case]
    for file in pictures.glob("*.txt"):
        file.unlink()
    (pictures / "metadata.jsonl").write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected.replace("[", r"\[")):
            folder_examples(pictures, None)
    else:
        found = {e.name: e.captions for e in folder_examples(pictures, None)}
        assert {name: found[name] for name in expected} == expected


def test_a_long_field_and_a_wrong_line_of_csv(pictures):
    file = pictures / "metadata.csv"
    file.write_text(f'file_name,text\n0.png,"{"word " * 60_000}"\n1.png,"two\nlines"\n')
    rows = read_metadata(file)
    assert len(rows[0][1]["text"]) == 300_000 and rows[1][1]["text"] == "two\nlines"
    file.write_text('file_name,text\n0.png,"two\nlines"\n,a\n')
    with pytest.raises(UserError, match="line 4: no file_name"):
        read_metadata(file)
    file.write_text("")
    assert read_metadata(file) == []


def test_pictures_that_are_described_twice_are_named(pictures, capsys):
    rows = [("0.png", "a"), ("1.png", "b"), ("0.png", "a"), ("1.png", "c"), ("./2.png", "d"), ("2.png", "e")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    for file in pictures.glob("*.txt"):
        file.unlink()
    found = {e.name: e.captions for e in folder_examples(pictures, None)}
    assert (found["0.png"], found["1.png"], found["2.png"]) == (["a"], ["c"], ["e"])
    assert "metadata.jsonl line 4: 1.png, metadata.jsonl line 6: 2.png" in capsys.readouterr().out


def test_file_names_and_links_of_all_kinds(pictures, tmp_path, capsys):
    """A good picture counts under any name; links to pictures lead anywhere; other links are named."""
    good = (pictures / "0.png").read_bytes()
    names = [b"\xff\xfe.png", b"caf\xe9.PNG", "字 \n.png".encode(), b"-rf.png", b"%s{}.png"]
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(pictures), name))).write_bytes(good)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "z.png").write_bytes(good)
    (pictures / "out.png").symlink_to(elsewhere / "z.png")
    (pictures / "folder").symlink_to(elsewhere)
    (pictures / "gone.png").symlink_to(elsewhere / "nothing.png")
    (pictures / "metadata.jsonl").write_text('{"file_name": "out.png", "text": "through a link"}')
    flags = ("-d", pictures, "--default_caption", "a thing", "--cache_latents")
    assert run_here(SD15, tmp_path / "x", *flags, "--max_train_steps", 1) == 0
    said = capsys.readouterr().out
    assert f"{7 + len(names) + 1} images" in said
    assert "folder, gone.png: a link to a folder, which is not entered, or to nothing" in said
    captions = dict(row[:2] for row in json.loads((tmp_path / "x" / "data.json").read_text())["captions"])
    assert captions["out.png"] == "through a link" and captions["\\udcff\\udcfe.png"] == "a thing"


def test_a_caption_column_without_metadata_is_refused(pictures):
    with pytest.raises(UserError, match="--caption_column prompt has no effect"):
        folder_examples(pictures, "prompt")


@pytest.mark.parametrize("how", ["gone", "replaced by text", "cut"])
def test_a_picture_that_vanishes_while_training_is_named(recipe, pictures, how):
    args = recipe.parse_args(quick_flags(SD15, "x", "-d", pictures))
    store = prepare_examples(load_examples(args), [(64, 64)], args)
    store.covers.clear()  # as if there were more pictures than memory
    file = pictures / "3.png"
    file.unlink() if how == "gone" else file.write_bytes(
        b"text" if "text" in how else file.read_bytes()[:200]
    )
    with pytest.raises(UserError, match=r"3\.png could be read when the run began, and can't now"):
        store.cover(3, 0)


def test_a_loaders_process_that_dies_or_fails_is_one_line(script, tmp_path, monkeypatch, capsys):
    def dies(self, slot):
        os._exit(9)

    def fails(self, index):
        raise UserError("7.png could be read")

    flags = ("-d", SAMPLE, "--dataloader_num_workers", 1)
    for where, name, work, words in (
        (script.TrainingData, "__getitem__", dies, "fewer --dataloader_num_workers"),
        (ImageStore, "is_long", None, "error: 7.png could be read"),
    ):
        with monkeypatch.context() as patch:
            if work is None:
                patch.setattr(script.TrainingData, "__getitem__", fails)
            else:
                patch.setattr(where, name, work)
            assert run_here(SD15, tmp_path / name, *flags) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(lines) == 1 and words in lines[0]
        assert not multiprocessing.active_children()  # for which Python would wait at its end


# ---- sizes -----------------------------------------------------------------------------------------------------------


def store_of(script, size, target=(64, 96)):
    """A store with one soft picture of a size, and the picture."""
    small = np.random.default_rng(0).integers(
        90, 160, (size[1] // 2 + 1, size[0] // 2 + 1, 3), dtype=np.uint8
    )
    image, buffer = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC), io.BytesIO()
    image.save(buffer, "PNG")
    example = Example("a.png", ["a"], buffer.getvalue, size=size)
    return ImageStore([example], [target], "lanczos", 0), image


@pytest.mark.parametrize("size", [(1, 3000), (9000, 2), (3, 20000), (16000, 7)])
def test_of_a_long_picture_only_a_window_is_scaled(recipe, size):
    store, _ = store_of(recipe, size)
    cover, target, rng = cover_size(size, (64, 96)), (64, 96), random.Random(0)
    args = SimpleNamespace(center_crop=False, random_flip=False, random_rotation=None, color_jitter=None)
    for _ in range(5):
        crop = draw_crop(cover, target, rng, args)
        part, inner = store.window(0, 0, crop)
        assert math.prod(part.size) <= 4 * math.prod(target)
        assert crop_and_augment(part, target, inner, rng, args).size == target


@pytest.mark.parametrize("size", [(20, 700), (900, 30), (10, 333)])
def test_the_window_shows_what_the_whole_picture_would(recipe, size):
    store, image = store_of(recipe, size)
    cover, target, rng = cover_size(size, (64, 96)), (64, 96), random.Random(1)
    whole = np.asarray(image.resize(cover, Image.Resampling.LANCZOS), dtype=float)
    args = SimpleNamespace(center_crop=False, random_flip=False, random_rotation=None, color_jitter=None)
    assert store.is_long(0, 0)
    for _ in range(5):
        crop = draw_crop(cover, target, rng, args)
        part, inner = store.window(0, 0, crop)
        seen = np.asarray(crop_and_augment(part, target, inner, rng, args), dtype=float)
        expected = whole[crop.top : crop.top + 96, crop.left : crop.left + 64]
        assert np.abs(seen - expected).max() <= 2  # of 255: rounding


@pytest.mark.parametrize(("count", "repeats"), [(7, 31), (1, 70), (100, 3), (64, 1)])
def test_many_repeats_are_planned_in_rounds(recipe, monkeypatch, count, repeats):
    monkeypatch.setattr(BatchPlan, "round_limit", 64)
    prior = ("--with_prior_preservation", "--class_prompt", "a")
    flags = ("--repeats", repeats, "--train_batch_size", 4, *prior)
    args = recipe.parse_args(quick_flags(SD15, "x", "-d", SAMPLE, *flags))
    examples = [Example(str(i), ["a"], None, bucket=i % 3, size=(64, 64)) for i in range(count)]
    plan = BatchPlan(examples, args, 1, 5)
    assert sum(map(len, plan.epoch(0))) <= 2 * max(64, count)
    slots = [s for n in range(plan.per_epoch) for s in plan.share(n, 0)]
    seen = Counter((s.index, s.repeat) for s in slots if not s.is_class)
    assert len(seen) == count * repeats and set(seen.values()) == {1}
    drawn = Counter((s.index, s.repeat) for s in slots if s.is_class)  # places of their own noise, too
    assert sum(drawn.values()) == count * repeats and set(drawn.values()) == {1}


# ---- flags and configurations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--adam_beta1", "1"), "not from 0 up to, but without, 1"),
        (("--adam_beta2", "1.0"), "without, 1"),
        (("--use_ema", "--ema_decay", "1"), "without, 1"),
        (("--lora_dropout", "1"), "without, 1"),
        (("--learning_rate", "1e38"), "not between 0 and 100"),
        (("--learning_rate", "nan"), "not between 0 and 100"),
        (("--learning_rate", "1e-8", "--lr_scheduler", "polynomial"), "must be higher"),
        (("--adam_weight_decay", "inf"), "is not a number from 0 to"),
        (("--shuffle_tags", "--tag_separator", ""), "--tag_separator is empty"),
        (("--train_text_encoder_ti", "--initializer_concept", " \t"), "--initializer_concept is blank"),
        (("--init_lora_weights", "loftq"), "use one of gaussian"),
        (("--init_lora_weights", "eva"), "use one of gaussian"),
        (("--init_lora_weights", "pissa_niter_x"), "use one of gaussian"),
        (("--init_lora_weights", "pissa", "--use_dora"), "can't be combined"),
        (("--aspect_ratio_buckets", "6²,64"), 'is no "height,width"'),
        (("--rank", "1²"), "invalid count value"),
        (("--rank", "9" * 30), "beyond what any run needs"),
        (("--optimizer", "adafactor", "--adam_beta1", "0.5"), "no effect with --optimizer adafactor"),
        (("--revision", "main"), "no effect with a base on this machine"),
        (("--logging_dir", "other"), "no effect without a tracker"),
        (("--resume_anyway",), "no effect without --resume_from_checkpoint"),
        (("--trigger_word", os.fsdecode(b"\xff")), "has bytes that are no text"),
        (("--run_name", "a\0b"), "has bytes that are no text"),
        (("--train_text_encoder_ti", "--preserve_class", "a TOK"), "has a word of --token_abstraction in it"),
    ],
)
def test_flags_that_cannot_be_meant(refused, flags, words):
    assert words in refused(*flags)


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("sd3", ("--weighting_scheme", "mode", "--mode_scale", "1000"), "between 0 and 1.75"),
        ("flux", ("--weighting_scheme", "mode", "--mode_scale", "2"), "between 0 and 1.75"),
        ("sd3", ("--logit_mean", "nan"), "between -100 and 100"),
        ("flux", ("--logit_mean", "inf"), "between -100 and 100"),
        ("flux", ("--max_sequence_length", "513"), "512 tokens"),
    ],
)
def test_flags_of_a_family_that_cannot_be_meant(name, flags, words, capsys):
    with pytest.raises(SystemExit):
        load_script(FAMILIES[name].script).parse_args(["-m", "x", "-d", str(SAMPLE), *flags])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("name", "skip"), [("sd15", 50), ("sd15", 2), ("sdxl", 50), ("sdxl", 1)])
def test_clip_skip_beyond_the_encoder_is_refused(name, skip, tmp_path, capsys):
    base = FAMILIES[name].base
    layers = json.loads((Path(base) / "text_encoder" / "config.json").read_text())["num_hidden_layers"]
    skip = skip if skip > 10 else layers - (name == "sdxl")
    assert run_here(FAMILIES[name], tmp_path / "x", "-d", SAMPLE, "--clip_skip", skip) == 2
    assert f"--clip_skip {skip}: " in capsys.readouterr().err


@pytest.mark.parametrize(("name", "skip"), [("sd15", None), ("sd15", 1), ("sdxl", 1)])
def test_pictures_skip_the_layers_that_the_pipeline_skips(name, skip, tmp_path):
    """Prompt embeddings with --clip_skip, and the unconditional half, which the pipeline takes from the usual layer."""
    import diffusers

    family = FAMILIES[name]
    script = load_script(family.script)
    base = tmp_path / "base"
    shutil.copytree(family.base, base)
    index = json.loads((base / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": False}
    (base / "model_index.json").write_text(json.dumps(index))
    more = ("--clip_skip", skip) if skip else ()
    args = script.parse_args(quick_flags(family, tmp_path / "x", "-d", SAMPLE, "-m", base, *more))
    prompts = prompts_of(script, args, Components(base, args, torch.float32, torch.device("cpu")))
    ours = prompts.for_pipeline("a red circle")
    pipeline = getattr(diffusers, family.pipeline).from_pretrained(base)
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    can_skip = name == "sdxl"  # SD 1.5's pipeline fails with the pinned transformers
    theirs = pipeline.encode_prompt("a red circle", **options, **({"clip_skip": skip} if can_skip else {}))
    assert torch.allclose(ours["negative_prompt_embeds"], theirs[1], atol=1e-5)
    assert torch.allclose(ours["prompt_embeds"], theirs[0], atol=1e-5) == (can_skip or not skip)


CONFIGS = {
    "rank: [4, 8]": "rank takes one value",
    "run_name: {a: b}": "run_name takes one value",
    "learning_rate: [1e-4]": "learning_rate takes one value",
    "validation_prompt: {a: b}": "validation_prompt takes values in one list",
    "validation_prompt: [[a, b], c]": "validation_prompt takes values in one list",
    "trigger_word: yes": "trigger_word takes text: put true in quotes",
    "use_dora: 1": "use_dora must be true or false",
    "rank: true": "invalid count value: 'True'",
    "a: [1, 2": "not YAML or JSON",
    "run_name: 2001-99-99": "not YAML or JSON",
    "[" * 5000: "not YAML or JSON",
    "seed: 0x": "invalid int value",
    "mixed_precision: no": None,
    "resolution: [64, 64]": None,
    "validation_prompt: a circle": None,
}


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: text[:30])
def test_configurations_with_values_of_another_kind(refused, recipe, tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    flags = ("--config", tmp_path / "c.yaml")
    if CONFIGS[text] is None:
        recipe.parse_args(quick_flags(SD15, "x", "-d", SAMPLE, *flags))
    else:
        assert CONFIGS[text] in refused(*flags)


@pytest.mark.parametrize("raw", [b"\xff\xfe\x00rank", b"rank: 4\x00", "rank: 4".encode("utf-16")])
def test_a_configuration_that_is_no_text(refused, tmp_path, raw):
    (tmp_path / "c.yaml").write_bytes(raw)
    assert refused("--config", tmp_path / "c.yaml").startswith("--config ")


# ---- bases -----------------------------------------------------------------------------------------------------------


def lose_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors.pop(next(k for k in tensors if tensors[k].ndim == 2))
    save_file(tensors, file, metadata={"format": "pt"})


DAMAGED_BASES = {
    "weights cut": (
        "unet",
        "diffusion_pytorch_model.safetensors",
        lambda f: f.write_bytes(f.read_bytes()[:-999]),
    ),
    "weights empty": ("vae", "diffusion_pytorch_model.safetensors", lambda f: f.write_bytes(b"")),
    "weights gone": ("text_encoder", "model.safetensors", Path.unlink),
    "a tensor gone": ("text_encoder", "model.safetensors", lose_a_tensor),
    "a tensor of the denoiser gone": ("unet", "diffusion_pytorch_model.safetensors", lose_a_tensor),
    "configuration cut": ("unet", "config.json", lambda f: f.write_text(cut(f.read_text()))),
    "configuration a list": ("vae", "config.json", lambda f: f.write_text("[]")),
    "a number for a list": ("vae", "config.json", lambda f: f.write_text('{"block_out_channels": 3}')),
    "a text for a number": (
        "vae",
        "config.json",
        lambda f: f.write_text(f.read_text().replace(": 16,", ': "16",')),
    ),
    "no layers": (
        "vae",
        "config.json",
        lambda f: f.write_text(f.read_text().replace('block": 1', 'block": -1')),
    ),
    "configuration gone": ("unet", "config.json", Path.unlink),
    "configuration not UTF-8": ("vae", "config.json", lambda f: f.write_bytes(b"\xff{}")),
    "another width": ("unet", "config.json", lambda f: f.write_text(f.read_text().replace("64", "32"))),
    "scheduler gone": ("scheduler", "scheduler_config.json", Path.unlink),
    "scheduler null": ("scheduler", "scheduler_config.json", lambda f: f.write_text("null")),
    "tokenizer gone": ("tokenizer", "", shutil.rmtree),
    "index cut": ("", "model_index.json", lambda f: f.write_text(cut(f.read_text()))),
    "index names no class": (
        "",
        "model_index.json",
        lambda f: f.write_text(f.read_text().replace("UNet2D", "Other")),
    ),
    "index names no library": (
        "",
        "model_index.json",
        lambda f: f.write_text(f.read_text().replace("diffusers", "d")),
    ),
    "index is too short": ("", "model_index.json", lambda f: f.write_text('{"_class_name": "A", "unet": 3}')),
}


@pytest.mark.parametrize("case", DAMAGED_BASES)
def test_a_damaged_base_is_one_line(tmp_path, capsys, case):
    part, name, damage = DAMAGED_BASES[case]
    shutil.copytree(SD15.base, tmp_path / "base")
    damage(tmp_path / "base" / part / name)
    flags = ("-d", SAMPLE, "-m", tmp_path / "base", "--max_train_steps", 1, "--num_validation_images", 1)
    assert run_here(SD15, tmp_path / "x", *flags, "--validation_inference_steps", 1) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and "--pretrained_model_name_or_path" in lines[0] and "fault" not in lines[0]


MARKS = {  # what a single file holds; what its scheduler is told
    "epsilon": ({}, {}, {}),
    "v_pred": ({"v_pred": torch.tensor([])}, {}, {"prediction_type": "v_prediction"}),
    "both": (
        {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])},
        {},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "SAI's metadata": ({}, {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
    "SAI's metadata, epsilon": ({}, {"modelspec.prediction_type": "epsilon"}, {}),
}


@pytest.mark.parametrize("case", MARKS)
def test_single_files_that_predict_velocity_say_so(tmp_path, case):
    tensors, metadata, expected = MARKS[case]
    save_file({"weight": torch.ones(1), **tensors}, tmp_path / "a.safetensors", metadata=metadata)
    assert prediction_settings(tmp_path / "a.safetensors") == expected


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_schedule_that_ends_without_signal(name, tmp_path, monkeypatch):
    family, seen = FAMILIES[name], {}
    script = load_script(family.script)
    original = script.train
    monkeypatch.setattr(script, "train", lambda run, step: seen.update(run=run) or original(run, step))
    flags = ("-d", SAMPLE, "--rescale_betas_zero_snr", "--prediction_type", "v_prediction", "--snr_gamma", 5)
    shown = ("--num_validation_images", 1, "--validation_inference_steps", 1, "--max_train_steps", 2)
    assert run_here(family, tmp_path / "x", *flags, *shown) == 0
    training, drawing = seen["run"].scheduler, seen["run"].components.get("scheduler")
    assert training.alphas_cumprod[-1] == 0 and drawing.alphas_cumprod[-1] < 1e-6
    assert drawing.config.prediction_type == "v_prediction" and drawing.config.timestep_spacing == "trailing"


# ---- new tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy", "adafactor", "schedulefree"])
def test_new_tokens_keep_the_size_of_their_table(recipe, optimizer):
    """After each step a table's rows are scaled by (std0 / std) ** 0.1, which a LoRA's weights never are."""
    rate = 1 if optimizer == "prodigy" else 1e-3
    args = recipe.parse_args(
        quick_flags(SD15, "x", "-d", SAMPLE, "--optimizer", optimizer, "--learning_rate", rate)
    )
    generator = torch.Generator().manual_seed(0)
    first = {key: torch.randn(2, 64, generator=generator) * 0.02 for key in ("clip_l", "t5")}
    parts = {}
    for name in ("embeddings", "denoiser"):
        parts[name] = TrainedPart(
            name, {k: torch.nn.Parameter(v.clone()) for k, v in first.items()}, rate, 0.0, 200
        )
        prepare_parts([parts[name]], args)
    for number in range(60):
        push = torch.randn(256, generator=generator) + torch.linspace(-1, 1, 256)
        for part in parts.values():
            part.gradients.copy_(push)
            part.step()
        if number == 0:
            rows = {name: part.views(part.weights.detach()) for name, part in parts.items()}
            for key, free in rows["denoiser"].items():
                assert torch.allclose(rows["embeddings"][key], free * (first[key].std() / free.std()) ** 0.1)
    with averaged_weights(list(parts.values())):
        grown = {n: p.views(p.weights.detach())["t5"].std() / first["t5"].std() for n, p in parts.items()}
    assert abs(grown["embeddings"].log()) < 0.6 * abs(grown["denoiser"].log())


@pytest.mark.families("sdxl")
def test_overwrite_begins_anew_where_a_recipe_resumes(family, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("resume_from_checkpoint: latest\n")
    recipe = ("-d", SAMPLE, "--config", tmp_path / "recipe.yaml", "--checkpointing_steps", 1)
    assert run_here(family, tmp_path / "x", *recipe, "--rank", 2) == 0
    assert run_here(family, tmp_path / "x", *recipe, "--rank", 3) == 2
    assert "rank 2, now 3" in (said := capsys.readouterr().err) and "--overwrite, begins anew" in said
    assert run_here(family, tmp_path / "x", *recipe, "--rank", 3, "--overwrite") == 0
    assert "going on from" not in capsys.readouterr().out


# ---- signals, and what is uploaded -----------------------------------------------------------------------------------


@pytest.mark.parametrize("made_of_it", [OSError("can't open file"), RuntimeError("a"), None], ids=str)
@pytest.mark.parametrize("place", ["library_class", "prepare_examples", "add_trained_parts"])
def test_a_signal_is_answered_whatever_a_library_makes_of_it(
    script, tmp_path, monkeypatch, capsys, place, made_of_it
):
    """Some turn every exception into one of their own; some go on as if nothing had been."""
    original = getattr(script, place)

    def interrupted(*arguments):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):  # Python answers between two instructions
                pass
        except BaseException:
            if made_of_it:
                raise made_of_it from None
        return original(*arguments)

    monkeypatch.setattr(script, place, interrupted)
    assert run_here(SD15, tmp_path / "x", "-d", SAMPLE, "--max_train_steps", 9) == 143
    said = capsys.readouterr()
    assert "error" not in said.err and "Traceback" not in said.err + said.out
    if made_of_it is None:  # it stops at its first step
        assert [p.name for p in (tmp_path / "x").glob("checkpoint-*")] == ["checkpoint-1"]


def test_only_what_others_need_is_uploaded(recipe, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    given = {}
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *a, **k: SimpleNamespace(repo_id="me/x"))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: given.update(options))
    args = recipe.parse_args(quick_flags(SD15, tmp_path / "x", "-d", SAMPLE, "--push_to_hub"))
    push_to_hub(args)
    public = (
        LORA,
        "x.safetensors",
        "x_emb.safetensors",
        "README.md",
        "comparison.png",
        "samples/step-000002/00_00_a.png",
    )
    private = (
        "wandb/run/files/config.yaml",
        "config.yaml",
        "crash.log",
        "data.json",
        "metrics.jsonl",
        ".lock",
        "report.html",
    )
    private += (
        "cache/latents/a.safetensors",
        "checkpoint-2/x.safetensors",
        "merged/unet/a.safetensors",
        "logs/events",
    )
    private += ("class_images/class_00000.png", "training_pictures/00.png", "checkpoint-2/training_state.pt")
    rules = {name: given[name] for name in ("allow_patterns", "ignore_patterns")}
    assert set(filter_repo_objects([*public, *private], **rules)) == set(public)
    assert given["folder_path"] == str(tmp_path / "x")


# ---- flags and files of which attack.py found that they ended otherwise ----------------------------------------------


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ("[]", "no set in it"),
        ('[{"train_data_dir": "DATA", "resolutions": 5}]', "--resolution 5 is not divisible"),
        ('[{"train_data_dir": "DATA", "resolutions": {"a": 1}}]', "resolution takes values in one list"),
        ('[{"train_data_dir": "DATA", "resolutions": [null, [1, 2, 3]]}]', "one number, or width and height"),
        ('[{"train_data_dir": null}]', "no data"),
        ('["a"]', "unknown key 'a'"),
    ],
)
def test_sets_that_cannot_be_meant(recipe, tmp_path, sets, words):
    (tmp_path / "s.yaml").write_text(sets.replace("DATA", str(SAMPLE)))
    with pytest.raises(UserError, match=f"--dataset_config .*{words}"):
        recipe.parse_args(quick_flags(SD15, tmp_path / "x", "--dataset_config", tmp_path / "s.yaml"))


def test_a_class_sets_weight_is_taken(recipe, tmp_path):
    sets = [{"train_data_dir": str(SAMPLE)}, {"train_data_dir": str(SAMPLE), "class_prompt": "a circle"}]
    for number, weight in ((1, "0.5"), (2, "0.5")):
        (tmp_path / "s.yaml").write_text(json.dumps(sets[:number]))
        flags = quick_flags(SD15, "x", "--dataset_config", tmp_path / "s.yaml", "--prior_loss_weight", weight)
        if number == 2:
            assert recipe.parse_args(flags).prior_loss_weight == 0.5
        else:
            with pytest.raises(UserError, match="--prior_loss_weight has no effect without"):
                recipe.parse_args(flags)


@pytest.mark.parametrize(
    "flag", ["--masked_loss", "--validation_prompts_file", "--init_lora", "--trigger_word", "--config"]
)
def test_an_empty_value_is_off(recipe, tmp_path, flag):
    args = recipe.parse_args(quick_flags(SD15, tmp_path / "x", "-d", SAMPLE, f"{flag}="))
    assert vars(args)[flag[2:]] is None and load_examples(args)


@pytest.mark.parametrize(
    "raw", [b"[" * 50_000, b'{"resolution": Infinity, "aspect_ratio_buckets": "64,64"}', b"\xff\xfe", b"[]"]
)
def test_a_damaged_table_of_buckets_is_named(recipe, pictures, tmp_path, raw):
    (pictures / "buckets.json").write_bytes(raw)
    with pytest.raises(UserError, match="buckets.json: has no resolution"):
        recipe.parse_args(["-m", SD15.base, "-o", str(tmp_path / "x"), "-d", str(pictures)])


@pytest.mark.parametrize("name", ["a\nb", "a\u2028b", "a\r\n--x"])
def test_an_error_about_a_name_with_a_line_end_is_one_line_that_names_the_flag(tmp_path, capsys, name):
    assert run_here(SD15, tmp_path / "x", "-d", SAMPLE, "--validation_prompts_file", name) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "--validation_prompts_file a" in said


@pytest.mark.parametrize("argument", ["eps=1e-6", "decay_rate='a'", "clip_threshold=()"])
def test_an_argument_that_only_an_optimizers_step_refuses(tmp_path, capsys, argument):
    flags = ("-d", SAMPLE, "--optimizer", "adafactor", "--optimizer_args", argument)
    assert run_here(SD15, tmp_path / "x", *flags) == 2
    assert "--optimizer_args" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["null", "{", "[1]", '"a"', "[" * 5000])
def test_damaged_metadata_of_a_lora_to_start_from_is_named(begun, tmp_path, capsys, text):
    file = tmp_path / "a.safetensors"
    save_file(load_file(begun / "x" / "checkpoint-2" / LORA), file, metadata={"lora_adapter_metadata": text})
    assert run_here(SD15, tmp_path / "x", "-d", SAMPLE, "--init_lora", file) == 2
    assert f"--init_lora {file}: its metadata is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("", ""), (" ",), ("\t", "x")])
def test_words_that_belong_to_no_flag(tmp_path, capsys, words):
    with pytest.raises(SystemExit) as end:
        load_script(SD15.script).parse_args(
            quick_flags(SD15, tmp_path / "x", "-d", SAMPLE, "--dry_run", *words)
        )
    assert end.value.code == 2 and "unknown flag" in capsys.readouterr().err


def test_a_fault_before_the_arguments_are_known_is_one_line(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "parse_args", lambda argv: 1 / 0)
    assert script.main([]) == 1
    said = capsys.readouterr().err
    assert (
        len(said.splitlines()) == 1
        and "a fault of this script (ZeroDivisionError: division by zero)" in said
        and "crash.log" in said
    )


def test_a_process_that_ends_is_named_by_the_others(script, tmp_path, monkeypatch, capsys):
    messages = (
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error",
        "x/gloo/y: Timed out",
    )
    errors = [RuntimeError(message) for message in messages] + [torch.distributed.DistBackendError("NCCL")]
    for error in errors:

        def fails(*_, error=error):
            raise error

        monkeypatch.setattr(script, "execute", fails)
        assert run_here(SD15, tmp_path / "x", "-d", SAMPLE) == 1
        assert "another process of this run has ended" in capsys.readouterr().err
