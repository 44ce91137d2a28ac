"""--report_to: what a tracker lacks is known before anything is loaded, without asking a server."""

from __future__ import annotations

import importlib.metadata
import os
from types import SimpleNamespace

import pytest
from conftest import SAMPLE

from lora_training.cli.trackers import LOGINS, PACKAGES, usable_trackers
from lora_training.errors import UserError
from lora_training.training.metrics import start_trackers

pytestmark = pytest.mark.unit
KEY = "0123456789" * 4
WITH_LOGIN = [  # tracker, variables, a file in the home folder and its content
    ("wandb", {"WANDB_API_KEY": KEY}, {}),
    ("wandb", {"WANDB_API_KEY": f"local-{KEY}"}, {}),
    ("wandb", {"WANDB_MODE": "offline"}, {}),
    ("wandb", {"WANDB_MODE": "disabled"}, {}),
    ("wandb", {}, {".netrc": f"machine api.wandb.ai\n  login user\n  password {KEY}\n"}),
    ("wandb", {"WANDB_BASE_URL": "https://own.org"}, {"_netrc": f"machine own.org password {KEY}"}),
    ("wandb", {}, {".config/wandb/settings": "[default]\nmode = offline\n"}),
    ("comet_ml", {"COMET_API_KEY": "x"}, {}),
    ("comet_ml", {"COMET_START_ONLINE": "0"}, {}),
    ("comet_ml", {}, {".comet.config": "[comet]\napi_key = x\n"}),
    ("clearml", {"CLEARML_API_ACCESS_KEY": "x"}, {}),
    ("clearml", {"CLEARML_OFFLINE_MODE": "1"}, {}),
    ("clearml", {}, {"clearml.conf": 'api { credentials {"access_key" = "x"} }'}),
    ("swanlab", {"SWANLAB_API_KEY": "x"}, {}),
    ("swanlab", {"SWANLAB_MODE": "local"}, {}),
    ("swanlab", {}, {".swanlab/.netrc": "machine https://api.swanlab.cn login user password x"}),
    ("trackio", {}, {}),
    ("trackio", {"TRACKIO_SPACE_ID": "me/runs", "HF_TOKEN": "x"}, {}),
    ("trackio", {"TRACKIO_SPACE_ID": "me/runs"}, {".cache/huggingface/token": "x"}),
    *((name, {}, {}) for name in ("tensorboard", "mlflow", "aim", "dvclive")),
]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine where nobody is logged in anywhere, with all trackers' packages; gives its home folder."""
    services = ("WANDB_", "HF_", "HUGGING", "COMET_", "CLEARML_", "SWANLAB_", "TRACKIO_", "NETRC")
    for name in [name for name in os.environ if name.startswith(services)]:
        monkeypatch.delenv(name)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1")
    return tmp_path


def test_every_tracker_of_accelerate_is_known():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(PACKAGES) == set(LOGGER_TYPE_TO_CLASS)


@pytest.mark.parametrize("tracker", ["wandb", "comet_ml", "clearml", "swanlab"])
def test_a_tracker_without_a_login_is_one_line_with_the_ways_out(machine, tracker):
    with pytest.raises(UserError) as refusal:
        usable_trackers(f"tensorboard,{tracker}")
    line, login = str(refusal.value), LOGINS[tracker]
    assert line.startswith(f"--report_to {tracker} has no login: `") and "\n" not in line
    for way_out in (login.variables[0], login.mode, "--report_to tensorboard"):
        assert way_out in line


def test_trackio_needs_a_login_for_a_space_alone(machine, monkeypatch):
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/runs")
    with pytest.raises(UserError, match="`hf auth login` for the Space in TRACKIO_SPACE_ID"):
        usable_trackers("trackio")


@pytest.mark.parametrize(("tracker", "variables", "files"), WITH_LOGIN)
def test_a_tracker_with_a_login_or_a_mode_without_one_is_taken(
    machine, monkeypatch, tracker, variables, files
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name, content in files.items():
        (machine / name).parent.mkdir(parents=True, exist_ok=True)
        (machine / name).write_text(content)
    assert usable_trackers(tracker) == tracker


def test_a_key_that_wandb_would_refuse_after_the_base_is_loaded(machine, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "my key")
    with pytest.raises(UserError, match="a WANDB_API_KEY of 6 characters, which is no key of W&B"):
        usable_trackers("wandb")


def test_all_takes_what_can_start_and_says_what_it_leaves_out(machine, monkeypatch, capsys):
    monkeypatch.setenv("COMET_API_KEY", "x")
    taken = usable_trackers("all").split(",")
    assert set(taken) == set(PACKAGES) - {"wandb", "clearml", "swanlab"}
    notes = capsys.readouterr().out.splitlines()
    assert [note.split(",")[0].split()[-1] for note in notes] == ["wandb", "clearml", "swanlab"]


def test_a_folder_named_as_a_tracker_is_no_package(machine, monkeypatch):
    """W&B leaves wandb/ where it ran, which Python would import as a package."""

    def is_missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    (machine / "wandb").mkdir()
    monkeypatch.syspath_prepend(machine)
    monkeypatch.setattr(importlib.metadata, "version", is_missing)
    with pytest.raises(UserError, match="--report_to wandb: not installed; `pip install wandb`"):
        usable_trackers("wandb")
    assert usable_trackers("all") == usable_trackers("none") == "none"


def test_a_training_without_a_login_ends_before_the_output_folder_is_made(recipe, machine, capsys):
    output = machine / "x"
    code = recipe.main(["-m", "base", "-d", str(SAMPLE), "--report_to", "wandb", "-o", str(output)])
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and "--report_to wandb has no login: `wandb login`" in line and not output.exists()


def test_a_tracker_whose_server_refuses_is_one_line_with_the_way_out(tmp_path):
    def refuse(*arguments, **options):
        raise RuntimeError("run initialization has timed out\nplease try again")

    args = SimpleNamespace(
        run_name="r", output_dir=str(tmp_path), report_to="wandb", family=SimpleNamespace(name="sdxl")
    )
    accelerator = SimpleNamespace(log_with=["wandb"], init_trackers=refuse, is_main_process=True)
    run = SimpleNamespace(args=args, accelerator=accelerator)
    with pytest.raises(UserError) as refusal:
        start_trackers(run, 0)
    assert str(refusal.value) == (
        "--report_to wandb can't start: run initialization has timed out please try again;"
        " --report_to tensorboard needs no server"
    )
