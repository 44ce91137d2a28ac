"""A small CNN that says what a picture of the toy world shows: shape or concept, its colour, the
background's.

The tests use it to prove learning: the share of generated pictures that show what the prompt asked for. It is
made by scripts/dev/toys/train_judge.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from scripts.dev import ROOT
from scripts.dev.toys.parts.toy_world import COLOR_NAMES, CONCEPTS, SHAPES, SIZE

CLASSES = (*SHAPES, *CONCEPTS, "other")
DEFAULT_FOLDER = ROOT / "assets" / "judge"


class Judge(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] -> logits of shape (B, 9), colour (B, 8) and background (B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.BatchNorm2d(48),
            nn.ReLU(),
            nn.Conv2d(48, 64, 3, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        )
        self.shape = nn.Sequential(
            nn.Flatten(), nn.Linear(64 * 64, 64), nn.ReLU(), nn.Linear(64, len(CLASSES))
        )
        self.colors = nn.Sequential(
            nn.Flatten(), nn.Linear(64 * 64, 64), nn.ReLU(), nn.Linear(64, 2 * len(COLOR_NAMES))
        )

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        features = self.body(pictures)
        color, background = self.colors(features).chunk(2, dim=1)
        return self.shape(features), color, background


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """RGB images of any size -> (B, 3, 64, 64) in [-1, 1]."""
    sized = [
        i if i.size == (SIZE, SIZE) else i.resize((SIZE, SIZE), Image.Resampling.LANCZOS) for i in images
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in sized]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def load_judge(folder: Path = DEFAULT_FOLDER) -> Judge:
    """The shipped judge, ready to be asked."""
    judge = Judge()
    judge.load_state_dict(
        {
            k: v.float() if v.is_floating_point() else v
            for k, v in load_file(folder / "judge.safetensors").items()
        }
    )
    return judge.eval()


@torch.no_grad()
def verdicts(judge: Judge, images: list[Image.Image]) -> list[tuple[str, str, str]]:
    """(class, colour, background) of each image."""
    shape, color, background = (logits.argmax(1).tolist() for logits in judge(to_tensor(images)))
    return [
        (CLASSES[s], COLOR_NAMES[c], COLOR_NAMES[b]) for s, c, b in zip(shape, color, background, strict=True)
    ]
