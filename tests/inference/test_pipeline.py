"""Where pictures are drawn, and in which precision."""

from types import SimpleNamespace

import pytest
import torch

from lora_training.inference import device_and_dtype

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("machine", "half"), [("cpu", False), ("mps", True), ("mps before macOS 14", False), ("xpu", True)]
)
def test_pictures_are_drawn_on_what_is_there(machine, half, monkeypatch):
    kind, mps = machine.split()[0], torch.backends.mps
    monkeypatch.setattr(mps, "is_macos_or_newer", lambda *version: "before" not in machine, raising=False)
    for device in ("cuda", "mps", "xpu"):
        monkeypatch.setattr(getattr(torch, device), "is_available", lambda device=device: device == kind)
    settings = SimpleNamespace(device="auto", offload="none", quantize="none", dtype="auto")
    assert device_and_dtype(settings) == (kind, torch.bfloat16 if half else torch.float32)
