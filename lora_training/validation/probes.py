"""What training has learned and forgotten, measured on pictures and noise that stay the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from lora_training.base_model.vae import unscale_latents
from lora_training.console import progress
from lora_training.data.batches import Slot
from lora_training.data.captions import prepend_trigger
from lora_training.data.samples import collate
from lora_training.optim.parts import averaged_weights
from lora_training.seeds import stable_seed, validation_seed
from lora_training.tensors import move_to_device
from lora_training.text.words import insert_tokens
from lora_training.validation.drawing import evaluation_mode, initial_weights
from lora_training.validation.sample_images import draw_control_images

if TYPE_CHECKING:
    from lora_training.training.run import Run

QUANTILES = (0.125, 0.375, 0.625, 0.875)  # of the noise levels, at which losses are measured
PROBED_IMAGES = 8  # training images, at most


class ProbeBatch(NamedTuple):
    """A batch of one picture with fixed noise, and its caption."""

    batch: dict
    caption: str


class Measurement(NamedTuple):
    """What the denoiser makes of a ProbeBatch: its loss, and its prediction (1, C, H, W) or as tokens."""

    loss: float
    prediction: torch.Tensor


class Probe:
    """Measures what training has changed, on pictures, noise levels and noise that stay the same.

    learned: 1 - loss now / loss of the base alone, on training pictures and their captions; the same on
    held-out ones. forgotten: how far the prediction for control prompts has moved from the base's, on latents
    that the base has drawn, relative to how far that for the trained captions has moved (root mean squares).
    """

    def __init__(self, run: Run, draw_noise: Callable, predict: Callable) -> None:
        """draw_noise, predict: the recipe's functions of these names."""
        self.run, self.draw_noise, self.predict = run, draw_noise, predict
        self.batches: dict[str, list[ProbeBatch]] = {
            "trained": self.trained_batches(),
            "held_out": self.held_out_batches(),
        }
        with initial_weights(run), evaluation_mode(run), torch.no_grad(), progress("probes of the base"):
            control_latents = draw_control_images(run, 0, probing=True)
            self.batches["control"] = self.control_batches(control_latents)
            self.base_measurements = self.measure_batches()

    def trained_batches(self) -> list[ProbeBatch]:
        """Training pictures in turn, each at another noise level than at its turn before."""
        images, batches = choose_probed_images(self.run), []
        for number in range(PROBED_IMAGES):
            turn, position = divmod(number, len(images))
            quantile = QUANTILES[(number + turn) % len(QUANTILES)]
            batches.append(self.image_batch(images[position], quantile))
        return batches

    def held_out_batches(self) -> list[ProbeBatch]:
        """A batch of each held-out picture at each noise level."""
        examples = self.run.data.examples
        held_out = [index for index, example in enumerate(examples) if example.held_out]
        return [self.image_batch(index, quantile) for index in held_out for quantile in QUANTILES]

    def image_batch(self, index: int, quantile: float) -> ProbeBatch:
        """Image `index` of the data with fixed noise at a quantile of the noise levels."""
        run, example = self.run, self.run.data.examples[index]
        seed = stable_seed(run.args.seed, "held-out", example.draw_key, quantile)
        item = run.data[Slot(index, example.bucket, epoch=0, repeat=0, weight=1.0)]
        item |= self.fixed_noise(seed, item["posterior_noise"].shape, quantile)
        caption = prepend_trigger(example.captions[0], example.set_args.trigger_word)
        return ProbeBatch(collate([item]), insert_tokens(caption, run.abstractions))

    def control_batches(self, control_latents: list[torch.Tensor]) -> list[ProbeBatch]:
        """A batch of each latent (1, C, H, W) that the base has drawn for a control prompt, each at another
        noise level.
        """
        run, prompts, batches = self.run, self.run.control_prompts, []
        width, height = run.validation_size
        size = torch.tensor([(height, width)])
        for number, (quantile, latents) in enumerate(zip(QUANTILES, control_latents, strict=True)):
            mean = unscale_latents(latents.float().cpu(), run.components.config("vae"))
            zeros = torch.zeros_like(mean)
            batch = {"moments": torch.cat([mean, zeros], dim=1), "posterior_noise": zeros}
            batch |= {"original_size": size, "target_size": size, "crop_top_left": torch.zeros_like(size)}
            seed = validation_seed(run.args.seed, -2, number)
            noise = self.fixed_noise(seed, mean.shape[1:], quantile)
            batch |= {name: value[None] for name, value in noise.items()}
            batches.append(ProbeBatch(batch, prompts[number % len(prompts)]))
        return batches

    def fixed_noise(self, seed: int, shape: torch.Size, quantile: float) -> dict[str, torch.Tensor]:
        """What the loss needs at random for latents of a shape (C, H, W), the same at every call."""
        generator = torch.Generator().manual_seed(seed)
        return self.draw_noise(generator, tuple(shape), self.run.scheduler, self.run.args, quantile=quantile)

    def measure_batches(self) -> dict[str, list[Measurement]]:
        """Measurements of all batches, by kind of picture."""
        return {kind: [self.evaluate(*batch) for batch in batches] for kind, batches in self.batches.items()}

    def evaluate(self, batch: dict, caption: str) -> Measurement:
        """Loss and prediction of a batch, with the weights of this moment."""
        embeds = self.run.prompts.lookup_captions([caption])
        batch = move_to_device(batch, self.run.accelerator.device)
        loss, prediction = self.predict(self.run, batch, embeds)
        return Measurement(loss.item(), prediction)

    def measure(self) -> dict[str, float]:
        """learned, forgotten and, with held-out images, held_out_loss and learned_held_out."""
        with (
            averaged_weights(self.run.parts),
            evaluation_mode(self.run),
            torch.no_grad(),
            progress("probes"),
        ):
            measurements = self.measure_batches()
        base = self.base_measurements
        trained_change = prediction_change(measurements["trained"], base["trained"])
        control_change = prediction_change(measurements["control"], base["control"])
        values = {
            "learned": loss_reduction(measurements["trained"], base["trained"]),
            "forgotten": control_change / trained_change if trained_change else 0.0,
        }
        if measurements["held_out"]:
            values["held_out_loss"] = mean_loss(measurements["held_out"])
            values["learned_held_out"] = loss_reduction(measurements["held_out"], base["held_out"])
        return values


def mean_loss(measurements: list[Measurement]) -> float:
    """The mean of the losses."""
    return sum(measurement.loss for measurement in measurements) / len(measurements)


def loss_reduction(measurements: list[Measurement], base: list[Measurement]) -> float:
    """The share of the base's loss that training has removed."""
    return 1 - mean_loss(measurements) / mean_loss(base)


def prediction_change(measurements: list[Measurement], base: list[Measurement]) -> float:
    """The root mean square of the differences between predictions and the base's."""
    pairs = zip(measurements, base, strict=True)
    squares = [(now.prediction - before.prediction).square().mean() for now, before in pairs]
    return torch.stack(squares).mean().sqrt().item()


def choose_probed_images(run: Run) -> list[int]:
    """The numbers of up to PROBED_IMAGES training images, drawn by the seed."""
    trained = [index for index, example in enumerate(run.data.examples) if not example.held_out]
    rng = random.Random(stable_seed(run.args.seed, "probe"))
    return rng.sample(trained, min(PROBED_IMAGES, len(trained)))
