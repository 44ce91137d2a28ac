"""The output folder: its lock, and earlier results, which are never written over in silence."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import QUICKEST, SAMPLE, run_here
from toy_parts import arguments

from lora_training.errors import UserError
from lora_training.training.output_folder import (
    FINISHED,
    clear_output_folder,
    is_finished,
    locked_output,
    recorded_settings,
)

pytestmark = pytest.mark.faults


# ---- its lock ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock_holder(folder: Path):
    """A process that holds the lock of a folder, as a run does, and has forked another one."""
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom filelock import FileLock\n"
        "folder = Path(sys.argv[1]); lock = FileLock(folder / '.lock'); lock.acquire()\n"
        "(folder / '.lock_owner').write_text('process 7 on host since noon')\n"
        "os.fork() or print('held', flush=True)\n"
        "time.sleep(5)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_a_lock_holds_while_its_process_lives(recipe, tmp_path):
    args = arguments(recipe, "-o", tmp_path)
    with lock_holder(tmp_path) as process:
        with pytest.raises(UserError, match="another run writes there .process 7 on host since noon"):
            locked_output(args).__enter__()
        process.kill()
        process.wait()
        with locked_output(args):  # a dead process is taken over from, though one that it forked lives
            assert f"process {os.getpid()}" in (tmp_path / ".lock_owner").read_text()
    (tmp_path / ".lock").write_text("process 3 on another machine")  # left by a crash of the machine
    with locked_output(args):
        pass
    assert not any(tmp_path.glob(".*lock*"))


def test_a_disk_without_locks_has_a_file_for_one(recipe, tmp_path, monkeypatch):
    """As a network disk without a lock service; a dead process is taken over from there too."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    args = arguments(recipe, "-o", tmp_path)
    with (
        locked_output(args),
        pytest.raises(
            UserError,
            match=r"another run writes there .process \d+ on .*; if it has ended, remove .*soft_lock",
        ),
    ):
        locked_output(args).__enter__()
    assert not any(tmp_path.glob(".*lock*"))
    code = (
        "import os, sys; from filelock import SoftFileLock\n"
        "lock = SoftFileLock(sys.argv[1]); lock.acquire(); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / ".soft_lock")])
    assert (tmp_path / ".soft_lock").exists()
    with locked_output(args):
        pass


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_a_lock_is_let_go_of_however_a_run_ends(recipe, tmp_path, error):
    args = arguments(recipe, "-o", tmp_path)
    with pytest.raises(error), locked_output(args):
        raise error
    with locked_output(args):
        pass


@pytest.mark.parametrize("flag", ["--output_dir", "--cache_folder", "--class_data_dir", "--logging_dir"])
def test_folders_that_cannot_be_used_are_named(recipe, tmp_path, flag):
    (tmp_path / "file").write_text("")
    prior = ("--with_prior_preservation", "--class_prompt", "a") if "class" in flag else ()
    flags = ("-o", tmp_path / "x", *prior, "--report_to", "tensorboard", flag, tmp_path / "file")
    with pytest.raises(UserError, match=f"{flag} .*file can't be written to: File exists"):
        locked_output(arguments(recipe, *flags)).__enter__()


# ---- earlier results ---------------------------------------------------------------------------------------

LORA, FOUR = "pytorch_lora_weights.safetensors", ("--max_train_steps", 4)
LATEST = ("--resume_from_checkpoint", "latest")
STEP_2, STEP_4 = "checkpoint-2/manifest.json", "checkpoint-4/manifest.json"
USED = {  # what an earlier run with its flags has left; the flags now; whether it is finished, or the error
    "nothing": ((), (), (), False),
    "pictures alone": (("samples/step-000000/00_00_a.png", "metrics.jsonl"), (), (), False),
    "the same run, finished": ((LORA, "finished"), FOUR, FOUR, True),
    "the same run, finished, to be gone on with": ((LORA, "finished"), FOUR, (*FOUR, *LATEST), True),
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
    "embeddings alone": (("x_emb.safetensors", "finished"), FOUR, ("--seed", 9), "seed 5, now 9"),
    "killed": ((STEP_2,), FOUR, FOUR, "of a run that has not finished"),
    "killed, to be gone on with": ((STEP_2,), FOUR, (*FOUR, *LATEST), False),
    "made longer": ((LORA, STEP_4, "finished"), FOUR, ("--max_train_steps", 9, *LATEST), False),
    "a stale checkpoint": (
        (LORA, STEP_2, "finished"),
        FOUR,
        ("--rank", 8, "--resume_from_checkpoint", "checkpoint-2"),
        "results of step 4, and checkpoint-2 begins before",
    ),
    "begun anew from one's own": (
        (LORA, STEP_2, "finished"),
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
        settings = recorded_settings(arguments(recipe, "-o", output, *earlier))
        end = FINISHED + "4\n" if "finished" in files else ""
        (output / "config.yaml").write_text("# command: x\n" + yaml.safe_dump(settings) + end)
    args = arguments(recipe, "-o", output, *flags)
    if isinstance(expected, bool):
        assert is_finished(args) == expected
    else:
        with pytest.raises(UserError, match=expected):
            is_finished(args)


def test_what_is_a_persons_own_stays_when_a_run_writes_over_another(tmp_path):
    persons = ("notes.txt", "samples/mine.png", "checkpoint-best/a", "checkpoint-backup-900/a")
    persons += ("other.safetensors",)
    runs = (LORA, f"{tmp_path.name}.safetensors", "samples/step-000004/a.png", "checkpoint-4/a")
    runs += ("metrics.jsonl", f"adapter/{LORA}")
    for name in (*persons, *runs):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    clear_output_folder(tmp_path)
    assert all((tmp_path / name).exists() for name in persons)
    assert not any((tmp_path / name).exists() for name in runs)


def test_overwrite_begins_anew_where_a_recipe_resumes(tmp_path, capsys):
    (tmp_path / "preset.yaml").write_text("resume_from_checkpoint: latest\n")
    flags = ("-d", SAMPLE, "--config", tmp_path / "preset.yaml", "--checkpointing_steps", 1)
    flags += ("--max_train_steps", 2)
    assert run_here(QUICKEST, tmp_path / "x", *flags, "--rank", 2) == 0
    assert run_here(QUICKEST, tmp_path / "x", *flags, "--rank", 3) == 2
    error = capsys.readouterr().err
    assert "rank 2, now 3" in error and "--overwrite, begins anew" in error
    assert run_here(QUICKEST, tmp_path / "x", *flags, "--rank", 3, "--overwrite") == 0
    assert "going on from" not in capsys.readouterr().out


# ---- names and places --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("PyTorch_LoRA_weights", "the name of diffusers' file"),
        ("x/y/pytorch_lora_weights/", "the name of diffusers' file"),
        ("n" * 250, "too long"),
        ("é" * 125, "too long"),
        ("字" * 80, "too long"),
    ],
)
def test_names_that_would_end_in_a_fault_are_refused(recipe, tmp_path, name, reason):
    with pytest.raises(UserError, match=reason):
        arguments(recipe, "-o", f"{tmp_path}/{name}")


def test_an_output_folder_among_the_data_is_refused(recipe, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(SAMPLE, data)
    (tmp_path / "link").symlink_to(data)
    inside = [data, data / "runs" / "a", tmp_path / "link" / "b", data / ".." / "data" / "c"]
    prior = ("--with_prior_preservation", "--class_prompt", "a", "--class_data_dir", data / "class")
    for output, flags in (*((folder, ()) for folder in inside), (tmp_path / "x", prior)):
        with pytest.raises(UserError, match="lies in the data folder"):
            arguments(recipe, "-o", output, "-d", data, *flags)
    arguments(recipe, "-o", tmp_path / "data_x", "-d", data)  # beside it
