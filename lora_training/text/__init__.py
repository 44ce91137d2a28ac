"""Prompts, their embeddings, and new tokens."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "prompts": ["Prompts"],
        "text_cache": ["fill_text_cache"],
        "words": ["abstraction_tokens", "class_caption", "insert_tokens"],
        "tokens": ["TokenRows", "report_split"],
        "chunks": ["chunk_ids", "join_chunks", "weigh"],
    },
)
