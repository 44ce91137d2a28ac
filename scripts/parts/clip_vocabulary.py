"""Names of lora_training.base_model.clip_tokenizer for commands that have not moved to it yet."""

from lora_training.base_model.clip_tokenizer import clip_tokenizer

__all__ = ["clip_tokenizer"]
