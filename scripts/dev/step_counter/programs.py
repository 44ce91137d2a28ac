"""The programs whose step can be counted: the project's training scripts, and diffusers' examples.

Those of other trainers are in `peers`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lora_training.families import FAMILIES
from scripts.dev import ROOT
from scripts.dev.benchmarks.cases import Case, common_argv, example_flags, flags_to_argv
from scripts.dev.benchmarks.example_script import EXAMPLES, torchvision_stand_ins
from scripts.dev.step_counter.empty_bases import load_without_content

DENOISERS = ("UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel")
STEPS = 9  # more than are counted: the program is ended


class Program(NamedTuple):
    """A script as it is run, and what the counter has to know of it."""

    script: Path
    argv: list[str]
    root: Path  # of its sources: the places that are named are in here
    denoisers: tuple[str, ...] = DENOISERS  # names of the class whose call begins a step
    prepare: Callable[[], None] = lambda: None  # in its process, before it starts


def case_argv(case: Case, work: Path, *argv: str, flags: list[str]) -> list[str]:
    """A command line of the project's scripts or of diffusers' examples."""
    rate = ["--learning_rate", "1"] if "optimizer=prodigy" in case.flags else []
    common = common_argv(case, work / "output", work / "base", work / "pictures", STEPS)
    return [*common, *rate, *argv, *flags_to_argv(flags)]


def project_program(case: Case, work: Path) -> Program:
    """The project's training script."""
    quiet = ("--report_to", "none", "--num_validation_images", "0")
    script = ROOT / FAMILIES[case.family].training_script
    argv = case_argv(case, work, *quiet, flags=case.flags)
    return Program(script, argv, ROOT, prepare=prepare_project)


def prepare_project() -> None:
    """Weights have no content here, so that a trial can't see whether an optimizer's step changes them."""
    from lora_training.optim import trial

    load_without_content()
    trial.take_steps = lambda *_: None


def example_program(case: Case, work: Path, folder: Path) -> Program:
    """diffusers' example script that trains the same layers. folder: diffusers' examples."""
    argv = case_argv(case, work, "--report_to", "tensorboard", flags=example_flags(case.flags))
    return Program(folder / EXAMPLES[case.family], argv, folder, prepare=prepare_example)


def prepare_example() -> None:
    """What keeps diffusers' examples from reaching their first step; nothing of it is part of a step."""
    import importlib.util
    import sys

    import diffusers

    load_without_content()
    diffusers.utils.check_min_version = lambda *_: None  # they may be of a later day than the library
    encode = diffusers.AutoencoderKL.encode

    def encode_in_own_dtype(vae, pixels, *rest, **options):
        """SD3's example gives bfloat16 pixels to a float32 VAE, an error on a real GPU too."""
        return encode(vae, pixels.to(vae.dtype), *rest, **options)

    diffusers.AutoencoderKL.encode = encode_in_own_dtype
    if importlib.util.find_spec("torchvision") is None:
        from PIL import Image  # noqa: F401  (before a stand-in for torchvision is there)

        sys.modules.update(torchvision_stand_ins())
