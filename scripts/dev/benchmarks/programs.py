"""What the measured programs have in common: what a case tries, a fresh process.

The programs are the project's training script (project_script.py), a plain loop (plain_loop.py), and
diffusers' example script (example_script.py). Each is to train STEPS steps on a base of random weights, and
is ended by the clock.
"""

from __future__ import annotations

import contextlib
import gc
import signal
from unittest.mock import patch

import torch

from lora_training.training import base as run_base
from scripts.dev.benchmarks.random_bases import draw_tensor

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ATTENTIONS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")


def flatten(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    """Gradients by name -> one float32 tensor on the CPU, whose order depends on the names alone."""
    return torch.cat([gradients[name].detach().float().cpu().flatten() for name in sorted(gradients)])


def initialize_lora(module: torch.nn.Module) -> None:
    """Gives a LoRA weights that depend on their names, small beside the base's, and none 0.

    Where one factor is 0, the other has no gradient.
    """
    for name, parameter in module.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            value = draw_tensor(name, parameter.shape, parameter.dtype, parameter.device)
            parameter.data.copy_(value * (0.1 if "lora_B" in name else 1.0))


@contextlib.contextmanager
def trying(flags: list[str], program: str):
    """While inside, what a case tries (TRIALS) is so; a script's changes of diffusers are undone at the end.

    channels_last: a UNet's pictures with their channels last. cudnn_attention: cuDNN's attention alone.
    kept_attention: checkpointing that keeps what attention gave, in the project's program ("ours") alone.
    """
    from diffusers.models.transformers import transformer_flux

    keeps_attention = "kept_attention" in flags and program == "ours"
    if keeps_attention and "gradient_checkpointing" not in flags:
        raise ValueError("kept_attention means nothing without gradient_checkpointing")
    library, plain_memory = torch.utils.checkpoint, run_base.save_activation_memory

    def channels_last(denoiser: torch.nn.Module) -> None:
        plain_memory(denoiser)
        denoiser.to(memory_format=torch.channels_last)

    memory = channels_last if "channels_last" in flags else plain_memory
    checkpoint = keep_attention(library.checkpoint) if keeps_attention else library.checkpoint
    other_kernels = (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_mem_efficient_sdp)
    for enable in other_kernels:
        enable("cudnn_attention" not in flags)
    try:
        with (
            patch.object(run_base, "save_activation_memory", memory),
            patch.object(library, "checkpoint", checkpoint),
            patch.object(transformer_flux, "apply_rotary_emb", transformer_flux.apply_rotary_emb),
        ):
            yield
    finally:
        for enable in other_kernels:
            enable(True)


def keep_attention(checkpoint):
    """torch's checkpoint function, as one that doesn't compute attention a second time."""
    library = torch.utils.checkpoint
    saved_ops = [getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default for kind in ATTENTIONS]

    def keeping(*inputs, context_fn=library.noop_context_fn, **options):
        def contexts():
            selective = library.create_selective_checkpoint_contexts(saved_ops)
            return tuple(nested(*pair) for pair in zip(selective, context_fn(), strict=True))

        return checkpoint(*inputs, context_fn=contexts, **options)

    return keeping


@contextlib.contextmanager
def nested(outer, inner):
    """Two contexts as one."""
    with outer, inner:
        yield


@contextlib.contextmanager
def fresh_process():
    """As if the program were a process of its own: accelerate's state, and afterwards the signal handlers."""
    import accelerate

    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def free_memory() -> None:
    """Gives back what an ended program held; to be called when no frame of it is left, so after its
    exception.
    """
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
