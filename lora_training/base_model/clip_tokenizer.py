"""CLIP's tokenizer without the hub, from the vocabulary in the package open_clip_torch."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MERGES = 49152 - 256 - 2  # of which CLIP uses the first; the file holds more


def clip_tokenizer() -> CLIPTokenizer | None:
    """CLIP's released tokenizer; None without the package open_clip_torch.

    Only its data file is read, so `pip install --no-deps open_clip_torch` suffices.
    https://arxiv.org/abs/2103.00020
    """
    package = importlib.util.find_spec("open_clip")
    if package is None:
        return None
    from transformers import CLIPTokenizer

    file = Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : MERGES + 1]]
    symbols = byte_symbols()
    pieces = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, model_max_length=77
    )


def byte_symbols() -> list[str]:
    """A printable character for each of the 256 bytes, in the vocabulary's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(c) for c in printable] + [chr(256 + i) for i in range(256 - len(printable))]
