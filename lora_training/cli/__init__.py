"""Command lines: of the training scripts, and of settings that are pydantic models. None imports torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "parsing": ["parse_args"],
        "types": ["amount", "count", "mode_scale", "natural", "share", "signed", "tokens", "yes_or_no"],
        "flags": ["TIMESTEP_SAMPLING"],
        "rules": ["no_effect", "rule"],
        "settings": ["SettingsParser", "file_values", "validate"],
    },
)
