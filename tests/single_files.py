"""What tests of single-file checkpoints share: a toy base as one file, and code that must not be run."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import ROOT, Family
from safetensors.torch import save_file

from lora_training.lora.single_file import single_file


class Payload:
    """Opens the file `trace` for writing when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


def checkpoint_of(family: Family, file: Path, text: bool = True) -> Path:
    """The family's toy base as a single file; text: with its text encoders."""
    tensors = single_file(family.name, ROOT / family.base)
    tensors = {k: v for k, v in tensors.items() if text or not k.startswith("text_enc")}
    if file.suffix == ".ckpt":
        torch.save({"state_dict": tensors}, file)
    else:
        save_file(tensors, file)
    return file
