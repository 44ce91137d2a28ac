"""New tokens of a text encoder, and their embeddings, which alone of its table are trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lora_training.console import print_status
from lora_training.errors import UserError
from lora_training.seeds import stable_seed
from lora_training.text.words import concept_ids


class TokenRows:
    """New tokens of one text encoder: their embeddings are the only rows of the table that are trained.

    The rows are a float32 parameter (n, D) of their own. A hook on the embedding layer puts them where their
    ids stand, so the table itself, and with it every other token, can't change.
    """

    def __init__(
        self, tokenizer, text_encoder, tokens: list[str], concept: str | None, seed: int, initial=None
    ) -> None:
        """What the rows are at first: `initial` (n, D), else the embeddings of the text `concept`, else
        random.

        Errors: UserError for tokens that the tokenizer has, or initial rows of another shape.
        """
        self.tokens = tokens
        if tokenizer.add_tokens(tokens) != len(tokens):
            raise UserError(f"--train_text_encoder_ti: the base's tokenizer already has one of {tokens}")
        self.first_id = tokenizer.convert_tokens_to_ids(tokens[0])
        if len(tokenizer) > text_encoder.get_input_embeddings().num_embeddings:
            text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            text_encoder.requires_grad_(False)
        table = text_encoder.get_input_embeddings().weight
        known = table.detach().float().cpu()[: self.first_id]
        rows = self.initial_rows(tokenizer, known, concept, seed, initial)
        self.initial = rows.clone()
        self.weight = torch.nn.Parameter(rows.to(text_encoder.device))
        for module in text_encoder.modules():  # T5 has its table in two layers, and calls the other one
            if isinstance(module, torch.nn.Embedding) and module.weight is table:
                module.register_forward_hook(self.replace)

    def initial_rows(self, tokenizer, table, concept: str | None, seed: int, initial) -> torch.Tensor:
        """The rows (n, D) at the start. table: the embeddings of the tokens that the base has."""
        count, width = len(self.tokens), table.shape[1]
        if initial is not None:
            if initial.shape != (count, width):
                shape = tuple(initial.shape)
                raise UserError(f"--init_lora: {shape} embeddings for {count} tokens of {width}")
            return initial.float()
        if concept:
            ids = concept_ids(tokenizer, concept)
            return table[ids].repeat(count // len(ids), 1)
        generator = torch.Generator().manual_seed(stable_seed(seed, "tokens", len(table)) % 2**63)
        return torch.randn(count, width, generator=generator) * table.std()

    def replace(self, module, inputs, output):
        """Embeddings (B, L, D) with the trained rows in the places of the new tokens."""
        numbers = inputs[0] - self.first_id
        is_new = (numbers >= 0) & (numbers < len(self.tokens))
        rows = F.embedding(numbers.clamp(0, len(self.tokens) - 1), self.weight).to(output.dtype)
        return torch.where(is_new[..., None], rows, output)


def report_split(key: str, tokenizer, concept: str, tokens_each: int) -> None:
    """Says that a tokenizer splits --initializer_concept into more or fewer tokens than are learned."""
    width = len(concept_ids(tokenizer, concept))
    if width != tokens_each:  # as many of its pieces are taken as fit
        split = f"splits {concept!r} into {width} tokens, not {tokens_each}"
        print_status(f"note: {key} {split}: cut or repeated to fit")
