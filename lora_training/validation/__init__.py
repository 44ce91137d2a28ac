"""Pictures drawn while training, and measures of what was learned and forgotten."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "drawing": ["draw_samples", "log_samples"],
        "class_images": ["generate_class_images", "load_class_examples"],
        "probes": ["Probe", "control_prompts", "draw_control"],
    },
)
