"""The command line of the training scripts. Nothing here imports torch or diffusers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "parsing": ["parse_args"],
        "types": [
            "amount",
            "count",
            "count_or_off",
            "mode_scale",
            "natural",
            "share",
            "signed",
            "tokens",
            "yes_or_no",
        ],
        "flags": ["TIMESTEP_SAMPLING"],
        "rules": ["no_effect", "rule"],
    },
)
