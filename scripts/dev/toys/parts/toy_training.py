"""Trains a toy base's text encoders and denoiser on the autoencoder's latents."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch

from lora_training.files import atomic_write
from scripts.dev.toys.parts import toy_drawings
from scripts.dev.toys.parts.toy_autoencoder import world_latents
from scripts.dev.toys.parts.toy_drawings import draw_with_base
from scripts.dev.toys.parts.toy_families import TOY_FAMILIES
from scripts.dev.toys.parts.toy_loss import compute_loss
from scripts.dev.toys.parts.toy_models import ToyBase, load_base, make_base, make_pipeline, make_scheduler
from scripts.dev.toys.parts.toy_text import SHORT_CLIP_LENGTH, blind_one_encoder, encode, tokenize
from scripts.dev.toys.parts.toy_world import describe

BATCH_SIZE = 64
REDRAWN_AFTER = 500  # steps until the base's drawings are drawn anew
T5_LENGTHS = (16, 16, 32, 77, 128)  # T5 attends to its padding, so the base must know several lengths


def state_file_of(work: Path, name: str, continued: bool, with_drawings: bool) -> Path:
    """Where a training stores its state; each kind has its own."""
    return work / f"{name}_{'continued_' if continued else ''}{'own_' if with_drawings else ''}state.pt"


def train_base(
    name: str,
    vae,
    work: Path,
    steps: int,
    device: str,
    continue_from: Path | None = None,
    with_drawings: bool = False,
) -> ToyBase:
    """Trains a base; goes on from its state in `work` if there is one.

    continue_from: a finished base's folder. Its denoiser alone is trained on: from half the learning rate to
    0, on other pictures. Its text encoders stay as they are, so a step costs less and prompts keep their
    meaning. with_drawings: half of these pictures are the base's drawings.
    """
    torch.manual_seed(0)
    base = load_base(name, continue_from) if continue_from else make_base(name)
    state_file = state_file_of(work, name, bool(continue_from), with_drawings)
    training = BaseTraining(base, vae.to(device), work, steps, device, bool(continue_from), with_drawings)
    first_step = training.load_state(state_file) if state_file.exists() else 0
    began = time.monotonic()
    for step in range(first_step, steps):
        loss = training.step(step)
        if step % 50 == 49:
            pace = (time.monotonic() - began) / (step + 1 - first_step)
            print(f"{name} step {step + 1}/{steps} loss {loss.item():.3f} {pace:.2f} s/step", flush=True)
        if step % 200 == 199 or step + 1 == steps:
            training.save_state(state_file, step + 1)
    return training.finish()


def learning_rate_share(step: int, steps: int, continued: bool) -> float:
    """The share of the learning rate at a step: warm-up, then down to 1%; continued: from a half to 0."""
    warm_up = (step + 1) / 100
    if continued:
        return 0.5 * min(1, warm_up, (steps - step) / (0.4 * steps))
    return min(1, warm_up, max(0.01, (steps - step) / (0.6 * steps)))


class BaseTraining:
    """A base that is trained: its data, optimizer and moving average."""

    def __init__(
        self, base: ToyBase, vae, work: Path, steps: int, device: str, continued: bool, with_drawings: bool
    ) -> None:
        from diffusers.training_utils import EMAModel

        self.base, self.vae, self.steps, self.device = base, vae, steps, device
        self.continued, self.with_drawings, self.drawings = continued, with_drawings, None
        self.family = TOY_FAMILIES[base.name]
        base.denoiser.to(device).train()
        for encoder in base.text_encoders:
            encoder.to(device).train(not continued).requires_grad_(not continued)
        self.modules = [base.denoiser] if continued else [base.denoiser, *base.text_encoders]
        self.parameters = [p for module in self.modules for p in module.parameters()]
        millions = sum(p.numel() for p in self.parameters) / 1e6
        print(f"{base.name}: {millions:.1f} million parameters to train", flush=True)
        self.latents, self.scenes = world_latents(vae, work, seed=4 if continued else 2, device=device)
        self.scheduler = make_scheduler(base.name)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.family.learning_rate, weight_decay=1e-2, betas=(0.9, 0.98)
        )
        self.ema = EMAModel(self.parameters, decay=0.998)

    def load_state(self, file: Path) -> int:
        """Takes over what `save_state` has written; returns the step to go on with."""
        state = torch.load(file, weights_only=True)
        for module, weights in zip(self.modules, state["modules"], strict=True):
            module.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        print(f"continuing at step {state['step']}", flush=True)
        return state["step"]

    def save_state(self, file: Path, step: int) -> None:
        """Writes all that the steps from `step` on depend on, in one move."""
        state = {
            "modules": [module.state_dict() for module in self.modules],
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "step": step,
        }
        with atomic_write(file) as part:
            torch.save(state, part)

    def step(self, step: int) -> torch.Tensor:
        """One step; returns its loss."""
        base, rng = self.base, random.Random(f"{self.base.name} {step}")
        generator = torch.Generator().manual_seed(step)
        if self.with_drawings and (self.drawings is None or step % REDRAWN_AFTER == 0):
            self.redraw(step)
        for group in self.optimizer.param_groups:
            share = learning_rate_share(step, self.steps, self.continued)
            group["lr"] = self.family.learning_rate * share
        rows, captions, dropped, drawn = self.draw_batch(rng)
        ids = self.tokenize(captions, step, rng)
        with torch.set_grad_enabled(not self.continued):
            embeds, pooled = encode(base.name, base.text_encoders, ids)
        latents = self.latents[rows]
        loss = compute_loss(base, self.scheduler, latents, embeds, pooled, dropped, generator, drawn)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.ema.step(self.parameters)
        return loss

    def redraw(self, step: int) -> None:
        """Has the averaged weights draw anew."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        self.drawings = draw_with_base(self.base, make_pipeline(self.base, self.vae), step)
        self.ema.restore(self.parameters)

    def draw_batch(self, rng: random.Random) -> tuple:
        """Draws a batch.

        Returns rows of the latents; captions, of the rows and then of the drawn states; which of the rows'
        captions are dropped, (B,); drawn states, or None.
        """
        count = BATCH_SIZE // 2 if self.with_drawings else BATCH_SIZE
        rows = [rng.randrange(len(self.scenes)) for _ in range(count)]
        dropped = [rng.random() < 0.1 for _ in rows]
        captions = [
            "" if is_dropped else describe(*self.scenes[row], rng)
            for row, is_dropped in zip(rows, dropped, strict=True)
        ]
        drawn = None
        if self.with_drawings:
            drawn_captions, drawn = self.drawings.sample(BATCH_SIZE // 2, rng)
            captions += drawn_captions
        return rows, captions, torch.tensor(dropped, device=self.device), drawn

    def tokenize(self, captions: list[str], step: int, rng: random.Random) -> list[torch.Tensor]:
        """Token ids for each encoder."""
        name = self.base.name
        captions = blind_one_encoder(name, captions, rng)
        t5_length = rng.choice(toy_drawings.T5_LENGTHS if self.continued else T5_LENGTHS)
        ids = [i.to(self.device) for i in tokenize(name, self.base.tokenizers, captions, t5_length)]
        shortened = name == "flux" or (name == "sd3" and step < 0.75 * self.steps)
        if self.continued and shortened:
            clips = len(self.family.clips)
            return [*(i[:, :SHORT_CLIP_LENGTH] for i in ids[:clips]), *ids[clips:]]
        return ids

    def finish(self) -> ToyBase:
        """The base with averaged weights, on the CPU."""
        self.ema.copy_to(self.parameters)
        self.base.text_encoders = [encoder.eval().cpu() for encoder in self.base.text_encoders]
        self.base.denoiser = self.base.denoiser.eval().cpu()
        return self.base
