"""Draws with what runs have trained, through the plain diffusers pipeline, and asks the judge of the toys."""

from __future__ import annotations

import random
from pathlib import Path

from lora_training.families import FAMILIES

BATCH = 32  # pictures drawn at once


class Studio:
    """Draws with the toy base of one family; scores are shares of pictures that show what they should."""

    base_scores: dict = {}  # of untrained bases, for the whole session

    def __init__(self, family) -> None:
        """family: one of conftest.FAMILIES."""
        import diffusers

        from scripts.dev.toys.parts.toy_judge import load_judge

        self.family, self.judge = family, load_judge()
        self.kind = getattr(diffusers, family.pipeline)

    def pipeline(self, output: Path | None, quick: bool = False):
        """The plain pipeline with the files of a run's output folder, or with the base alone.

        quick: with a solver that needs 8 steps.
        """
        from diffusers import DPMSolverMultistepScheduler

        pipeline = self.kind.from_pretrained(self.family.base)
        pipeline.set_progress_bar_config(disable=True)
        if quick and hasattr(pipeline, "unet"):
            pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        if output is None:
            pipeline.scores_of_base = self.base_scores  # several tests ask for the same ones
            return pipeline
        if (output / "pytorch_lora_weights.safetensors").exists():
            pipeline.load_lora_weights(str(output), weight_name="pytorch_lora_weights.safetensors")
        for file in output.glob("*_emb.safetensors"):
            self.load_embeddings(pipeline, file)
        return pipeline

    def load_embeddings(self, pipeline, file: Path) -> None:
        """Adds the new tokens of a file to the pipeline, as <s0>, <s1>, …"""
        from safetensors.torch import load_file

        for key, table in load_file(file).items():
            names = FAMILIES[self.family.name].text_encoders[key]
            tokenizer, encoder = (getattr(pipeline, name) for name in names)
            tokens = [f"<s{i}>" for i in range(len(table))]
            if hasattr(pipeline, "load_textual_inversion"):
                pipeline.load_textual_inversion(
                    table, token=tokens, tokenizer=tokenizer, text_encoder=encoder
                )
                continue
            tokenizer.add_tokens(tokens)  # SD3's pipeline has no loader for embeddings
            size = max(len(tokenizer), encoder.get_input_embeddings().num_embeddings)
            encoder.resize_token_embeddings(size)
            ids = tokenizer.convert_tokens_to_ids(tokens)
            encoder.get_input_embeddings().weight.data[ids] = table

    def draw(self, pipeline, prompts: list[str], seed: int = 0) -> list:
        """One image per prompt."""
        import torch

        images = []
        for begin in range(0, len(prompts), BATCH):
            batch = prompts[begin : begin + BATCH]
            images += pipeline(
                batch,
                width=64,
                height=64,
                num_inference_steps=self.family.inference_steps,
                guidance_scale=self.family.guidance,
                **dict(self.family.extra),
                generator=[torch.Generator().manual_seed(seed + begin + i) for i in range(len(batch))],
            ).images
        return images

    def score(self, pipeline, prompts: list[str], targets: list[tuple]) -> float:
        """The share of images that show (class, colour, background); None in a target matches anything."""
        from scripts.dev.toys.parts.toy_judge import verdicts

        known, key = getattr(pipeline, "scores_of_base", {}), (self.family.name, *prompts, *targets)
        if key not in known:
            seen = verdicts(self.judge, self.draw(pipeline, prompts))
            pairs = list(zip(seen, targets, strict=True))
            hits = [all(t in (None, s) for s, t in zip(*pair, strict=True)) for pair in pairs]
            known[key] = sum(hits) / len(hits)
        return known[key]

    def concept_score(
        self, pipeline, thing: str, target: tuple, avoid: tuple[str, ...], count: int = 64
    ) -> float:
        """So many images of "a {thing} on a … background"; target: (class, colour)."""
        from scripts.dev.toys.parts.toy_world import COLOR_NAMES

        colors = [color for color in COLOR_NAMES if color not in avoid]
        backgrounds = [colors[i % len(colors)] for i in range(count)]
        prompts = [f"a {thing} on a {background} background" for background in backgrounds]
        return self.score(pipeline, prompts, [(*target, background) for background in backgrounds])

    def world_score(self, pipeline, shape: str | None = None) -> float:
        """64 images of the world's own prompts, of one shape or of any."""
        from scripts.dev.toys.parts.toy_world import describe, random_scene

        rng = random.Random(11)
        scenes = [random_scene(rng) for _ in range(64)]
        scenes = [(shape or s, color, background) for s, color, background in scenes]
        return self.score(pipeline, [describe(*scene) for scene in scenes], scenes)
