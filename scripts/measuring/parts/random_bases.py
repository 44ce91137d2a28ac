"""Bases of the released models' sizes without a file of weights: configurations, tokenizers, and weights drawn on the device.

What a step costs depends on sizes alone. Each weight is drawn by its name, so that every program, and every way of loading,
gets the same ones.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from pathlib import Path
from unittest.mock import patch

from scripts.parts.released_models import DENOISERS, OTHER_PARTS, PARTS_WITHOUT_TOKENIZERS
from scripts.parts.training_scripts import ROOT


def write_base(family: str, folder: Path, tiny: bool, shallow: bool) -> None:
    """A diffusers folder without weights. tiny: of the toy base's sizes; shallow: text encoders of two layers.

    Tokenizers and scheduler are the toy base's.
    """
    import diffusers
    import transformers

    shutil.copytree(ROOT / "assets" / f"toy_{family}", folder, ignore=shutil.ignore_patterns("*.safetensors", "*.md"))
    if tiny:
        return
    denoiser = "unet" if (folder / "unet").is_dir() else "transformer"
    parts = {denoiser: ("diffusers", *DENOISERS[family])} | (OTHER_PARTS | PARTS_WITHOUT_TOKENIZERS)[family]
    for name, (library, kind, config) in parts.items():
        if name == "scheduler":
            continue
        if library == "diffusers":
            config = {"_class_name": kind, "_diffusers_version": diffusers.__version__} | config
            (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        else:
            depth = "num_layers" if "d_model" in config else "num_hidden_layers"
            config = config | ({depth: 2} if shallow else {})
            sizes = transformers.T5Config if "d_model" in config else transformers.CLIPTextConfig
            sizes(**config, architectures=[kind]).save_pretrained(folder / name)


def drawn(name: str, shape, dtype, device):
    """The tensor of this name: matrices as torch's layers begin, biases 0, scales of norms 1."""
    import torch

    if len(shape) < 2:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype, device=device)
    reach = shape[1:].numel() ** -0.5
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, dtype=dtype, device=device).uniform_(-reach, reach, generator=generator)


def empty_model(kind, folder: Path):
    """A model of diffusers or transformers by its configuration: parameters without content, buffers with theirs."""
    import accelerate
    import diffusers
    import transformers

    with accelerate.init_empty_weights(include_buffers=False):
        if issubclass(kind, diffusers.ModelMixin):
            return kind.from_config(kind.load_config(folder))
        return kind(transformers.AutoConfig.from_pretrained(folder))


def random_model(kind, folder: Path, dtype, device):
    """The same with weights, on the device."""
    import torch
    import transformers

    model = empty_model(kind, folder)
    names = {id(module): path for path, module in model.named_modules()}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{names[id(module)]}.{leaf}"
                value = drawn(name, parameter.shape, dtype, device)
                module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and leaf not in module._non_persistent_buffers_set:
                module._buffers[leaf] = buffer.to(dtype)
    if isinstance(model, transformers.PreTrainedModel):
        model.tie_weights()
    return model.to(device).eval()


class RandomFile:
    """What `safetensors.safe_open` gives, for a file that isn't there: the tensors that a model of its folder would have."""

    def __init__(self, file: Path, device) -> None:
        import diffusers

        config = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
        model = empty_model(getattr(diffusers, config["_class_name"]), file.parent)
        self.tensors, self.device = model.state_dict(), device

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.tensors = {}

    def keys(self):
        return self.tensors.keys()

    def get_slice(self, name: str):
        shape = self.tensors[name].shape
        return type("Slice", (), {"get_shape": lambda _: list(shape)})()

    def get_tensor(self, name: str):
        import torch

        tensor = self.tensors[name]
        return drawn(name, tensor.shape, torch.bfloat16, self.device) if tensor.is_meta else tensor


@contextlib.contextmanager
def random_weights(device):
    """While inside, models come with random weights on the device, whatever folder they are read from."""
    import diffusers
    import safetensors
    import torch
    import transformers

    real_open = safetensors.safe_open

    def load(cls, folder, *_, subfolder=None, dtype=None, torch_dtype=None, **__):
        dtype = dtype or torch_dtype
        dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
        return random_model(cls, Path(folder) / (subfolder or ""), dtype, device)

    def safe_open(file, *rest, **named):
        return real_open(file, *rest, **named) if Path(file).exists() else RandomFile(Path(file), device)

    with (
        patch.object(diffusers.ModelMixin, "from_pretrained", classmethod(load)),
        patch.object(transformers.PreTrainedModel, "from_pretrained", classmethod(load)),
        patch.object(safetensors, "safe_open", safe_open),
    ):
        yield
