"""Trains the judge of the toy world from nothing, in about two minutes on two CPU cores.

python scripts/dev/toys/train_judge.py --write assets/judge
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

# the repository, from which everything is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.dev.toys.parts.toy_judge import CLASSES, Judge
from scripts.dev.toys.parts.toy_world import COLOR_NAMES, CONCEPTS, draw, draw_scribble, random_scene


def examples(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` drawn pictures, uint8 (N, 3, 64, 64), and their labels (N, 3), -100 where there is none."""
    rng = random.Random(seed)
    pictures, labels = [], []
    for _ in range(count):
        shape, color, background = random_scene(rng)
        kind = rng.randrange(10)
        label = [CLASSES.index(shape), COLOR_NAMES.index(color), COLOR_NAMES.index(background)]
        if kind == 0:
            image, label = draw_scribble(rng), [CLASSES.index("other"), -100, -100]
        elif kind < 4:
            concept = rng.choice(CONCEPTS)
            main = {"smiley": "yellow", "mushroom": "red"}[concept]
            background = rng.choice([c for c in COLOR_NAMES if c != main])
            image = draw(concept, main, background, rng)
            label = [CLASSES.index(concept), COLOR_NAMES.index(main), COLOR_NAMES.index(background)]
        else:
            image = draw(shape, color, background, rng)
        pictures.append(np.asarray(image))
        labels.append(label)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.tensor(labels)


def degrade(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise, blur, shifts and contrast, as a generator's pictures have them. (B, 3, 64, 64) in [-1, 1]."""
    count = len(pictures)
    blurred = F.avg_pool2d(pictures, 5, stride=1, padding=2, count_include_pad=False)
    share = torch.rand(count, 1, 1, 1, generator=generator)
    pictures = torch.lerp(pictures, blurred, share)
    pictures = pictures * (0.85 + 0.2 * torch.rand(count, 1, 1, 1, generator=generator))
    noise = torch.randn(pictures.shape, generator=generator) * 0.15
    pictures = pictures + noise * torch.rand(count, 1, 1, 1, generator=generator)
    dx, dy = torch.randint(-4, 5, (2,), generator=generator).tolist()
    return F.pad(pictures, (4, 4, 4, 4), mode="replicate")[:, :, 4 + dy : 68 + dy, 4 + dx : 68 + dx].clamp(
        -1, 1
    )


def train(steps: int = 900, batch: int = 64, seed: int = 0) -> Judge:
    """Trains a judge from nothing and prints its accuracy on pictures that it has not seen."""
    torch.manual_seed(seed)
    pictures, labels = examples(9000, seed)
    judge, generator = Judge(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(0, len(pictures), (batch,), generator=generator)
        logits = judge(degrade(pictures[rows].float() / 127.5 - 1, generator))
        loss = sum(F.cross_entropy(logit, labels[rows, i]) for i, logit in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"judge step {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    judge.eval()
    pictures, labels = examples(1000, seed + 1)
    with torch.no_grad():
        logits = judge(degrade(pictures.float() / 127.5 - 1, generator))
    for i, name in enumerate(("class", "colour", "background")):
        known = labels[:, i] >= 0
        right = (logits[i].argmax(1) == labels[:, i])[known].float().mean().item()
        print(f"{name}: {right:.1%} right on held-out pictures")
    return judge


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the judge of the toy world.")
    parser.add_argument("--write", type=Path, required=True, help="folder for judge.safetensors")
    parser.add_argument("--steps", type=int, default=900)
    args = parser.parse_args()
    judge = train(args.steps)
    args.write.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    save_file(state, args.write / "judge.safetensors", metadata={"classes": ",".join(CLASSES)})


if __name__ == "__main__":
    main()
