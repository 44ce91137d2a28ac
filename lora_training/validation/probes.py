"""What training has learned and forgotten, measured on fixed pictures and noise."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

import torch

from lora_training.base_model.vae import unscale_latents
from lora_training.console import progress
from lora_training.data.batches import Slot
from lora_training.data.captions import prepend_trigger
from lora_training.data.samples import collate
from lora_training.optim.parts import averaged_weights, restored_afterwards
from lora_training.seeds import stable_seed, validation_seed
from lora_training.tensors import move_to_device
from lora_training.text.words import insert_tokens
from lora_training.validation.drawing import decode_latents, evaluating, sample_latents_of, save_sample

if TYPE_CHECKING:
    import argparse

    from lora_training.data.folders import Example
    from lora_training.training.run import Run

QUANTILES = (0.125, 0.375, 0.625, 0.875)  # of the noise levels, at which losses are measured

NEUTRAL_PROMPTS = ("a photograph of a street in a town", "a portrait of a woman")


class Probe:
    """Measures what training has changed, on pictures, noise levels and noise that stay the same.

    learned: 1 - loss now / loss of the base alone, on training pictures and their captions; the same on
    held-out ones. forgotten: how far the prediction for control prompts has moved from the base's, on latents
    that the base has drawn, relative to how far that for the trained captions has moved (root mean squares).
    """

    def __init__(self, run: Run, first_step: int, draw_noise, predict) -> None:
        """draw_noise, predict: the recipe's functions of these names."""
        self.run, self.draw_noise, self.predict = run, draw_noise, predict
        examples, chosen = run.data.examples, probed_images(run)
        pairs = [(chosen[k % len(chosen)], QUANTILES[(k + k // len(chosen)) % 4]) for k in range(8)]
        held_out = [(i, q) for i, e in enumerate(examples) if e.held_out for q in QUANTILES]
        self.rows = {
            "trained": [self.row(*pair) for pair in pairs],
            "held_out": [self.row(*pair) for pair in held_out],
        }
        with base_alone(run), evaluating(run), torch.no_grad(), progress("probes of the base"):
            self.rows["control"] = self.control_rows(draw_control(run, 0, keep=first_step == 0))
            self.base = {kind: [self.look(*row) for row in rows] for kind, rows in self.rows.items()}

    def row(self, index: int, quantile: float) -> tuple[dict, str]:
        """A batch of one image with fixed noise at a quantile of the noise levels, and its caption."""
        run, example = self.run, self.run.data.examples[index]
        generator = torch.Generator().manual_seed(
            stable_seed(run.args.seed, "held-out", example.name, quantile)
        )
        item = run.data[Slot(index, example.bucket, 0, 0, 1.0)]
        shape = tuple(item["posterior_noise"].shape)
        item |= self.draw_noise(generator, shape, run.scheduler, run.args, quantile=quantile)
        return collate([item]), insert_tokens(
            prepend_trigger(example.captions[0], example.set_args.trigger_word), run.abstractions
        )

    def control_rows(self, drawn: list) -> list[tuple[dict, str]]:
        """A batch of each latent (1, C, H, W) that the base has drawn for a control prompt, each at another
        noise level.
        """
        run, config, out = self.run, self.run.components.config("vae"), []
        size = torch.tensor([run.plan_size[::-1]])
        for k, (quantile, latents) in enumerate(zip(QUANTILES, drawn, strict=True)):
            mean = unscale_latents(latents.float().cpu(), config)
            generator = torch.Generator().manual_seed(validation_seed(run.args.seed, -2, k))
            noise = self.draw_noise(
                generator, tuple(mean.shape[1:]), run.scheduler, run.args, quantile=quantile
            )
            none = torch.zeros_like(mean)
            batch = {"moments": torch.cat([mean, none], dim=1), "posterior_noise": none}
            batch |= {"original_size": size, "target_size": size, "crop_top_left": torch.zeros_like(size)}
            batch |= {name: value[None] for name, value in noise.items()}
            out.append((batch, run.control_prompts[k % len(run.control_prompts)]))
        return out

    def look(self, batch: dict, caption: str) -> tuple[float, object]:
        """(loss, the denoiser's prediction) of a batch."""
        device = self.run.accelerator.device
        loss, prediction = self.predict(
            self.run, move_to_device(batch, device), self.run.prompts.lookup([caption])
        )
        return loss.item(), prediction

    def measure(self) -> dict[str, float]:
        """learned, forgotten and, with held-out images, held_out_loss and learned_held_out."""
        with averaged_weights(self.run.parts), evaluating(self.run), torch.no_grad(), progress("probes"):
            now = {kind: [self.look(*row) for row in rows] for kind, rows in self.rows.items()}
        loss = {
            k: [sum(row[0] for row in rows[k]) / max(1, len(rows[k])) for rows in (now, self.base)]
            for k in now
        }
        moved = {}
        for kind in ("trained", "control"):
            squares = [(a[1] - b[1]).square().mean() for a, b in zip(now[kind], self.base[kind], strict=True)]
            moved[kind] = torch.stack(squares).mean().sqrt().item()
        out = {"learned": 1 - loss["trained"][0] / loss["trained"][1]}
        out["forgotten"] = moved["control"] / moved["trained"] if moved["trained"] else 0.0
        if now["held_out"]:
            out |= {
                "held_out_loss": loss["held_out"][0],
                "learned_held_out": 1 - loss["held_out"][0] / loss["held_out"][1],
            }
        return out


def probed_images(run: Run) -> list[int]:
    """Up to eight training images, drawn by the seed."""
    trained = [i for i, e in enumerate(run.data.examples) if not e.held_out]
    return random.Random(stable_seed(run.args.seed, "probe")).sample(trained, min(8, len(trained)))


def draw_control(run: Run, step: int, keep: bool = True) -> list:
    """Draws a picture of a control prompt for each of the probe's noise levels, and returns the latents.

    keep: save them too, where the run compares before and after.
    """
    drawn, total = [], len(QUANTILES)
    with (
        averaged_weights(run.parts),
        evaluating(run),
        torch.no_grad(),
        progress("control pictures", total) as bar,
    ):
        pipeline = run.components.pipeline(run.denoiser)
        for k in range(len(QUANTILES)):
            prompt, seed = (
                run.control_prompts[k % len(run.control_prompts)],
                validation_seed(run.args.seed, -1, k),
            )
            embeds = {
                name: v.to(run.components.dtype) for name, v in run.prompts.for_pipeline(prompt).items()
            }
            drawn.append(sample_latents_of(pipeline, embeds, [seed], run.plan_size, run.args, run.autocast()))
            bar.update()
            if keep and run.compares and run.accelerator.is_main_process:
                save_sample(
                    run,
                    step,
                    f"control_{k}",
                    prompt,
                    seed,
                    decode_latents(pipeline, run.components, drawn[-1])[0],
                )
    return drawn


def control_prompts(
    args: argparse.Namespace, examples: list[Example], abstractions: dict[str, list[str]]
) -> list[str]:
    """Prompts whose pictures should not change: --control_prompt, else the class prompts, else the captions
    without trigger word and tokens, else two neutral ones.
    """
    classes = [args.class_prompt, *(own.default_caption for own in args.sets if own.is_class)]
    if given := args.control_prompt or [prompt for prompt in classes if prompt]:
        return given
    words, stripped = [*abstractions, *args.triggers], []
    for caption in (e.captions[0] for e in examples if words and not e.held_out):
        for word in words:
            caption = " ".join(caption.replace(word, " ").split()).strip(" ,")
        stripped += [caption] if caption else []
    return list(dict.fromkeys(stripped))[:4] or list(NEUTRAL_PROMPTS)


@contextlib.contextmanager
def base_alone(run: Run):
    """While inside, all that is trained is as it was at the start, when it changes nothing that the base
    draws.
    """
    with restored_afterwards(run.parts):
        for part in run.parts:
            part.assign(part.initial)
        try:
            yield
        finally:
            run.prompts.forget()
