"""What differs between the toy bases of the four families, and the sizes that they share."""

from __future__ import annotations

from dataclasses import dataclass

LATENT_CHANNELS = 16


@dataclass(frozen=True)
class ToyFamily:
    """clips: (width, pooled width) of each CLIP encoder; t5: width, or 0 without one."""

    clips: tuple[tuple[int, int], ...]
    t5: int
    steps: int
    learning_rate: float = 2e-3


TOY_FAMILIES = {
    "sd15": ToyFamily(clips=((64, 64),), t5=0, steps=3000),
    "sdxl": ToyFamily(clips=((48, 48), (64, 64)), t5=0, steps=2000),
    "sd3": ToyFamily(clips=((32, 32), (32, 32)), t5=64, steps=4200),
    "flux": ToyFamily(clips=((64, 64),), t5=64, steps=4800),
}
UNETS = ("sd15", "sdxl")  # the others have transformers, trained by rectified flow
