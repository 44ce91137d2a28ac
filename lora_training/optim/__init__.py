"""What is trained, as flat buffers; optimizers; the guard against values that aren't finite."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "parts": ["TrainedPart"],
        "optimizers": ["prepare_parts"],
        "guard": ["NonFiniteGuard"],
    },
)
