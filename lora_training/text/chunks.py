"""Long prompts in chunks of 75 tokens."""

from __future__ import annotations

import torch


def chunk_ids(tokenizer, prompts: list[str], chunks: int):
    """Prompts -> ids (B * chunks, 77): up to 75 tokens each between start and end, as kohya's scripts and the
    WebUIs cut them.
    """
    size, out = tokenizer.model_max_length - 2, []
    for ids in tokenizer(prompts, add_special_tokens=False, truncation=False).input_ids:
        for piece in (ids[k * size : (k + 1) * size] for k in range(chunks)):
            padding = [tokenizer.pad_token_id] * (size - len(piece))
            out.append([tokenizer.bos_token_id, *piece, tokenizer.eos_token_id, *padding])
    return torch.tensor(out)


def join_chunks(hidden, chunks: int):
    """(B * chunks, 77, D) -> (B, 75 * chunks + 2, D): the first chunk's start, all tokens, the last chunk's
    end.
    """
    hidden = hidden.unflatten(0, (-1, chunks))
    return torch.cat([hidden[:, 0, :1], hidden[:, :, 1:-1].flatten(1, 2), hidden[:, -1, -1:]], dim=1)
