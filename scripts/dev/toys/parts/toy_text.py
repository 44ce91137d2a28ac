"""Tokenizers and text encoders of the toy bases, and prompts as their pipelines encode them.

Text encoders are trained along with the denoiser. One caption in eight has a nonsense word in it, so that the
pieces of a trigger word such as "sks" are not untrained embeddings.
"""

from __future__ import annotations

import json
import random

import torch
import torch.nn.functional as F

from scripts.dev.toys.parts.toy_families import TOY_FAMILIES, ToyFamily
from scripts.dev.toys.parts.toy_world import COLOR_NAMES, SHAPES, nonsense_word

CLIP_LENGTH = 77  # tokens
# tokens of 77, which hold any caption: what is read while training on, by SD3 up to the last quarter
SHORT_CLIP_LENGTH = 24
CAPTION_WORDS = ["a", "on", "background", *SHAPES, *COLOR_NAMES]


def make_clip_tokenizer():
    """CLIP's kind of tokenizer, its merges learned from the world's captions: about 670 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator([word for word in CAPTION_WORDS for _ in range(5)], trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *("".join(pair) for pair in merges)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def make_t5_tokenizer():
    """T5's kind of tokenizer: the world's words, and single characters for everything else."""
    from transformers import T5Tokenizer

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocab += [("▁" + word, -3.0) for word in CAPTION_WORDS if word != "a"] + [("▁a", -3.0)]
    vocab += [(chr(c), -8.0) for c in range(33, 127) if chr(c) != "▁"]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def make_text_encoders(family: ToyFamily) -> tuple[list, list]:
    """(tokenizers, text encoders), CLIPs first, T5 last."""
    tokenizers, encoders = [], []
    two_clips = len(family.clips) > 1
    for number, (width, pooled) in enumerate(family.clips):
        with_projection = two_clips and (number > 0 or family.t5 > 0)  # SDXL's first encoder has none
        layers = 3 if two_clips else 2  # SDXL and SD3 read the layer before the last
        tokenizers.append(make_clip_tokenizer())
        encoders.append(make_clip_encoder(tokenizers[-1], width, pooled, layers, with_projection))
    if family.t5:
        tokenizers.append(make_t5_tokenizer())
        encoders.append(make_t5_encoder(tokenizers[-1], family.t5))
    return tokenizers, encoders


def make_clip_encoder(tokenizer, width: int, pooled: int, layers: int, with_projection: bool):
    """A CLIP text encoder with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        projection_dim=pooled,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)


def make_t5_encoder(tokenizer, width: int):
    """A T5 encoder with random weights."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        d_ff=4 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config)


def tokenize(name: str, tokenizers: list, captions: list[list[str]], t5_length: int) -> list[torch.Tensor]:
    """Token ids as the pipelines make them: CLIPs padded to 77, T5 to `t5_length`.

    captions: those for each tokenizer.
    """
    lengths = [CLIP_LENGTH] * len(tokenizers)
    if TOY_FAMILIES[name].t5:
        lengths[-1] = t5_length
    return [
        tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        for tokenizer, texts, length in zip(tokenizers, captions, lengths, strict=True)
    ]


def encode(name: str, encoders: list, ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids, (B, L) per encoder -> (prompt embeddings (B, L, D), pooled embeddings (B, P) or None)."""
    if name == "sd15":
        return encoders[0](ids[0])[0], None
    if name == "flux":
        return encoders[1](ids[1])[0], encoders[0](ids[0]).pooler_output
    outputs = [
        encoder(i, output_hidden_states=True) for encoder, i in zip(encoders[:2], ids[:2], strict=True)
    ]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    if name == "sdxl":
        return hidden, outputs[1].text_embeds
    t5 = encoders[2](ids[2])[0]
    hidden = F.pad(hidden, (0, t5.shape[-1] - hidden.shape[-1]))
    return torch.cat([hidden, t5], dim=1), torch.cat([output.text_embeds for output in outputs], dim=-1)


def blind_one_encoder(name: str, captions: list[str], rng: random.Random) -> list[list[str]]:
    """The captions for each tokenizer; in three of ten, either the CLIPs or T5 read nonsense for colour and
    shape.

    Else a toy takes the shape from CLIP alone and the colour from T5 alone, and new tokens of one can't stand
    for both.
    """
    clips = len(TOY_FAMILIES[name].clips)
    if not TOY_FAMILIES[name].t5:
        return [captions] * clips
    clip_and_t5 = [list(captions), list(captions)]
    for i, caption in enumerate(captions):
        if rng.random() < 0.3:
            thing, *rest = caption.split(" on ")
            hidden = (*COLOR_NAMES, *SHAPES)
            words = [nonsense_word(rng) if word in hidden else word for word in thing.split()]
            clip_and_t5[rng.randrange(2)][i] = " on ".join([" ".join(words), *rest])
    return [clip_and_t5[0]] * clips + [clip_and_t5[1]]
