"""Bases of the released models' sizes whose weights have no content, and the pictures of a batch.

Models are as large as their configurations say, in CPU memory that nothing touches: pages that nobody writes
cost nothing, so FLUX.1's 12 billion parameters fit.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lora_training.families import FAMILIES
from scripts.dev.benchmarks.cases import Case
from scripts.dev.benchmarks.random_bases import empty_model, write_base


def write_inputs(case: Case, work: Path, tiny: bool) -> None:
    """Writes `base`, a diffusers folder, and `pictures`, as many as a batch has, into the work folder."""
    from PIL import Image

    write_base(case.family, work / "base", tiny, shallow=False)
    if any(flag.startswith("quantize_base") for flag in case.flags):  # which is read tensor by tensor
        write_sparse_weights(work / "base" / FAMILIES[case.family].denoiser)
    (work / "pictures").mkdir()
    for i in range(case.batch):
        picture = Image.effect_noise((case.size, case.size), 60 + i).convert("RGB")
        picture.save(work / "pictures" / f"{i}.png")


def write_sparse_weights(folder: Path) -> None:
    """Writes a denoiser's weights in bfloat16 as zeros that take no room on the disk."""
    import diffusers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = getattr(diffusers, config["_class_name"]).from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    write_sparse_file(folder / "diffusion_pytorch_model.safetensors", shapes)


def write_sparse_file(
    file: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Writes a safetensors file of zeros that takes no room on the disk. dtype: bfloat16 or float16."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        spelling = {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
        header[name] = {"dtype": spelling, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def load_without_content() -> None:
    """from_pretrained gives models without content, for the rest of this process."""
    import diffusers
    import transformers

    def load(cls, pretrained_model_name_or_path, *_, subfolder=None, dtype=None, torch_dtype=None, **options):
        dtype = dtype or torch_dtype
        with torch.device("meta"):
            model = empty_model(cls, Path(pretrained_model_name_or_path) / (subfolder or ""))
        model = (model.to(dtype) if isinstance(dtype, torch.dtype) else model).to_empty(device="cpu")
        if isinstance(model, transformers.PreTrainedModel):
            model.tie_weights()
        model.eval()
        return (model, {"missing_keys": []}) if options.get("output_loading_info") else model

    diffusers.ModelMixin.from_pretrained = classmethod(load)
    transformers.PreTrainedModel.from_pretrained = classmethod(load)
