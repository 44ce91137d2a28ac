"""The library of the LoRA training scripts: everything that isn't the story of a training.

Folders are floors, and imports go downwards only: report, prepare, inference; validation; training; cli,
text, lora; data; optim; base_model; memory; and, at the bottom, the modules of this folder. The folders of
modules that need torch load them when something of theirs is first used.
"""

INTERFACE = 1  # what recipes ask for; a new number whenever a signature that they use changes


def require_interface(number: int) -> None:
    """Errors: ImportError if recipes of interface `number` can't use this library."""
    if number != INTERFACE:
        raise ImportError(
            f"the library lora_training has interface {INTERFACE}, and this script needs {number}"
        )
