"""Adapters on a module's layers, and their files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adapters": ["add_denoiser_lora", "add_lora", "lora_parameters", "lora_state"],
        "initial": ["read_initial_lora"],
    },
)
