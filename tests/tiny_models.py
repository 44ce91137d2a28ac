"""Small models of the classes that prepare_dataset.py uses, which can tell colours apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "yellow": (230, 220, 40)}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]


def words_tokenizer(words: list[str], begin: bool = False, **special: str):
    """A tokenizer that knows whole words.

    begin: put <s> first; special: more tokens by the names that Florence-2 wants.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begin:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=special,
    )


def teach(model, batch: dict, rate: float = 1e-2, steps: int = 300) -> None:
    """Trains until the model repeats its labels."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.02:
            break
    model.eval()


def colour_pictures(*names: str) -> list:
    return [Image.new("RGB", (32, 32), COLOURS[n]) for n in names or COLOURS]


def make_blip2(folder: Path) -> Path:
    """A BLIP-2 with OPT that says "a COLOUR picture"."""
    import transformers as t

    torch.manual_seed(0)
    tokenizer = words_tokenizer(["a", "picture", *COLOURS], begin=True)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = t.Blip2Config(
        vision_config=t.Blip2VisionConfig(**size, image_size=32, patch_size=16).to_dict(),
        qformer_config=t.Blip2QFormerConfig(**size, encoder_hidden_size=32, vocab_size=16).to_dict(),
        text_config=t.OPTConfig(
            vocab_size=len(tokenizer), hidden_size=32, ffn_dim=64, num_hidden_layers=1,
            num_attention_heads=2, word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=4,
    )  # fmt: skip
    model = t.Blip2ForConditionalGeneration(config)
    images = t.BlipImageProcessorPil(size={"height": 32, "width": 32})
    processor = t.Blip2Processor(images, tokenizer, num_query_tokens=4)
    texts = [f"a {c} picture </s>" for c in COLOURS]
    batch = dict(processor(images=colour_pictures(), text=texts, return_tensors="pt"))
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == 4, -100)
    teach(model, batch)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_florence2(folder: Path) -> Path:
    """A Florence-2 that answers <DETAILED_CAPTION> with "a COLOUR picture in detail", for red and blue."""
    import transformers as t

    torch.manual_seed(0)
    words = ["a", "picture", "Describe", "in", "detail", "what", "is", "shown", "the", "image.", *COLOURS]
    tokenizer = words_tokenizer(words, image_token="<image>")
    config = t.Florence2Config(
        vision_config={
            "depths": [1, 1, 1, 1], "embed_dim": [8, 8, 16, 16], "num_heads": [1, 1, 2, 2],
            "num_groups": [1, 1, 2, 2], "window_size": 2, "projection_dim": 32, "drop_path_rate": 0.0,
        },
        text_config=t.BartConfig(
            vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
            decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=2, forced_eos_token_id=2,
        ).to_dict(),
        image_token_id=4,
    )  # fmt: skip
    model = t.Florence2ForConditionalGeneration(config)
    images = t.CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5
    processor = t.Florence2Processor(images, tokenizer)
    pictures, tasks = colour_pictures("red", "blue"), ["<DETAILED_CAPTION>"] * 2
    batch = dict(processor(images=pictures, text=tasks, return_tensors="pt"))
    answers = [f"<s> a {colour} picture in detail </s>" for colour in ("red", "blue")]
    teach(model, batch | {"labels": tokenizer(answers, return_tensors="pt").input_ids})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_git(folder: Path) -> Path:
    """A GIT, which describes without being asked: for model_type auto."""
    import transformers as t

    torch.manual_seed(0)
    tokenizer = words_tokenizer(["a", "picture", *COLOURS])
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = t.GitVisionConfig(**size, image_size=32, patch_size=16).to_dict()
    config = t.GitConfig(
        **size, vision_config=vision, vocab_size=len(tokenizer), max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = t.GitForCausalLM(config)
    images = t.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = t.GitProcessor(images, tokenizer)
    texts = tokenizer([f"<s> a {c} picture </s>" for c in COLOURS], return_tensors="pt")
    pixels = images(colour_pictures(), return_tensors="pt").pixel_values
    teach(model, dict(texts) | {"pixel_values": pixels, "labels": texts.input_ids})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_vit(folder: Path) -> Path:
    """A vision encoder with GPT-2, saved as such models are: without a processor that holds both."""
    import transformers as t

    torch.manual_seed(0)
    tokenizer = words_tokenizer(["a", "picture", *COLOURS])
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    decoder = t.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=32,
        add_cross_attention=True, is_decoder=True, **ends,
    )  # fmt: skip
    encoder = t.ViTConfig(**size, image_size=32, patch_size=16)
    config = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    model = t.VisionEncoderDecoderModel(config=config)
    model.generation_config.update(decoder_start_token_id=1, **ends)
    images = t.ViTImageProcessorPil(size={"height": 32, "width": 32})
    answers = tokenizer([f"a {c} picture </s>" for c in COLOURS], return_tensors="pt").input_ids
    pixels = images(colour_pictures(), return_tensors="pt").pixel_values
    teach(model, {"pixel_values": pixels, "labels": answers})
    for part in (model, tokenizer, images):
        part.save_pretrained(folder)
    return folder


def make_tagger(folder: Path, batch: str | int = "batch_size") -> Path:
    """A tagger's two files. Its ONNX graph takes the means of a 448 x 448 BGR picture, then a linear layer
    and a sigmoid.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        ("general", 9, (0, 0, 0), 5.0),
        ("red_background", 0, (-1, -1, 2), -100),
        ("green_background", 0, (-1, 2, -1), -100),
        ("blue_background", 0, (2, -1, -1), -100),
        ("white_border", 0, (1, 1, 1), -600),
        ("o_o", 0, (0, 0, 0), 1.0),
        ("hatsune_miku", 4, (0, 0, 0), 0.5),
        ("never", 0, (0, 0, 0), -9.0),
    ]
    lines = [f"{i},{name},{category},1" for i, (name, category, _, _) in enumerate(rows)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *lines]) + "\n")
    weight = np.array([w for _, _, w, _ in rows], np.float32).T / 20
    bias = np.array([b / 20 if abs(b) > 50 else b for _, _, _, b in rows], np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["input", "sides"], ["means"], keepdims=0),
            helper.make_node("MatMul", ["means", "weight"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["sum"]),
            helper.make_node("Sigmoid", ["sum"], ["output"]),
        ],
        "tagger",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 448, 448, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, len(rows)])],
        [
            numpy_helper.from_array(np.array([1, 2], np.int64), "sides"),
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(bias, "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder


def write_graph(nodes: list, constants: dict[str, np.ndarray], shapes: dict[str, list], file: Path) -> None:
    """Writes an ONNX file. shapes: of its input and its output, by name."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    values = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], values)
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)


def make_subject_finder(folder: Path, logits: bool = True, settings: dict | None = None) -> Path:
    """A model whose subject is what is red, in 64 x 64 pixels, as BiRefNet (logits) or IS-Net gives it.

    settings: of its preprocessor_config.json; None for none.
    """
    import json

    from onnx import helper

    nodes = [helper.make_node("Conv", ["input_image", "weight", "bias"], ["scores"])]
    nodes.append(helper.make_node("Identity" if logits else "Sigmoid", ["scores"], ["output_image"]))
    weight = np.array([2, -2, -2], np.float32).reshape(1, 3, 1, 1)  # on normalised channels
    constants = {"weight": weight, "bias": np.array([-4], np.float32)}
    shapes = {"input_image": ["batch", 3, 64, 64], "output_image": ["batch", 1, 64, 64]}
    write_graph(nodes, constants, shapes, folder / "onnx" / "model.onnx")
    if settings is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def coloured_squares(count: int, side: int) -> tuple[list[Image.Image], torch.Tensor]:
    """Grey pictures with a rectangle in each of two colours, and where the first one, red, is."""
    rng = np.random.default_rng(0)
    pictures, targets = [], torch.zeros(count, 2, side, side)
    for number in range(count):
        picture = Image.new("RGB", (side, side), (120, 120, 120))
        for k, colour in enumerate(("red", "blue")):
            left, top = rng.integers(0, side // 8 - 2, 2) * 8
            box = (int(left), int(top), int(left) + 24, int(top) + 24)
            picture.paste(COLOURS[colour], box)
            targets[number, k, box[1] : box[3], box[0] : box[2]] = 1
        targets[number, 0] *= 1 - targets[number, 1]
        pictures.append(picture)
    return pictures, targets


def make_segformer(folder: Path) -> Path:
    """A model of the classes "wall" and "person, someone"; what is red is a person."""
    import transformers as t

    torch.manual_seed(0)
    config = t.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16,
        id2label={0: "wall", 1: "person, someone"}, label2id={"wall": 0, "person, someone": 1},
        classifier_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    model = t.SegformerForSemanticSegmentation(config)
    images = t.SegformerImageProcessorPil(size={"height": 64, "width": 64})
    pictures, targets = coloured_squares(12, 64)
    batch = dict(images(pictures, return_tensors="pt"))
    teach(model, batch | {"labels": targets[:, 0].long()})
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    return folder


def make_clipseg(folder: Path) -> Path:
    """A CLIPSeg that finds what is "red" or "blue"."""
    import transformers as t

    torch.manual_seed(0)
    tokenizer = words_tokenizer(["a", "thing", *COLOURS])
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = t.CLIPSegConfig(
        text_config=dict(
            size, vocab_size=len(tokenizer), max_position_embeddings=16, eos_token_id=2, bos_token_id=1
        ),
        vision_config=dict(size, image_size=64, patch_size=8),
        projection_dim=32, extract_layers=[0, 1], reduce_dim=32, decoder_num_attention_heads=2,
        decoder_intermediate_size=64, conditional_layer=0,
    )  # fmt: skip
    model = t.CLIPSegForImageSegmentation(config)
    images = t.ViTImageProcessorPil(size={"height": 64, "width": 64})
    pictures, targets = coloured_squares(6, 64)
    texts = tokenizer(["a red thing"] * 6 + ["a blue thing"] * 6, padding=True, return_tensors="pt")
    batch = dict(texts) | dict(images(pictures * 2, return_tensors="pt"))
    teach(model, batch | {"labels": torch.cat([targets[:, 0], targets[:, 1]])}, rate=2e-3, steps=160)
    for part in (model, tokenizer, images):
        part.save_pretrained(folder)
    return folder


def make_mask2former(folder: Path) -> Path:
    """A Mask2Former that has learned nothing, with pictures of their own shapes."""
    import transformers as t

    torch.manual_seed(0)
    swin = t.SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = t.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        dim_feedforward=16, num_queries=6, id2label={0: "person", 1: "dog", 2: "wall"},
        label2id={"person": 0, "dog": 1, "wall": 2},
    )  # fmt: skip
    t.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 160}
    t.Mask2FormerImageProcessorPil(size=size, size_divisor=32).save_pretrained(folder)
    return folder
