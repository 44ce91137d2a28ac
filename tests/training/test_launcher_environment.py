"""What accelerate's launcher and torchrun leave in the environment, as a training reads it."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from lora_training.errors import UserError
from lora_training.training.machine import read_launcher_environment

pytestmark = pytest.mark.unit


def set_variables(monkeypatch, **variables):
    for name in (
        "WORLD_SIZE",
        "ACCELERATE_USE_CPU",
        "ACCELERATE_MIXED_PRECISION",
        "ACCELERATE_DYNAMO_BACKEND",
    ):
        monkeypatch.setenv(name, "")  # so that what the training sets is undone too
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_what_launchers_say_in_the_environment(monkeypatch):
    args = SimpleNamespace(compile=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    set_variables(monkeypatch, ACCELERATE_DYNAMO_BACKEND="INDUCTOR")
    assert read_launcher_environment(args) == 1 and args.compile
    args.compile = False
    set_variables(monkeypatch, ACCELERATE_DYNAMO_BACKEND="NO", WORLD_SIZE="2")  # as torchrun does
    assert (
        read_launcher_environment(args) == 2
        and not args.compile
        and os.environ["ACCELERATE_USE_CPU"] == "true"
    )
    set_variables(
        monkeypatch, WORLD_SIZE="2", ACCELERATE_MIXED_PRECISION="no"
    )  # as accelerate's launcher does
    with pytest.raises(UserError, match="for GPUs, and there is none here"):
        read_launcher_environment(args)
