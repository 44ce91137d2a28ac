"""A base: where it comes from, its parts, how they are read, quantised and split."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "components": ["Components"],
        "family_detection": ["detect_family", "require_family"],
        "unpacking": ["unpack_checkpoint"],
        "vae": ["encode_pixels", "pack_latents", "unpack_latents"],
    },
)
