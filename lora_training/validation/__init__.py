"""Pictures drawn while training, and measures of what was learned and forgotten."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "picture_budget": ["PictureBudget"],
        "prompts": ["control_prompts", "sample_prompts"],
        "sample_images": ["draw_and_log_samples", "draw_control_images", "draw_samples"],
        "class_images": ["generate_class_images", "load_class_examples"],
        "probes": ["Probe"],
    },
)
