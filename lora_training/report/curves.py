"""The curves of a run's page: what metrics.jsonl has, with what is good and bad to see in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_training.report.plots import Curve, Plot, format_percent, smoothed
from lora_training.report.run_folder import is_number

if TYPE_CHECKING:
    from lora_training.report.run_folder import RunFolder

MOST_OTHER_PLOTS = 12

ABOUT = {
    "loss": "How wrong the model is about the training pictures, at noise drawn anew each step: so it jumps,"
    " and the bold line is the one to read. Good: it falls, then levels off. Bad: it rises or never moves.",
    "held_out_loss": "The same for pictures that were kept out of the training, at fixed noise. Good: it"
    " falls along. Bad: it turns upwards: from there on the pictures are learned by heart.",
    "learned": "Learned: how much better than the base alone the training pictures are predicted; forgotten:"
    " how far control prompts have moved meanwhile. Good: learned climbs, forgotten stays low. Bad: forgotten"
    " goes on where learned has stopped.",
    "grad_norm": "How hard a step pulls at the weights, before clipping. Good: a steady band. Bad: growing"
    " spikes (learning rate too high), or zero (nothing is learned).",
    "lr": "What the schedule and the optimizer gave each trained part. Neither good nor bad: a bend here"
    " explains one elsewhere.",
    "seconds_per_step": "Good: flat. Bad: it climbs or jumps: other work on the machine, a slow disk, memory"
    " that overflows.",
    "memory_gib": "The most that was held on the GPU. Good: flat, with room to the card's size. Bad: it"
    " climbs step by step.",
    "skipped_steps": "Steps left out since their loss or gradient was not finite, counted from the start."
    " Good: none.",
}
NAMES_WITH_PLOT = {"learned_held_out", "forgotten", *ABOUT}


def run_plots(run: RunFolder) -> list[Plot]:
    """All plots of a run that have a value, the ones that are asked for first in front.

    Numbers that a changed script logs come last.
    """
    plots = [*loss_plots(run), *training_plots(run), *machine_plots(run)]
    others = [name for name in run.metrics if name not in NAMES_WITH_PLOT and not name.startswith("lr_")]
    for name in others[:MOST_OTHER_PLOTS]:
        plots.append(Plot(name, "Logged under this name in metrics.jsonl.", [curve(run, name, name, 0, "")]))
    for plot in plots:
        plot.advised_step = run.advised_step
    return [plot for plot in plots if plot.curves]


def curve(run: RunFolder, name: str, label: str, tone: int = 0, style: str = "dotted") -> Curve:
    """A number of metrics.jsonl; each value is a dot unless another style is named."""
    return Curve(label, run.metrics.get(name, []), tone, style)


def noisy_curves(run: RunFolder, name: str) -> list[Curve]:
    """A number that jumps from step to step: thin as it is, and bold smoothed."""
    points = run.metrics.get(name, [])
    return [Curve("each log", points, 0, "thin"), Curve("smoothed", smoothed(points), 0)]


def loss_plots(run: RunFolder) -> list[Plot]:
    """Loss, and what the probes have measured."""
    probes = [
        curve(run, "learned", "learned"),
        curve(run, "learned_held_out", "learned, held-out pictures", 2),
        curve(run, "forgotten", "forgotten", 1),
    ]
    held_out = [curve(run, "held_out_loss", "held-out pictures", 2)]
    return [
        Plot("Loss", ABOUT["loss"], noisy_curves(run, "loss")),
        Plot("Learned and forgotten", ABOUT["learned"], probes, format_percent, from_zero=True),
        Plot("Held-out loss", ABOUT["held_out_loss"], held_out),
    ]


def training_plots(run: RunFolder) -> list[Plot]:
    """Gradient norm and learning rates."""
    clip = run.settings.values.get("max_grad_norm")
    level = (float(clip), "clipped to this") if is_number(clip) and clip > 0 else None
    names = [name for name in run.metrics if name.startswith("lr_")]
    rates = [
        Curve(name.removeprefix("lr_").replace("_", " "), run.metrics[name], tone)
        for tone, name in enumerate(names)
    ]
    norms = noisy_curves(run, "grad_norm")
    return [
        Plot("Gradient norm", ABOUT["grad_norm"], norms, from_zero=True, level=level),
        Plot("Learning rate", ABOUT["lr"], rates, from_zero=True),
    ]


def machine_plots(run: RunFolder) -> list[Plot]:
    """Time, memory, and steps that had no finite gradient."""
    seconds = curve(run, "seconds_per_step", "seconds", 0, "")
    memory = curve(run, "memory_gib", "GiB", 0, "")
    skipped = curve(run, "skipped_steps", "steps", 4, "")
    return [
        Plot("Seconds per step", ABOUT["seconds_per_step"], [seconds], from_zero=True),
        Plot("Memory", ABOUT["memory_gib"], [memory], from_zero=True),
        Plot("Steps left out", ABOUT["skipped_steps"], [skipped], from_zero=True),
    ]
