"""Prompts longer than CLIP reads at once, in chunks of 75 tokens."""

from __future__ import annotations

import torch


def chunk_ids(tokenizer, prompts: list[str], chunks: int) -> torch.Tensor:
    """Prompts -> ids (B * chunks, 77): up to 75 tokens each between start and end token.

    Prompts are cut as kohya's scripts and the WebUIs cut them; what is beyond the last chunk is left out.
    """
    size, rows = tokenizer.model_max_length - 2, []
    for ids in tokenizer(prompts, add_special_tokens=False, truncation=False).input_ids:
        for chunk in (ids[k * size : (k + 1) * size] for k in range(chunks)):
            padding = [tokenizer.pad_token_id] * (size - len(chunk))
            rows.append([tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id, *padding])
    return torch.tensor(rows)


def join_chunks(hidden: torch.Tensor, chunks: int) -> torch.Tensor:
    """(B * chunks, 77, D) -> (B, 75 * chunks + 2, D): first start token, all tokens, last end token."""
    hidden = hidden.unflatten(0, (-1, chunks))
    return torch.cat([hidden[:, 0, :1], hidden[:, :, 1:-1].flatten(1, 2), hidden[:, -1, -1:]], dim=1)
