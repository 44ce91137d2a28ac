"""A name of lora_training.exits for commands that have not moved to it yet."""

from lora_training.exits import run_command as netted

__all__ = ["netted"]
