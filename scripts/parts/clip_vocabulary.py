"""CLIP's tokenizer without the hub."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path


def clip_tokenizer():
    """CLIP's released tokenizer, from the vocabulary that the package open_clip_torch carries; None without it.

    Only its data file is read, so `pip install --no-deps open_clip_torch` suffices. https://arxiv.org/abs/2103.00020
    """
    package = importlib.util.find_spec("open_clip")
    if package is None:
        return None
    from transformers import CLIPTokenizer

    text = gzip.decompress((Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz").read_bytes())
    merges = [tuple(line.split()) for line in text.decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(c) for c in printable] + [chr(256 + i) for i in range(256 - len(printable))]  # of the other bytes
    pieces = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, model_max_length=77)
