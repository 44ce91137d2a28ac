"""New tokens and their embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lora_training.console import print_status
from lora_training.errors import UserError
from lora_training.seeds import stable_seed


class TokenRows:
    """New tokens of one text encoder: their embeddings are the only rows of the table that are trained.

    The rows are a float32 parameter (n, D) of their own. A hook on the embedding layer puts them where their
    ids stand, so the table itself, and with it every other token, can't change.
    """

    def __init__(
        self, tokenizer, text_encoder, tokens: list[str], concept: str | None, seed: int, start=None
    ) -> None:
        """concept, start: what the rows are at first, a text's embeddings or a table (n, D); without both
        they are drawn.
        """
        self.tokens = tokens
        if tokenizer.add_tokens(tokens) != len(tokens):
            raise UserError(f"--train_text_encoder_ti: the base's tokenizer already has one of {tokens}")
        self.first = tokenizer.convert_tokens_to_ids(tokens[0])
        if len(tokenizer) > text_encoder.get_input_embeddings().num_embeddings:
            text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            text_encoder.requires_grad_(False)
        table = text_encoder.get_input_embeddings().weight.detach().float().cpu()[: self.first]
        if start is not None:
            if start.shape != (len(tokens), table.shape[1]):
                raise UserError(
                    f"--init_lora: {tuple(start.shape)} embeddings for {len(tokens)} tokens of {table.shape[1]}"
                )
            rows = start.float()
        elif concept:
            ids = self.concept_ids(tokenizer, concept)
            rows = table[ids].repeat(len(tokens) // len(ids), 1)
        else:
            generator = torch.Generator().manual_seed(stable_seed(seed, "tokens", len(table)) % 2**63)
            rows = torch.randn(len(tokens), table.shape[1], generator=generator) * table.std()
        self.initial = rows.clone()
        self.weight = torch.nn.Parameter(rows.to(text_encoder.device))
        table = text_encoder.get_input_embeddings().weight
        for module in text_encoder.modules():  # T5 has its table in two layers, and calls the other one
            if isinstance(module, torch.nn.Embedding) and module.weight is table:
                module.register_forward_hook(self.replace)

    @staticmethod
    def concept_ids(tokenizer, concept: str) -> list[int]:
        """The token ids of --initializer_concept, without start and end."""
        return tokenizer(concept, add_special_tokens=False).input_ids

    def replace(self, module, inputs, output):
        """Embeddings (B, L, D) with the trained rows in the places of the new tokens."""
        place = inputs[0] - self.first
        inside = (place >= 0) & (place < len(self.tokens))
        rows = F.embedding(place.clamp(0, len(self.tokens) - 1), self.weight).to(output.dtype)
        return torch.where(inside[..., None], rows, output)


def report_split(key: str, tokenizer, concept: str, tokens_each: int) -> None:
    """Says where an encoder's tokenizer splits --initializer_concept into another number of tokens than there
    are new ones.
    """
    width = len(TokenRows.concept_ids(tokenizer, concept))
    if width != tokens_each:  # as many of its pieces are taken as fit
        print_status(
            f"note: {key} splits {concept!r} into {width} tokens, not {tokens_each}: cut or repeated to fit"
        )
