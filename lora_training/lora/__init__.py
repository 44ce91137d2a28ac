"""Adapters on a module's layers, and their files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adapters": ["add_denoiser_lora", "add_lora", "lora_parameters", "lora_state", "trained_layers"],
        "block_weights": ["parse_block_weights"],
        "conversion": ["convert_lora_file", "resize_lora_file"],
        "extraction": ["extract_lora_file"],
        "initial": ["read_initial_lora"],
        "inspection": ["describe_lora", "judge_update", "measure_update", "plot_sizes"],
        "joining": ["join_lora_files"],
        "merging": ["merge_loras"],
        "reading": ["read_lora"],
        "writing": ["write_diffusers_lora", "write_lora"],
    },
)
