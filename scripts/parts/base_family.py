"""Names of lora_training.base_model.family_detection for commands that have not moved to it yet."""

from lora_training.base_model.family_detection import detect_family as detect
from lora_training.base_model.family_detection import read_pickled_tensors as pickled_tensors
from lora_training.base_model.family_detection import require_family as family_of
from lora_training.base_model.family_detection import tensor_types as tensors_of
from lora_training.errors import UserError as BaseError

__all__ = ["BaseError", "detect", "family_of", "pickled_tensors", "tensors_of"]
