"""Prompts longer than CLIP reads at once, in chunks of 75 tokens."""

from __future__ import annotations

import torch

from lora_training.data.emphasis import prompt_chunks


def chunk_ids(
    tokenizer, prompts: list[str], chunks: int, weighted: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts -> (ids, weights), (B * chunks, 77): up to 75 tokens each between start and end token.

    Prompts are cut as kohya's scripts and the WebUIs cut them; what is beyond the last chunk is left out.
    weighted: brackets and BREAK are read as in the WebUIs. Without any, or where all weigh 1: no weights.
    """
    size, rows, weights = tokenizer.model_max_length - 2, [], []
    for prompt in prompts:
        pieces = prompt_chunks(tokenizer, prompt, size, weighted)
        for chunk in (pieces + [[]] * chunks)[:chunks]:
            ids, missing = [id for id, _ in chunk], size - len(chunk)
            rows.append(
                [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * missing]
            )
            weights.append([1.0, *(weight for _, weight in chunk), *[1.0] * (missing + 1)])
    has_weights = any(weight != 1 for row in weights for weight in row)
    return torch.tensor(rows), torch.tensor(weights) if has_weights else None


def weigh(hidden: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Hidden states (B * chunks, 77, D) times their tokens' weights (B * chunks, 77), each chunk then scaled
    back to its mean, as in AUTOMATIC1111's WebUI; as they are without weights.
    """
    if weights is None:
        return hidden
    states = hidden.float()
    weighted = states * weights.to(hidden.device)[..., None]
    factor = states.mean(dim=(1, 2), keepdim=True) / weighted.mean(dim=(1, 2), keepdim=True)
    return (weighted * factor).to(hidden.dtype)


def join_chunks(hidden: torch.Tensor, chunks: int) -> torch.Tensor:
    """(B * chunks, 77, D) -> (B, 75 * chunks + 2, D): first start token, all tokens, last end token."""
    hidden = hidden.unflatten(0, (-1, chunks))
    return torch.cat([hidden[:, 0, :1], hidden[:, :, 1:-1].flatten(1, 2), hidden[:, -1, -1:]], dim=1)
