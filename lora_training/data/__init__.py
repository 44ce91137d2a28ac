"""Images and captions: read, checked, sorted into buckets and batches, turned into tensors."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "examples": ["hold_out_sets", "load_sets"],
        "image_store": ["prepare_examples"],
        "buckets": ["print_buckets"],
        "checks": ["report_findings"],
        "captions": ["prepend_trigger", "split_tags"],
        "samples": ["TrainingData"],
        "batches": ["BatchPlan"],
        "latents": ["cache_latents"],
        "loader": ["batches_ahead"],
    },
)
