"""Training sets: pictures filtered, captioned, resized and sorted into buckets; and what is wrong with them.

scripts/dataset/prepare_dataset.py is the command.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "arguments": ["read_settings"],
        "doctor": ["diagnose"],
        "steps": ["prepare_data_set"],
    },
)
