"""Which pictures a run draws: as flags ask, else as many as take about a tenth of its time.

The training is the same whatever is drawn, and learned and forgotten are measured at every validation.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from lora_training.console import print_status
from lora_training.training.run import on_main_process
from lora_training.validation.sample_images import CONTROL_IMAGES, draw_control_images, draw_samples

if TYPE_CHECKING:
    from lora_training.training.metrics import MetricsLogger
    from lora_training.training.run import Run

SHARE = 0.1  # of the run's time
LEAST = 2  # pictures at the start and at the end
TIMED_LOGS = 5  # of step times, before it is decided how many pictures fit
PROBED_STEPS = 8  # inference steps of latents that are measured on, but not shown
SHORT_RUN_STEPS = 4  # inference steps, at least, in a run of fewer steps than a picture usually has
OTHERS = "--num_validation_images and --validation_steps set others"


class Choice(NamedTuple):
    """Pictures of all validation prompts at a time, how often between start and end, control pictures."""

    pictures: int
    rounds: int
    controls: int


class PictureBudget:
    """Which pictures a run draws.

    draws_start: whether validation prompts are drawn before the first step; per_prompt: of each at a time;
    controls: of the control prompts, at the start and at the end; steps: after which validation prompts are
    drawn; inference_steps: of a picture; probed_steps: of the latents that probes measure on; shows_probed:
    whether these are the control pictures of the start.
    """

    def __init__(self, run: Run, first_step: int) -> None:
        args = run.args
        self.run, self.first_step = run, first_step
        self.is_limited = args.limits_pictures
        self.is_decided = not (self.is_limited and run.draws_comparison)
        self.draws_start = run.draws_comparison and first_step == 0
        self.per_prompt, self.controls = args.num_validation_images, CONTROL_IMAGES
        self.steps = (run.validation_steps if args.validation_prompt else set()) - {run.max_steps}
        self.steps |= {run.max_steps} if run.draws_comparison else set()
        self.inference_steps = self.probed_steps = args.validation_inference_steps
        self.shows_probed = first_step == 0 and not self.is_limited
        self.seconds, self.seconds_per_picture = 0.0, 0.0
        if self.is_limited:
            self.start_with_least()

    def start_with_least(self) -> None:
        """The fewest pictures, or those that the start of a resumed run has; until it is known what fits."""
        args, steps = self.run.args, self.inference_steps
        if steps == args.defaults["validation_inference_steps"]:  # not asked for
            self.inference_steps = min(steps, max(SHORT_RUN_STEPS, self.run.max_steps))
        self.probed_steps = min(PROBED_STEPS, self.inference_steps)
        self.per_prompt, self.controls = math.ceil(LEAST / max(1, len(self.run.sample_prompts))), 0
        if self.first_step:
            self.continue_from_start(Path(args.output_dir, "samples", "step-000000"))
        if not self.is_decided and self.run.max_steps - self.first_step <= TIMED_LOGS * args.logging_steps:
            self.is_decided = True
            print_status(f"pictures: {self.describe(Choice(self.at_a_time, 0, self.controls))}; {OTHERS}")

    def continue_from_start(self, folder: Path) -> None:
        """Takes as many pictures as the start has; it is drawn again if they were drawn otherwise, in a run
        that was to be a short one.
        """
        prompts = range(len(self.run.sample_prompts))
        files = [sorted(folder.glob(f"{number:02d}_*")) for number in prompts]
        number = min(map(len, files), default=0)  # of whole rows, should one have been interrupted
        is_drawn_so = number and all(self.is_drawn_so(file) for row in files for file in row)
        if is_drawn_so or self.has_frozen_text(self.first_step):
            self.per_prompt = number or self.per_prompt
            self.controls = len(list(folder.glob("control_*")))
        else:
            self.draws_start = self.run.draws_comparison

    def is_drawn_so(self, file: Path) -> bool:
        """Whether a picture is whole, and drawn in as many steps as those of this run."""
        try:
            with Image.open(file) as image:
                return int(image.text.get("inference_steps", self.inference_steps)) == self.inference_steps
        except (OSError, SyntaxError, ValueError, AttributeError):  # damaged, or another's file
            return False

    def has_frozen_text(self, step: int) -> bool:
        """Whether new tokens or text encoders are trained no more, so that their start can't be drawn."""
        return any(part.name != "denoiser" and step >= part.last_step for part in self.run.parts)

    @property
    def at_a_time(self) -> int:
        """How many pictures of validation prompts are drawn at a time."""
        return self.per_prompt * len(self.run.sample_prompts)

    @contextlib.contextmanager
    def timed(self, pictures: int, inference_steps: int) -> Iterator[None]:
        """While inside, so many pictures are drawn; their time counts."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self.seconds += seconds
        self.seconds_per_picture = seconds / pictures / inference_steps * self.inference_steps

    def observe(self, metrics: MetricsLogger, step: int) -> None:
        """After a log: decides what is drawn once enough steps are timed, and draws the rest of the start.

        Every process decides the same.
        """
        from accelerate.utils import broadcast_object_list

        if self.is_decided or step >= self.run.max_steps:
            return
        metrics.write_pending()  # waits for the GPU, so that the times are true
        if len(metrics.step_seconds) < TIMED_LOGS:
            return
        self.is_decided, run = True, self.run
        seconds = statistics.median(metrics.step_seconds[1:]) * (run.max_steps - self.first_step)
        rounds = sorted(due for due in run.validation_steps if step <= due < run.max_steps)
        choice = self.choose(SHARE * seconds, step, len(rounds)) if run.accelerator.is_main_process else None
        choice = broadcast_object_list([choice])[0]
        self.steps |= set(spread(rounds, choice.rounds))
        fits = choice != Choice(self.at_a_time, 0, self.controls)
        within = f" within a tenth of about {seconds / 60:.1f} minutes" if fits else ""
        print_status(f"pictures{within}: {self.describe(choice)}; {OTHERS}")
        on_main_process(run, self.complete_start, choice, uses_denoiser=True)
        metrics.restart_timer()

    def choose(self, seconds: float, step: int, rounds: int) -> Choice:
        """The most that can be drawn, with what has been, in so many seconds; the least if nothing more fits.

        The start is completed only where it can still be drawn as it was: not after a resume or the pivot.
        """
        run, begun = self.run, Choice(self.at_a_time, 0, self.controls)
        affordable = (seconds - self.seconds) / self.seconds_per_picture
        sizes = [(begun.pictures, begun.controls)]
        if not self.first_step and not self.has_frozen_text(step):
            most = run.args.num_validation_images * len(run.sample_prompts)
            sizes = [(size, min(size, CONTROL_IMAGES)) for size in (2, 4, 8) if size <= most]
        choices = [Choice(size, number, few) for size, few in sizes for number in range(rounds + 1)]
        fitting = [choice for choice in choices if cost(choice, begun) <= affordable]
        return max(fitting, key=lambda choice: (cost(choice, begun), choice.rounds), default=begun)

    def complete_start(self, choice: Choice) -> None:
        """Takes the choice; draws what the start lacks of it, with the weights of the start."""
        drawn = self.per_prompt, self.controls
        self.per_prompt, self.controls = choice.pictures // len(self.run.sample_prompts), choice.controls
        if self.per_prompt > drawn[0]:
            draw_samples(self.run, 0, drawn[0])
        if self.controls > drawn[1]:
            draw_control_images(self.run, 0)

    def describe(self, choice: Choice) -> str:
        """What is drawn, in words."""
        between = ", ".join(map(str, sorted(self.steps - {self.run.max_steps})))
        after = f", after steps {between}" if between else ""
        controls = f", {choice.controls} of control prompts before and after" if choice.controls else ""
        return f"{choice.pictures} at the start{after} and at the end{controls}"


def cost(choice: Choice, begun: Choice) -> int:
    """How many pictures are still to be drawn for a choice; begun: what the start has."""
    start = choice.pictures - begun.pictures + choice.controls - begun.controls
    return start + choice.pictures * (choice.rounds + 1) + choice.controls


def spread(steps: list[int], count: int) -> list[int]:
    """So many of the steps, evenly spread."""
    return [steps[round((k + 1) * (len(steps) + 1) / (count + 1)) - 1] for k in range(count)]
