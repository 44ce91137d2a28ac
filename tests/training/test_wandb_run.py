"""A resumed run goes on in W&B's run of before."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lora_training.families import SD15
from lora_training.training import clear_output_folder, start_trackers

pytestmark = pytest.mark.unit


def wandb_options(output, report_to="wandb") -> dict:
    """What W&B is started with."""
    started = {}
    accelerator = SimpleNamespace(
        log_with=["x"],
        is_main_process=True,
        init_trackers=lambda name, config, init_kwargs: started.update(init_kwargs),
    )
    args = SimpleNamespace(output_dir=str(output), report_to=report_to, run_name=None, family=SD15)
    start_trackers(SimpleNamespace(args=args, accelerator=accelerator), 0)
    return started["wandb"]


def test_a_resumed_run_has_the_same_name_at_wandb_and_a_new_one_another(tmp_path):
    first = wandb_options(tmp_path)
    assert first["resume"] == "allow" and len(first["id"]) == 8
    assert wandb_options(tmp_path, "tensorboard,wandb")["id"] == first["id"]
    clear_output_folder(tmp_path)
    assert wandb_options(tmp_path)["id"] != first["id"]
    assert "id" not in wandb_options(tmp_path, "tensorboard")
